-- Responses to requests with an Idempotency-Key (velikiy/resources/idempotency.py).
CREATE TABLE idempotency_keys (
    key text PRIMARY KEY,
    request bytea NOT NULL,  -- a digest of the request
    response json NOT NULL,  -- unlike jsonb, json keeps the order of members: a replay equals the first response
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX idempotency_keys_by_created_at ON idempotency_keys (created_at);
