-- API keys (velikiy/keys/store.py). The token itself is known to its owner only.
CREATE TABLE api_keys (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL,
    scope text NOT NULL CHECK (scope IN ('read', 'write')),
    digest text NOT NULL UNIQUE,  -- SHA-256 of the token, in base64url
    shown text NOT NULL,          -- the beginning of the token, by which its owner recognises it
    created_at timestamptz NOT NULL DEFAULT date_trunc('second', now()),
    expires_at timestamptz,
    last_used_at timestamptz,
    revoked_at timestamptz,
    replaced boolean NOT NULL DEFAULT false  -- by a rotation; the key is valid until the overlap is over
);
CREATE UNIQUE INDEX api_keys_one_current_of_a_name ON api_keys (name) WHERE revoked_at IS NULL AND NOT replaced;

-- SQL from outside: the relay drops every path, because the path of a key contains its digest.
CREATE TRIGGER keys_changed AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON api_keys FOR EACH STATEMENT
    WHEN (current_setting('velikiy.passes_gate', true) IS DISTINCT FROM 'on' OR pg_trigger_depth() > 0)
    EXECUTE FUNCTION rows_replicated();
