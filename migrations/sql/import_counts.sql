-- The columns of velikiy/bulk/importer.py:Progress that the baseline lacks. Progress of an earlier version has no digest
-- of its rejected rows, so an import that continues it leaves their file as it is and begins another.
ALTER TABLE imports
    ADD COLUMN updated bigint NOT NULL DEFAULT 0,
    ADD COLUMN unchanged bigint NOT NULL DEFAULT 0,
    ADD COLUMN skipped bigint NOT NULL DEFAULT 0,
    ADD COLUMN rejects_digest bytea NOT NULL DEFAULT '';
