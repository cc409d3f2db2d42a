"""Caches: who has to be told of a write; and word of writes to users that come from outside the app."""

from alembic import op

revision = "0002_caches"
down_revision = "0001_users"


def upgrade() -> None:
    op.execute(
        """
        -- What each column means to the protocol: velikiy/coherence/membership.py.
        CREATE TABLE caches (
            name text PRIMARY KEY,
            kind text NOT NULL CHECK (kind IN ('edge', 'redis')),
            address text NOT NULL,
            epoch text NOT NULL,
            renewed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            fenced_at timestamptz,
            left_out boolean NOT NULL DEFAULT false
        ) WITH (fillfactor = 50);  -- edges renew each second: room for new versions of a row beside the old one
        INSERT INTO caches (name, kind, address, epoch) VALUES ('redis', 'redis', '', gen_random_uuid()::text);

        -- The relay listens (velikiy/relay/listener.py). One notification holds 8000 bytes; above 1000 rows "*" stands
        -- for everything, which costs the caches more and the queue of notifications nothing.
        CREATE FUNCTION users_notify() RETURNS trigger LANGUAGE plpgsql AS $$
        DECLARE
            ids bigint[];
            first int;
        BEGIN
            IF TG_OP = 'TRUNCATE' THEN
                PERFORM pg_notify('velikiy', 'users *');
                RETURN NULL;
            ELSIF TG_OP = 'UPDATE' THEN
                ids := ARRAY(SELECT id FROM old_rows UNION SELECT id FROM new_rows LIMIT 1001);
            ELSIF TG_OP = 'DELETE' THEN
                ids := ARRAY(SELECT id FROM old_rows LIMIT 1001);
            ELSE
                ids := ARRAY(SELECT id FROM new_rows LIMIT 1001);
            END IF;
            IF cardinality(ids) > 1000 THEN
                PERFORM pg_notify('velikiy', 'users *');
                RETURN NULL;
            END IF;
            FOR first IN SELECT generate_series(1, cardinality(ids), 300) LOOP
                PERFORM pg_notify('velikiy', 'users ' || array_to_string(ids[first : first + 299], ' '));
            END LOOP;
            RETURN NULL;
        END
        $$;

        -- Not in sessions that fence for themselves: NOTIFY takes a lock at COMMIT that all databases share.
        CREATE TRIGGER users_inserted AFTER INSERT ON users REFERENCING NEW TABLE AS new_rows
            FOR EACH STATEMENT WHEN (current_setting('velikiy.fenced', true) IS DISTINCT FROM 'on')
            EXECUTE FUNCTION users_notify();
        CREATE TRIGGER users_updated AFTER UPDATE ON users REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
            FOR EACH STATEMENT WHEN (current_setting('velikiy.fenced', true) IS DISTINCT FROM 'on')
            EXECUTE FUNCTION users_notify();
        CREATE TRIGGER users_deleted AFTER DELETE ON users REFERENCING OLD TABLE AS old_rows
            FOR EACH STATEMENT WHEN (current_setting('velikiy.fenced', true) IS DISTINCT FROM 'on')
            EXECUTE FUNCTION users_notify();
        CREATE TRIGGER users_truncated AFTER TRUNCATE ON users
            FOR EACH STATEMENT WHEN (current_setting('velikiy.fenced', true) IS DISTINCT FROM 'on')
            EXECUTE FUNCTION users_notify();
        """
    )
