-- The triggers of every resource.

-- A trigger increments the version, so that SQL from outside increments it as well. It uses clock_timestamp, because
-- now() is the start of the transaction: of two writers of one row, the later one may have begun first.
CREATE FUNCTION row_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.version := OLD.version + 1;
    NEW.updated_at := clock_timestamp();
    RETURN NEW;
END
$$;

-- Notify the relay (velikiy/relay/listener.py) of changed rows. A notification has at most 8000 bytes. Above 1000 rows
-- "*" stands for every path: that costs the caches more, and spares the queue of notifications.
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

-- Make a resource of a table that has an id: add the columns that the service sets itself, and the triggers.
CREATE PROCEDURE make_resource(resource regclass) LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('ALTER TABLE %s '
        'ADD COLUMN IF NOT EXISTS created_at timestamptz NOT NULL DEFAULT now(), '
        'ADD COLUMN IF NOT EXISTS updated_at timestamptz NOT NULL DEFAULT now(), '
        'ADD COLUMN IF NOT EXISTS version bigint NOT NULL DEFAULT 1, '
        'ADD CHECK (created_at BETWEEN ''0001-01-02'' AND ''9999-12-30''), '
        'ADD CHECK (updated_at BETWEEN ''0001-01-02'' AND ''9999-12-30'')', resource);
    CALL add_triggers(resource);
END
$$;
