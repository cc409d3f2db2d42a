-- The reasons why an existing table of this name cannot be adopted, as sentences.
SELECT 'it is not a plain table'
FROM pg_class WHERE oid = 'users'::regclass AND relkind <> 'r'
UNION ALL
SELECT format('the table %s inherits from it, so ids and e-mails are not unique', inhrelid::regclass)
FROM pg_inherits WHERE inhparent = 'users'::regclass
UNION ALL
SELECT format('it inherits from the table %s, whose writes fire no trigger here', inhparent::regclass)
FROM pg_inherits WHERE inhrelid = 'users'::regclass
UNION ALL
SELECT 'it lacks the column ' || wanted.name
FROM (VALUES ('id'), ('name'), ('email'), ('created_at')) wanted(name)
WHERE NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = 'users'::regclass AND attname = wanted.name)
UNION ALL
SELECT format('column %s has type %s, not %s', attname, format_type(atttypid, NULL), wanted.types[1])
FROM pg_attribute JOIN (VALUES
    ('id', '{bigint,integer,smallint}'::text[]),
    ('version', '{bigint,integer,smallint}'),
    ('name', '{text,character varying,character}'),
    ('email', '{text,character varying,character}'),
    ('created_at', '{timestamp with time zone,timestamp without time zone,date}'),
    ('updated_at', '{timestamp with time zone,timestamp without time zone,date}')
) wanted(name, types) ON wanted.name = attname
WHERE attrelid = 'users'::regclass AND NOT attisdropped
  AND format_type(coalesce(nullif((SELECT typbasetype FROM pg_type WHERE oid = atttypid), 0), atttypid),
                  NULL) <> ALL (wanted.types)
UNION ALL
SELECT format('column %s is unknown to this service and requires a value', attname)
FROM pg_attribute
WHERE attrelid = 'users'::regclass AND attnum > 0 AND NOT attisdropped AND attnotnull AND NOT atthasdef
  AND attname NOT IN ('id', 'name', 'email', 'created_at', 'updated_at', 'version')
