-- The owner of each idempotency key (velikiy/resources/idempotency.py:Key): the quota counts keys by owner. Keys of API
-- keys were stored behind the name of the API key and a space.
ALTER TABLE idempotency_keys ADD COLUMN owner text NOT NULL DEFAULT '';
UPDATE idempotency_keys SET owner = split_part(key, ' ', 1) WHERE key LIKE '% %';
CREATE INDEX idempotency_keys_by_owner ON idempotency_keys (owner, created_at);
