DO $$
DECLARE
    resource regclass;
BEGIN
    FOR resource IN SELECT name FROM resources LOOP
        CALL add_triggers(resource);
    END LOOP;
END
$$;
