-- Return the entry of a path, or decide which reader fills it.
-- KEYS[1]  the hash of the path
-- ARGV[1]  variant (the canonical query; empty for the path itself)
-- ARGV[2]  a token that was never used before: the fill lease, if it is granted
-- ARGV[3]  milliseconds after which a fill lease is void
-- ARGV[4]  the beginning of the id of the data set that the caller reads; empty if the server reports none
-- returns  {1, entry, milliseconds that it lives}; {2} the caller fills, with this token; {3} another reader fills
-- After a primary was demoted, its connections stay open, and its data is that of another server. As long as it is a
-- replica, it refuses the script for the write, which deletes no field. Promoted again, it has another data set.
redis.call('HDEL', KEYS[1], '')
if ARGV[4] ~= '' and not string.find(redis.call('INFO', 'replication'), 'master_replid:' .. ARGV[4], 1, true) then
    return redis.error_reply('OTHERDATA the data set was replaced')
end
local entry = redis.call('HGET', KEYS[1], 'body:' .. ARGV[1])
if entry then
    return {1, entry, redis.call('PTTL', KEYS[1])}
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lease = redis.call('HGET', KEYS[1], 'lease:' .. ARGV[1])
if lease and tonumber(lease:match(' (%d+)$')) > now then
    return {3}
end
redis.call('HSET', KEYS[1], 'lease:' .. ARGV[1], ARGV[2] .. ' ' .. string.format('%.0f', now + ARGV[3]))
-- The hash lives at least as long as the lease; the first fill sets its end.
if redis.call('PTTL', KEYS[1]) < 0 then
    redis.call('PEXPIRE', KEYS[1], ARGV[3])
end
return {2}
