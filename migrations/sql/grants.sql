-- The rights of the app's role, velikiy.app_role, on the tables of the service. Their owner or a superuser runs this file
-- after each migration. It grants only what is missing: a GRANT changes the row of the table in the catalog, and the relay
-- then takes the table for altered and empties the caches (velikiy/coherence/tables.py).
DO $$
DECLARE
    app text := current_setting('velikiy.app_role');
    wanted record;
BEGIN
    FOR wanted IN
        WITH tables AS (
            SELECT oid FROM pg_class
            WHERE oid IN (to_regclass('caches'), to_regclass('idempotency_keys'), to_regclass('imports'))
            UNION
            SELECT tgrelid FROM pg_trigger
            WHERE tgfoid IN (to_regproc('rows_notify'), to_regproc('rows_replicated')) AND tgparentid = 0
        )
        SELECT format('%s ON TABLE %s', privilege, oid::regclass) AS right_to
        FROM tables, unnest('{SELECT,INSERT,UPDATE,DELETE}'::text[]) privilege
        WHERE NOT has_table_privilege(app, oid, privilege)
        UNION ALL
        SELECT 'SELECT ON TABLE velikiy_version' WHERE NOT has_table_privilege(app, to_regclass('velikiy_version'), 'SELECT')
        UNION ALL
        -- The service skips ids that SQL has taken (velikiy/resources/ids.py).
        SELECT format('%s ON SEQUENCE %s', privilege, objid::regclass)
        FROM tables
        JOIN pg_depend ON classid = 'pg_class'::regclass AND refclassid = 'pg_class'::regclass
            AND refobjid = tables.oid AND deptype IN ('a', 'i')
        JOIN pg_class ON pg_class.oid = objid AND relkind = 'S',
        unnest('{USAGE,SELECT,UPDATE}'::text[]) privilege
        WHERE NOT has_sequence_privilege(app, objid, privilege)
        UNION ALL
        SELECT format('EXECUTE ON FUNCTION %s', oid::regprocedure)
        FROM pg_proc
        WHERE oid IN (to_regprocedure('words(text)'), to_regprocedure('folded(text)'))
            AND NOT has_function_privilege(app, oid, 'EXECUTE')
        UNION ALL
        SELECT format('USAGE ON SCHEMA %I', current_schema()) WHERE NOT has_schema_privilege(app, current_schema(), 'USAGE')
        UNION ALL
        -- For the temporary tables of an import.
        SELECT format('%s ON DATABASE %I', privilege, datname)
        FROM pg_database, unnest('{CONNECT,TEMPORARY}'::text[]) privilege
        WHERE datname = current_database() AND pg_has_role(datdba, 'MEMBER')
            AND NOT has_database_privilege(app, oid, privilege)
    LOOP
        EXECUTE format('GRANT %s TO %I', wanted.right_to, app);
    END LOOP;
    -- Default privileges may have granted more. Only a migration changes the version.
    IF has_table_privilege(app, to_regclass('velikiy_version'), 'INSERT') THEN
        EXECUTE format('REVOKE INSERT, UPDATE, DELETE ON velikiy_version FROM %I', app);
    END IF;
END
$$;

