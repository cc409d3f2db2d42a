-- The progress of imports that have not ended (velikiy/bulk/importer.py).
CREATE TABLE imports (
    resource text NOT NULL,
    begins_with bytea NOT NULL,  -- a digest of the first bytes of the file
    lines bigint NOT NULL,
    so_far bytea NOT NULL,       -- a digest of these lines
    imported bigint NOT NULL,
    rejected bigint NOT NULL,
    rejects_size bigint NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (resource, begins_with)
);
