-- The common part of a new and of an adopted table. The checks repeat those of the API, for SQL from outside.
ALTER TABLE users
    ALTER COLUMN updated_at SET NOT NULL,
    ALTER COLUMN updated_at SET DEFAULT now(),
    ALTER COLUMN version SET NOT NULL,
    ALTER COLUMN version SET DEFAULT 1,
    ADD CONSTRAINT users_name_length CHECK (char_length(name) BETWEEN 1 AND 100),
    ADD CONSTRAINT users_email_length CHECK (char_length(email) BETWEEN 1 AND 254);

-- A column besides the index, because PostgreSQL keeps statistics of a column. They decide between the index of the
-- words and the index of the order, and the words are not computed again.
ALTER TABLE users ADD COLUMN words text GENERATED ALWAYS AS (words(name || ' ' || email)) STORED;

CREATE UNIQUE INDEX users_email_caseless ON users (lower(email));
CREATE INDEX users_words ON users USING gin (words gin_trgm_ops);
CREATE INDEX users_by_name ON users ((name COLLATE "und-x-icu"), id);
CREATE INDEX users_by_created_at ON users (created_at, id);

CALL make_resource('users');
