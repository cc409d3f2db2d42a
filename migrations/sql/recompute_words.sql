-- Compute every stored column of words again, of users and of any other resource. PostgreSQL computes such a column only
-- when its row is written; an UPDATE of all rows would make each a new version.
DO $$
DECLARE
    stored record;
    definition text;
BEGIN
    FOR stored IN
        SELECT adrelid::regclass AS resource, attname AS name, pg_get_expr(adbin, adrelid) AS expression,
               ARRAY(SELECT pg_get_indexdef(indexrelid) FROM pg_index
                     WHERE indrelid = adrelid AND attnum = ANY (indkey)) AS indexes
        FROM pg_attrdef default_
        JOIN pg_attribute ON attrelid = adrelid AND attnum = adnum AND attgenerated = 's'
        JOIN pg_depend ON classid = 'pg_attrdef'::regclass AND objid = default_.oid
            AND refclassid = 'pg_proc'::regclass AND refobjid = 'words(text)'::regprocedure
    LOOP
        EXECUTE format('ALTER TABLE %s DROP COLUMN %I, ADD COLUMN %I text GENERATED ALWAYS AS (%s) STORED',
            stored.resource, stored.name, stored.name, stored.expression);
        FOREACH definition IN ARRAY stored.indexes LOOP
            EXECUTE definition;
        END LOOP;
        EXECUTE format('ANALYZE %s', stored.resource);  -- the new column has no statistics, which plans depend on
    END LOOP;
END
$$;
