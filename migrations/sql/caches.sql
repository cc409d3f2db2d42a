-- The caches that writers invalidate. velikiy/coherence/membership.py explains each column.
CREATE TABLE caches (
    name text PRIMARY KEY,
    kind text NOT NULL CHECK (kind IN ('edge', 'redis')),
    address text NOT NULL,
    epoch text NOT NULL,
    renewed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    fenced_at timestamptz,
    excluded boolean NOT NULL DEFAULT false
) WITH (fillfactor = 50);  -- edges renew each second: new versions of a row fit beside the old one
INSERT INTO caches (name, kind, address, epoch) VALUES ('redis', 'redis', '', gen_random_uuid()::text);
