-- Stores an entry, for whoever still has the lease; or gives the lease back.
-- KEYS[1]  the path's hash
-- ARGV[1]  variant
-- ARGV[2]  the lease's token
-- ARGV[3]  the entry; empty where there is nothing to store, so that others need not wait for the lease to end
-- ARGV[4]  milliseconds that the hash lives, from its first fill
-- returns  1 stored; 0 not: given back, or the lease is gone: a write dropped the path, or Redis was emptied, or it took too long
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
