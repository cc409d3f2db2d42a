-- Collect the statistics of a table after an import, and merge what its indexes on words have not merged yet. Plans depend
-- on both, and autovacuum would come a minute later. Only the owner of a table may do that, and the role of the apps owns
-- none: so the procedure has the rights of the role that created it.
CREATE PROCEDURE analyze_rows(resource regclass) LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    pending regclass;
BEGIN
    FOR pending IN
        SELECT indexrelid FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid JOIN pg_am ON pg_am.oid = relam
        WHERE indrelid = resource AND amname = 'gin'
    LOOP
        PERFORM gin_clean_pending_list(pending);
    END LOOP;
    EXECUTE format('ANALYZE %s', resource);
END
$$;
