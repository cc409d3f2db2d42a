-- A path's entry, or else who fills it.
-- KEYS[1]  the path's hash
-- ARGV[1]  variant (the canonical query; empty for the path itself)
-- ARGV[2]  a token that was never used before: the lease, if it is given
-- ARGV[3]  milliseconds after which a lease is void
-- returns  {1, entry, milliseconds that it lives} it is here; {2} you fill it, with this token; {3} somebody else is filling it
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
