-- Forgets a path: bodies and leases alike, so that a fill that is under way finds its lease gone.
-- KEYS[1]  the path's hash
-- returns  1 something was there; 0 nothing was
return redis.call('UNLINK', KEYS[1])
