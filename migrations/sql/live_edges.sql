-- An edge answers from its entries for as long as its lease lasts, and a write invalidates only edges that have a row. So
-- a row that SQL from outside deletes is fenced instead: the next write waits until no lease is left, the edge registers
-- again, and the relay deletes a row that no edge claims. Edges that are excluded have no lease; an edge that resigns is
-- excluded first (velikiy/coherence/membership.py:resign).
CREATE FUNCTION live_edge_stays() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('UPDATE %s SET fenced_at = coalesce(fenced_at, clock_timestamp()) WHERE name = $1', TG_RELID::regclass)
        USING OLD.name;
    RETURN NULL;
END
$$;

CREATE TRIGGER live_edge_stays BEFORE DELETE ON caches FOR EACH ROW
    WHEN (OLD.kind = 'edge' AND NOT OLD.excluded) EXECUTE FUNCTION live_edge_stays();

CREATE FUNCTION caches_stay() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'edges may hold leases, so the table % cannot be truncated', TG_TABLE_NAME
        USING HINT = 'Delete the rows: edges then register again.';
END
$$;

CREATE TRIGGER caches_stay BEFORE TRUNCATE ON caches EXECUTE FUNCTION caches_stay();

-- Also in sessions with session_replication_role = replica.
ALTER TABLE caches ENABLE ALWAYS TRIGGER live_edge_stays;
ALTER TABLE caches ENABLE ALWAYS TRIGGER caches_stay;
