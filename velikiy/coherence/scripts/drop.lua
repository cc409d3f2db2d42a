-- Forgets a path: bodies and leases alike, so that a fill that is under way finds its lease gone. The writer, who knows
-- the new body, has the lease to fill it.
-- KEYS[1]  the path's hash
-- ARGV[1]  the writer's token
-- ARGV[2]  milliseconds after which the lease is void
-- returns  1 something was there; 0 nothing was
local dropped = redis.call('UNLINK', KEYS[1])
local time = redis.call('TIME')
local till = time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[2]
-- pcall: where there is no memory for it, the path is dropped all the same.
redis.pcall('HSET', KEYS[1], 'lease:', ARGV[1] .. ' ' .. string.format('%.0f', till))
redis.pcall('PEXPIRE', KEYS[1], ARGV[2])
return dropped
