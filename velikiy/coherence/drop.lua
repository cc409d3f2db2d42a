-- Forgets paths: bodies and leases alike, so that a fill that is under way finds its lease gone. The writer of each, who
-- knows the new body, has the lease to fill it.
-- KEYS     the paths' hashes
-- ARGV[1]  milliseconds after which a lease is void
-- ARGV[2]  the token of the first path's writer, and so on
-- returns  how many were there
local dropped = redis.call('UNLINK', unpack(KEYS))
local time = redis.call('TIME')
local till = time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[1]
for number, key in ipairs(KEYS) do
    -- pcall: where there is no memory for it, the path is dropped all the same.
    redis.pcall('HSET', key, 'lease:', ARGV[number + 1] .. ' ' .. string.format('%.0f', till))
    redis.pcall('PEXPIRE', key, ARGV[1])
end
return dropped
