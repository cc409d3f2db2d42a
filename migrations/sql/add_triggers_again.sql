-- Put the triggers on every table that has some of them.
DO $$
DECLARE
    resource regclass;
BEGIN
    FOR resource IN SELECT DISTINCT tgrelid::regclass FROM pg_trigger
        WHERE tgfoid = 'rows_notify'::regproc AND tgparentid = 0
    LOOP
        CALL add_triggers(resource);
    END LOOP;
END
$$;
