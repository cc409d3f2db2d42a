-- Drop a path: its entries and its fill leases, so that a fill under way is refused. The writer, which knows the new
-- entry, gets a fill lease.
-- KEYS[1]  the hash of the path
-- ARGV[1]  the writer's token
-- ARGV[2]  milliseconds after which the fill lease is void
-- returns  1 if the hash existed, else 0
local dropped = redis.call('UNLINK', KEYS[1])
local time = redis.call('TIME')
local till = time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[2]
-- pcall: the drop succeeds even if Redis has no memory for the lease.
redis.pcall('HSET', KEYS[1], 'lease:', ARGV[1] .. ' ' .. string.format('%.0f', till))
redis.pcall('PEXPIRE', KEYS[1], ARGV[2])
return dropped
