-- The history of rows: one entry for each change of a row (velikiy/resources/history.py). An entry has the row as it was
-- before the change; the row as it is now stands in its own table. So a row costs little until it is changed, and a
-- table that exists already needs no entries to begin with.
CREATE TABLE row_history (
    resource text COLLATE "C" NOT NULL,  -- as TG_TABLE_NAME: with another collation the index would not be used
    row_id bigint NOT NULL,
    version bigint NOT NULL,  -- the version that the change has made; a delete makes one as well
    change text NOT NULL CHECK (change IN ('create', 'update', 'delete', 'erase')),
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    changed_by text,          -- the name of the API key, the command, or the role
    through text NOT NULL CHECK (through IN ('api', 'command', 'sql')),
    before jsonb,             -- the row before the change, without the columns that PostgreSQL computes
    PRIMARY KEY (resource, row_id, version)
);
CREATE INDEX row_history_by_changed_at ON row_history (changed_at);

-- Notify the relay of an entry that a session with session_replication_role = replica, or the worker of a logical
-- replication, changes. If the publisher is this service, the worker applies the row first, for which keep_history_of_row
-- adds an entry, and then the publisher's own entry of the same version. The publisher's entry wins: it says who has
-- changed the row. Without the deletion it would violate row_history_pkey, and the worker would retry for ever.
CREATE FUNCTION history_replicated() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    PERFORM pg_notify('velikiy', TG_TABLE_NAME || ' *');
    IF TG_OP = 'DELETE' THEN
        RETURN OLD;
    ELSIF TG_OP = 'INSERT' THEN
        DELETE FROM row_history
            WHERE resource = NEW.resource AND row_id = NEW.row_id AND version = NEW.version;
    END IF;
    RETURN NEW;
END
$$;

-- Continue the versions of an id that was used before, so that no version of a row ever comes back.
CREATE FUNCTION row_continues() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
    latest bigint;
    generated bigint;
BEGIN
    IF current_setting('velikiy.history', true) = 'off' THEN
        RETURN NEW;
    END IF;
    -- SQL from outside may give the id of a row whose deletion has not been committed. Wait for that transaction, because
    -- its entry cannot be seen before; the unique index would wait only after the search below. The app has waited
    -- already (Repository.check_deleted). A generated id was never used before, and the statement, which has to be planned
    -- for each row, would add half to the time of the INSERT.
    IF current_setting('velikiy.passes_gate', true) IS DISTINCT FROM 'on' OR pg_trigger_depth() > 1 THEN
        BEGIN
            generated := lastval();
        EXCEPTION WHEN object_not_in_prerequisite_state THEN
            NULL;  -- the session has generated no id
        END;
        IF NEW.id IS DISTINCT FROM generated THEN
            EXECUTE format('SELECT FROM %s WHERE id = $1 FOR KEY SHARE', TG_RELID::regclass) USING NEW.id;
        END IF;
    END IF;
    SELECT max(version) INTO latest FROM row_history WHERE resource = TG_TABLE_NAME::text AND row_id = NEW.id;
    IF latest >= NEW.version THEN
        NEW.version := latest + 1;
    END IF;
    RETURN NEW;
END
$$;

-- Add an entry for each row that a statement has changed. The session says who writes: velikiy.author is
-- `api:<name of the API key>` or `command:<name of the command>` (velikiy/coherence/protocol.py). A restore of a backup
-- brings its own entries and sets velikiy.history to off.
CREATE FUNCTION keep_history() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
#variable_conflict use_variable
DECLARE
    author text := coalesce(nullif(current_setting('velikiy.author', true), ''), 'api:');
    way text := split_part(author, ':', 1);
    writer text := nullif(substr(author, strpos(author, ':') + 1), '');
    computed text[];
BEGIN
    IF current_setting('velikiy.history', true) = 'off' THEN
        RETURN NULL;
    END IF;
    -- A row that another trigger or a foreign key writes counts as SQL from outside, as it does for the relay.
    IF current_setting('velikiy.passes_gate', true) IS DISTINCT FROM 'on' OR pg_trigger_depth() > 1 THEN
        way := 'sql';
        writer := session_user;
    END IF;
    IF TG_OP = 'INSERT' THEN
        INSERT INTO row_history (resource, row_id, version, change, changed_by, through)
            SELECT TG_TABLE_NAME, n.id, n.version, 'create', writer, way FROM new_rows n;
        RETURN NULL;
    END IF;
    computed := ARRAY(SELECT attname::text FROM pg_attribute WHERE attrelid = TG_RELID AND attgenerated <> '');
    IF TG_OP = 'UPDATE' THEN
        -- A row whose id is changed is deleted under the one id and created under the other. A version can be there
        -- already if the versions of a table went back while its triggers were switched off.
        INSERT INTO row_history (resource, row_id, version, change, changed_at, changed_by, through, before)
            SELECT TG_TABLE_NAME, coalesce(n.id, o.id), coalesce(n.version, o.version + 1),
                CASE WHEN n.id IS NULL THEN 'delete' WHEN o.id IS NULL THEN 'create' ELSE 'update' END,
                coalesce(n.updated_at, clock_timestamp()), writer, way, to_jsonb(o) - computed
            FROM old_rows o FULL JOIN new_rows n ON n.id = o.id
            ON CONFLICT (resource, row_id, version) DO UPDATE SET change = excluded.change,
                changed_at = excluded.changed_at, changed_by = excluded.changed_by, through = excluded.through,
                before = excluded.before;
    ELSIF TG_OP = 'DELETE' THEN
        INSERT INTO row_history (resource, row_id, version, change, changed_by, through, before)
            SELECT TG_TABLE_NAME, o.id, o.version + 1, 'delete', writer, way, to_jsonb(o) - computed FROM old_rows o
            ON CONFLICT (resource, row_id, version) DO UPDATE SET change = excluded.change,
                changed_at = excluded.changed_at, changed_by = excluded.changed_by, through = excluded.through,
                before = excluded.before;
    ELSE  -- TRUNCATE: the rows are still there
        EXECUTE format('INSERT INTO row_history (resource, row_id, version, change, changed_by, through, before)
            SELECT $1, o.id, o.version + 1, ''delete'', $2, $3, to_jsonb(o) - $4 FROM %s o
            ON CONFLICT (resource, row_id, version) DO NOTHING', TG_RELID::regclass)
            USING TG_TABLE_NAME, writer, way, computed;
    END IF;
    RETURN NULL;
END
$$;

-- The same for one row: in a session with session_replication_role = replica, and for the worker of a logical
-- replication, no trigger of a statement fires. Nothing here may stop a replication.
CREATE FUNCTION keep_history_of_row() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
    computed text[] := ARRAY(SELECT attname::text FROM pg_attribute WHERE attrelid = TG_RELID AND attgenerated <> '');
BEGIN
    IF TG_OP <> 'INSERT' AND (TG_OP = 'DELETE' OR NEW.id <> OLD.id) THEN
        INSERT INTO row_history (resource, row_id, version, change, changed_by, through, before)
            VALUES (TG_TABLE_NAME, OLD.id, OLD.version + 1, 'delete', session_user, 'sql', to_jsonb(OLD) - computed)
            ON CONFLICT (resource, row_id, version) DO NOTHING;
    END IF;
    IF TG_OP = 'INSERT' OR TG_OP = 'UPDATE' AND NEW.id <> OLD.id THEN
        INSERT INTO row_history (resource, row_id, version, change, changed_by, through)
            VALUES (TG_TABLE_NAME, NEW.id, NEW.version, 'create', session_user, 'sql')
            ON CONFLICT (resource, row_id, version) DO NOTHING;
    ELSIF TG_OP = 'UPDATE' THEN
        INSERT INTO row_history (resource, row_id, version, change, changed_at, changed_by, through, before)
            VALUES (TG_TABLE_NAME, NEW.id, NEW.version, 'update', NEW.updated_at, session_user, 'sql',
                to_jsonb(OLD) - computed)
            ON CONFLICT (resource, row_id, version) DO NOTHING;
    END IF;
    RETURN NULL;
END
$$;

-- These functions have the rights of the owner of the history, because a role that may write rows need not be able to
-- write their history. So their names must not depend on the session.
DO $$
DECLARE
    kept text;
BEGIN
    FOREACH kept IN ARRAY ARRAY['row_continues', 'keep_history', 'keep_history_of_row', 'history_replicated'] LOOP
        EXECUTE format('ALTER FUNCTION %I() SET search_path = pg_catalog, %I, pg_temp', kept, current_schema());
        EXECUTE format('REVOKE ALL ON FUNCTION %I() FROM PUBLIC', kept);
    END LOOP;
END
$$;

-- Put the triggers of the history on a table, also again.
CREATE PROCEDURE add_history_triggers(resource regclass) LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('CREATE OR REPLACE TRIGGER row_continues BEFORE INSERT ON %s '
        'FOR EACH ROW EXECUTE FUNCTION row_continues()', resource);
    -- After row_changed, by the order of their names.
    EXECUTE format('CREATE OR REPLACE TRIGGER row_continues_elsewhere BEFORE UPDATE ON %s '
        'FOR EACH ROW WHEN (NEW.id <> OLD.id) EXECUTE FUNCTION row_continues()', resource);
    EXECUTE format('CREATE OR REPLACE TRIGGER history_of_inserted AFTER INSERT ON %s '
        'REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION keep_history()', resource);
    EXECUTE format('CREATE OR REPLACE TRIGGER history_of_updated AFTER UPDATE ON %s '
        'REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows '
        'FOR EACH STATEMENT EXECUTE FUNCTION keep_history()', resource);
    EXECUTE format('CREATE OR REPLACE TRIGGER history_of_deleted AFTER DELETE ON %s '
        'REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION keep_history()', resource);
    EXECUTE format('CREATE OR REPLACE TRIGGER history_of_truncated BEFORE TRUNCATE ON %s '
        'FOR EACH STATEMENT EXECUTE FUNCTION keep_history()', resource);
    EXECUTE format('CREATE OR REPLACE TRIGGER history_of_replicated AFTER INSERT OR UPDATE OR DELETE ON %s '
        'FOR EACH ROW WHEN (current_setting(''session_replication_role'') = ''replica'') '
        'EXECUTE FUNCTION keep_history_of_row()', resource);
    EXECUTE format('ALTER TABLE %s ENABLE TRIGGER row_continues, ENABLE TRIGGER row_continues_elsewhere, '
        'ENABLE TRIGGER history_of_inserted, ENABLE TRIGGER history_of_updated, ENABLE TRIGGER history_of_deleted, '
        'ENABLE ALWAYS TRIGGER history_of_truncated, ENABLE REPLICA TRIGGER history_of_replicated', resource);
END
$$;

-- Put all triggers of the service on a table, also again. The history itself and the table of API keys get only triggers
-- that notify the relay, which then drops every path.
ALTER PROCEDURE add_triggers(regclass) RENAME TO add_relay_triggers;
CREATE PROCEDURE add_triggers(resource regclass) LANGUAGE plpgsql AS $$
BEGIN
    IF resource = to_regclass('row_history') THEN
        -- Entries that the triggers above add come at a greater depth. The app invalidates their rows.
        CREATE OR REPLACE TRIGGER history_changed AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON row_history
            FOR EACH STATEMENT
            WHEN (current_setting('velikiy.passes_gate', true) IS DISTINCT FROM 'on' AND pg_trigger_depth() = 0)
            EXECUTE FUNCTION rows_replicated();
        CREATE OR REPLACE TRIGGER history_replicated BEFORE INSERT OR UPDATE OR DELETE ON row_history FOR EACH ROW
            WHEN (current_setting('session_replication_role') = 'replica' AND pg_trigger_depth() = 0)
            EXECUTE FUNCTION history_replicated();
        ALTER TABLE row_history ENABLE ALWAYS TRIGGER history_changed, ENABLE REPLICA TRIGGER history_replicated;
    ELSIF resource = to_regclass('api_keys') THEN
        CREATE OR REPLACE TRIGGER keys_changed AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON api_keys
            FOR EACH STATEMENT
            WHEN (current_setting('velikiy.passes_gate', true) IS DISTINCT FROM 'on' OR pg_trigger_depth() > 0)
            EXECUTE FUNCTION rows_replicated();
        CREATE OR REPLACE TRIGGER keys_replicated AFTER INSERT OR UPDATE OR DELETE ON api_keys FOR EACH ROW
            WHEN (current_setting('session_replication_role') = 'replica') EXECUTE FUNCTION rows_replicated();
        ALTER TABLE api_keys ENABLE ALWAYS TRIGGER keys_changed, ENABLE REPLICA TRIGGER keys_replicated;
    ELSE
        CALL add_relay_triggers(resource);
        CALL add_history_triggers(resource);
    END IF;
END
$$;
CALL add_triggers('row_history');
CALL add_triggers('api_keys');

-- Only the triggers of the history, unlike add_triggers_again.sql: a migration must not enable triggers of the relay that
-- an operator has disabled.
DO $$
DECLARE
    resource regclass;
BEGIN
    FOR resource IN SELECT DISTINCT tgrelid::regclass FROM pg_trigger
        WHERE tgfoid = 'rows_notify'::regproc AND tgparentid = 0
    LOOP
        CALL add_history_triggers(resource);
    END LOOP;
END
$$;
