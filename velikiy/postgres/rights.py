"""The rights that the role of the apps needs. migrations/sql/grants.sql grants them."""

from collections.abc import Sequence

import psycopg

HISTORY_TABLE = "row_history"

CACHED_TABLES = ("api_keys", HISTORY_TABLE)
"""The tables of the service whose rows are cached: SQL from outside that changes them invalidates every path."""

SERVICE_TABLES = ("caches", "idempotency_keys", "imports", *CACHED_TABLES)
"""The tables of the service, besides those of the resources."""

MISSING = """
WITH needed AS (
    SELECT privilege, name, to_regclass(name)::oid AS id
    FROM unnest(%s::text[]) name, unnest('{SELECT,INSERT,UPDATE,DELETE}'::text[]) privilege
)
SELECT privilege || ' on ' || name FROM needed WHERE NOT has_table_privilege(id, privilege)
UNION ALL
SELECT 'USAGE on ' || objid::regclass
FROM (SELECT DISTINCT id FROM needed) its_table
JOIN pg_depend ON classid = 'pg_class'::regclass AND refclassid = 'pg_class'::regclass
    AND refobjid = id AND deptype IN ('a', 'i')
JOIN pg_class ON pg_class.oid = objid AND relkind = 'S'
WHERE NOT has_sequence_privilege(objid, 'USAGE')
"""


def missing_rights(connection: psycopg.Connection, resources: Sequence[str]) -> list[str]:
    """Return the rights that the role of this session lacks on tables that exist, such as `UPDATE on users`."""
    rows = connection.execute(MISSING, ([*resources, *SERVICE_TABLES],)).fetchall()
    return [right for (right,) in rows]
