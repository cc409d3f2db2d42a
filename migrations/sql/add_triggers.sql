-- Triggers for writes that fire no other trigger: in a session with session_replication_role = replica, and by the worker
-- of a logical replication, which fires no trigger of a statement. One notification for a transaction stands for every
-- path: equal notifications of a transaction are sent once.
CREATE OR REPLACE FUNCTION rows_replicated() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('velikiy', TG_TABLE_NAME || ' *');
    RETURN NULL;
END
$$;

-- Put the triggers on a table, also again. A session of the app invalidates what it writes and sets velikiy.passes_gate;
-- it is exempt, because NOTIFY takes a lock at COMMIT that all databases of the cluster share.
CREATE OR REPLACE PROCEDURE add_triggers(resource regclass) LANGUAGE plpgsql AS $$
DECLARE
    -- Rows that other triggers and foreign keys write count as SQL from outside in every session: the app does not know
    -- the tables that its own write reaches through them.
    outside text := $when$WHEN (current_setting('velikiy.passes_gate', true) IS DISTINCT FROM 'on'
        OR pg_trigger_depth() > 0) EXECUTE FUNCTION rows_notify()$when$;
BEGIN
    EXECUTE format('CREATE OR REPLACE TRIGGER row_changed BEFORE UPDATE ON %s '
        'FOR EACH ROW EXECUTE FUNCTION row_changed()', resource);
    EXECUTE format('CREATE OR REPLACE TRIGGER rows_inserted AFTER INSERT ON %s '
        'REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT %s', resource, outside);
    EXECUTE format('CREATE OR REPLACE TRIGGER rows_updated AFTER UPDATE ON %s '
        'REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT %s', resource, outside);
    EXECUTE format('CREATE OR REPLACE TRIGGER rows_deleted AFTER DELETE ON %s '
        'REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT %s', resource, outside);
    EXECUTE format('CREATE OR REPLACE TRIGGER rows_truncated AFTER TRUNCATE ON %s '
        'FOR EACH STATEMENT %s', resource, outside);
    EXECUTE format('CREATE OR REPLACE TRIGGER rows_replicated AFTER INSERT OR UPDATE OR DELETE ON %s '
        'FOR EACH ROW WHEN (current_setting(''session_replication_role'') = ''replica'') '
        'EXECUTE FUNCTION rows_replicated()', resource);
    -- ENABLE TRIGGER USER makes all of them triggers of ordinary sessions. The condition above then keeps each row of an
    -- ordinary write from notifying.
    EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER row_changed, ENABLE TRIGGER rows_inserted, '
        'ENABLE TRIGGER rows_updated, ENABLE TRIGGER rows_deleted, ENABLE ALWAYS TRIGGER rows_truncated, '
        'ENABLE REPLICA TRIGGER rows_replicated', resource);
END
$$;
