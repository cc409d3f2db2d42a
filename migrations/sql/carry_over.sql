-- From revision 0003_resources, the last one before the baseline. resources.sql and carry_over_triggers.sql follow.
ALTER TABLE caches RENAME COLUMN left_out TO excluded;
ALTER TABLE idempotency_keys RENAME COLUMN answer TO response;

CREATE TEMPORARY TABLE resources ON COMMIT DROP AS
    SELECT DISTINCT tgrelid::regclass AS name FROM pg_trigger WHERE tgfoid = 'rows_notify'::regproc;
DROP PROCEDURE make_resource;
DROP FUNCTION row_changed, rows_notify CASCADE;  -- with their triggers
