-- Store an entry if the fill lease still exists, or return the lease.
-- KEYS[1]  the hash of the path
-- ARGV[1]  variant
-- ARGV[2]  the token of the fill lease
-- ARGV[3]  the entry, or empty to return the lease, so that other readers need not wait for its end
-- ARGV[4]  milliseconds that the hash lives, from its first fill
-- returns  1 if the entry was stored; 0 if the lease was returned or is gone (dropped by a write, flushed, or expired)
local lease = redis.call('HGET', KEYS[1], 'lease:' .. ARGV[1])
if not lease or lease:match('^(%S+) ') ~= ARGV[2] then
    return 0
end
redis.call('HDEL', KEYS[1], 'lease:' .. ARGV[1])
if ARGV[3] == '' then
    return 0
end
redis.call('HSET', KEYS[1], 'body:' .. ARGV[1], ARGV[3])
if redis.call('HSETNX', KEYS[1], 'filled', '1') == 1 then
    redis.call('PEXPIRE', KEYS[1], ARGV[4])
end
return 1
