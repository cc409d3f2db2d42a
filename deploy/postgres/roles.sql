-- The two roles of the stack's own PostgreSQL: velikiy_owner owns the database and migrates it, velikiy is the role of
-- the apps and owns nothing. The superuser runs this file in the database velikiy at each start, and grants.sql after it.
-- It also takes the tables from the role velikiy, which owned them in earlier versions.
--
-- The server reads the passwords itself, from the folder velikiy.secrets, so no command and no log contains them.
-- `postgres --single -j` (start.sh) ends a statement at a semicolon before an empty line, so the file has one of them.
DO $$
DECLARE
    folder text := current_setting('velikiy.secrets');
    rights text := 'LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS';
    role text;
    password text;
BEGIN
    FOREACH role IN ARRAY '{velikiy_owner,velikiy}'::text[] LOOP
        IF to_regrole(role) IS NULL THEN
            EXECUTE format('CREATE ROLE %I', role);
        END IF;
        password := CASE role WHEN 'velikiy' THEN 'app_password' ELSE 'owner_password' END;
        EXECUTE format('ALTER ROLE %I %s PASSWORD %L', role, rights,
            rtrim(pg_read_file(folder || '/' || password), E'\n'));
    END LOOP;
    GRANT velikiy TO velikiy_owner;  -- which sees and ends the sessions of the apps
    -- Not the temporary tables of an import that is running.
    IF EXISTS (SELECT FROM pg_class WHERE relowner = 'velikiy'::regrole AND relpersistence <> 't')
        OR EXISTS (SELECT FROM pg_proc WHERE proowner = 'velikiy'::regrole)
    THEN
        REASSIGN OWNED BY velikiy TO velikiy_owner;
    END IF;
    EXECUTE format('ALTER DATABASE %I OWNER TO velikiy_owner', current_database());
    EXECUTE format('GRANT CONNECT, TEMPORARY ON DATABASE %I TO velikiy', current_database());
    REVOKE CREATE ON SCHEMA public FROM PUBLIC, velikiy;
    -- For tables of later migrations, of added resources, and of a restored dump.
    ALTER DEFAULT PRIVILEGES FOR ROLE velikiy_owner GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO velikiy;
    ALTER DEFAULT PRIVILEGES FOR ROLE velikiy_owner GRANT USAGE, SELECT, UPDATE ON SEQUENCES TO velikiy;
END
$$;

