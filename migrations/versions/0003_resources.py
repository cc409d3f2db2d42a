"""What every resource needs of its table; users become one. Search and orders for their list. Idempotency-Keys."""

from alembic import op
from sqlalchemy import text

from velikiy.postgres.migrate import CannotMigrate

revision = "0003_resources"
down_revision = "0002_caches"


def upgrade() -> None:
    refuse_without_trigrams()
    op.execute(
        """
        CREATE EXTENSION IF NOT EXISTS pg_trgm;

        -- The words of a text, each after a space: `words LIKE '%' || words('Ali') || '%'` finds what has a word that
        -- begins with it, by an index on trigrams. Null where there is no letter and no digit: that is found nowhere.
        CREATE FUNCTION words(value text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN
            nullif(rtrim(regexp_replace(' ' || lower(normalize(value, NFKC)), '[^[:alnum:]]+', ' ', 'g')), '');

        -- A trigger, so that SQL from outside counts a version up as well.
        -- clock_timestamp: now() is when a transaction began, and of two writers of one row the later one may
        -- have begun first.
        CREATE FUNCTION row_changed() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            NEW.version := OLD.version + 1;
            NEW.updated_at := clock_timestamp();
            RETURN NEW;
        END
        $$;

        -- The relay listens (velikiy/relay/listener.py). One notification holds 8000 bytes; above 1000 rows "*" stands
        -- for everything, which costs the caches more and the queue of notifications nothing.
        CREATE FUNCTION rows_notify() RETURNS trigger LANGUAGE plpgsql AS $$
        DECLARE
            ids bigint[];
            first int;
        BEGIN
            IF TG_OP = 'TRUNCATE' THEN
                PERFORM pg_notify('velikiy', TG_TABLE_NAME || ' *');
                RETURN NULL;
            ELSIF TG_OP = 'UPDATE' THEN
                ids := ARRAY(SELECT id FROM old_rows UNION SELECT id FROM new_rows LIMIT 1001);
            ELSIF TG_OP = 'DELETE' THEN
                ids := ARRAY(SELECT id FROM old_rows LIMIT 1001);
            ELSE
                ids := ARRAY(SELECT id FROM new_rows LIMIT 1001);
            END IF;
            IF cardinality(ids) > 1000 THEN
                PERFORM pg_notify('velikiy', TG_TABLE_NAME || ' *');
                RETURN NULL;
            END IF;
            FOR first IN SELECT generate_series(1, cardinality(ids), 300) LOOP
                PERFORM pg_notify(
                    'velikiy', TG_TABLE_NAME || ' ' || array_to_string(ids[first : first + 299], ' '));
            END LOOP;
            RETURN NULL;
        END
        $$;

        -- A table with an id becomes a resource: what the service sets itself, and word of writes from outside.
        -- Not in sessions that fence for themselves: NOTIFY takes a lock at COMMIT that all databases share.
        CREATE PROCEDURE make_resource(resource regclass) LANGUAGE plpgsql AS $$
        DECLARE
            -- From outside is also what other triggers and foreign keys write, in whosever transaction: of a table
            -- that a write reaches through them the app knows nothing.
            outside text := $when$WHEN (current_setting('velikiy.fenced', true) IS DISTINCT FROM 'on'
                OR pg_trigger_depth() > 0) EXECUTE FUNCTION rows_notify()$when$;
        BEGIN
            EXECUTE format('ALTER TABLE %s '
                'ADD COLUMN IF NOT EXISTS created_at timestamptz NOT NULL DEFAULT now(), '
                'ADD COLUMN IF NOT EXISTS updated_at timestamptz NOT NULL DEFAULT now(), '
                'ADD COLUMN IF NOT EXISTS version bigint NOT NULL DEFAULT 1, '
                'ADD CHECK (created_at BETWEEN ''0001-01-02'' AND ''9999-12-30''), '
                'ADD CHECK (updated_at BETWEEN ''0001-01-02'' AND ''9999-12-30'')', resource);
            EXECUTE format('CREATE TRIGGER row_changed BEFORE UPDATE ON %s '
                'FOR EACH ROW EXECUTE FUNCTION row_changed()', resource);
            EXECUTE format('CREATE TRIGGER rows_inserted AFTER INSERT ON %s '
                'REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT %s', resource, outside);
            EXECUTE format('CREATE TRIGGER rows_updated AFTER UPDATE ON %s '
                'REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT %s', resource, outside);
            EXECUTE format('CREATE TRIGGER rows_deleted AFTER DELETE ON %s '
                'REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT %s', resource, outside);
            EXECUTE format('CREATE TRIGGER rows_truncated AFTER TRUNCATE ON %s '
                'FOR EACH STATEMENT %s', resource, outside);
        END
        $$;

        DROP TRIGGER users_changed ON users;
        DROP TRIGGER users_inserted ON users;
        DROP TRIGGER users_updated ON users;
        DROP TRIGGER users_deleted ON users;
        DROP TRIGGER users_truncated ON users;
        DROP FUNCTION users_changed, users_notify;

        -- A column and not only an index: PostgreSQL keeps statistics of it, without making the words anew, and by
        -- them chooses between the index of the words and the one of the order.
        ALTER TABLE users ADD COLUMN words text GENERATED ALWAYS AS (words(name || ' ' || email)) STORED;
        CREATE INDEX users_words ON users USING gin (words gin_trgm_ops);
        CREATE INDEX users_by_name ON users ((name COLLATE "und-x-icu"), id);
        CREATE INDEX users_by_created_at ON users (created_at, id);
        CALL make_resource('users');

        CREATE TABLE idempotency_keys (
            key text PRIMARY KEY,
            request bytea NOT NULL,  -- digest of what came with it
            answer json NOT NULL,  -- and not jsonb: the same answer has its members in the same order
            created_at timestamptz NOT NULL DEFAULT now()
        );
        CREATE INDEX idempotency_keys_by_created_at ON idempotency_keys (created_at);

        -- Where an import was broken off (velikiy/transfer.py).
        CREATE TABLE imports (
            resource text NOT NULL,
            begins_with bytea NOT NULL,  -- digest of the file's first bytes
            lines bigint NOT NULL,
            so_far bytea NOT NULL,       -- digest of these lines
            imported bigint NOT NULL,
            rejected bigint NOT NULL,
            rejects_size bigint NOT NULL,
            updated_at timestamptz NOT NULL DEFAULT now(),
            PRIMARY KEY (resource, begins_with)
        );
        """
    )


def refuse_without_trigrams() -> None:
    there = op.get_bind().execute(text("SELECT count(*) FROM pg_available_extensions WHERE name = 'pg_trgm'")).scalar()
    if not there:
        raise CannotMigrate(
            "PostgreSQL lacks the extension pg_trgm, which the search of users needs. Install its contrib modules "
            "(Debian: package postgresql-contrib) and start again; nothing was changed."
        )
