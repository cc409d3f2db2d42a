-- A database of the last development version (revision 0003_resources), as pg_dump wrote it: its schema, three users of
-- which one was written twice, a stored response, and an import that has not ended.
SELECT pg_catalog.set_config('search_path', '', false);
CREATE EXTENSION IF NOT EXISTS pg_trgm WITH SCHEMA public;
CREATE PROCEDURE public.make_resource(IN resource regclass)
    LANGUAGE plpgsql
    AS $_$
        DECLARE
            -- From outside is also what other triggers and foreign keys write, in whosever transaction: of a table
            -- that a write reaches through them the app knows nothing.
            outside text := $when$WHEN (current_setting('velikiy.fenced', true) IS DISTINCT FROM 'on'
                OR pg_trigger_depth() > 0) EXECUTE FUNCTION rows_notify()$when$;
        BEGIN
            EXECUTE format('ALTER TABLE %s '
                'ADD COLUMN IF NOT EXISTS created_at timestamptz NOT NULL DEFAULT now(), '
                'ADD COLUMN IF NOT EXISTS updated_at timestamptz NOT NULL DEFAULT now(), '
                'ADD COLUMN IF NOT EXISTS version bigint NOT NULL DEFAULT 1, '
                'ADD CHECK (created_at BETWEEN ''0001-01-02'' AND ''9999-12-30''), '
                'ADD CHECK (updated_at BETWEEN ''0001-01-02'' AND ''9999-12-30'')', resource);
            EXECUTE format('CREATE TRIGGER row_changed BEFORE UPDATE ON %s '
                'FOR EACH ROW EXECUTE FUNCTION row_changed()', resource);
            EXECUTE format('CREATE TRIGGER rows_inserted AFTER INSERT ON %s '
                'REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT %s', resource, outside);
            EXECUTE format('CREATE TRIGGER rows_updated AFTER UPDATE ON %s '
                'REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT %s', resource, outside);
            EXECUTE format('CREATE TRIGGER rows_deleted AFTER DELETE ON %s '
                'REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT %s', resource, outside);
            EXECUTE format('CREATE TRIGGER rows_truncated AFTER TRUNCATE ON %s '
                'FOR EACH STATEMENT %s', resource, outside);
        END
        $_$;
CREATE FUNCTION public.row_changed() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
        BEGIN
            NEW.version := OLD.version + 1;
            NEW.updated_at := clock_timestamp();
            RETURN NEW;
        END
        $$;
CREATE FUNCTION public.rows_notify() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
        DECLARE
            ids bigint[];
            first int;
        BEGIN
            IF TG_OP = 'TRUNCATE' THEN
                PERFORM pg_notify('velikiy', TG_TABLE_NAME || ' *');
                RETURN NULL;
            ELSIF TG_OP = 'UPDATE' THEN
                ids := ARRAY(SELECT id FROM old_rows UNION SELECT id FROM new_rows LIMIT 1001);
            ELSIF TG_OP = 'DELETE' THEN
                ids := ARRAY(SELECT id FROM old_rows LIMIT 1001);
            ELSE
                ids := ARRAY(SELECT id FROM new_rows LIMIT 1001);
            END IF;
            IF cardinality(ids) > 1000 THEN
                PERFORM pg_notify('velikiy', TG_TABLE_NAME || ' *');
                RETURN NULL;
            END IF;
            FOR first IN SELECT generate_series(1, cardinality(ids), 300) LOOP
                PERFORM pg_notify(
                    'velikiy', TG_TABLE_NAME || ' ' || array_to_string(ids[first : first + 299], ' '));
            END LOOP;
            RETURN NULL;
        END
        $$;
CREATE FUNCTION public.words(value text) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN NULLIF(rtrim(regexp_replace((' '::text || lower(NORMALIZE(value, NFKC))), '[^[:alnum:]]+'::text, ' '::text, 'g'::text)), ''::text);
CREATE TABLE public.caches (
    name text NOT NULL,
    kind text NOT NULL,
    address text NOT NULL,
    epoch text NOT NULL,
    renewed_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    fenced_at timestamp with time zone,
    left_out boolean DEFAULT false NOT NULL,
    CONSTRAINT caches_kind_check CHECK ((kind = ANY (ARRAY['edge'::text, 'redis'::text])))
)
WITH (fillfactor='50');
CREATE TABLE public.idempotency_keys (
    key text NOT NULL,
    request bytea NOT NULL,
    answer json NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL
);
CREATE TABLE public.imports (
    resource text NOT NULL,
    begins_with bytea NOT NULL,
    lines bigint NOT NULL,
    so_far bytea NOT NULL,
    imported bigint NOT NULL,
    rejected bigint NOT NULL,
    rejects_size bigint NOT NULL,
    updated_at timestamp with time zone DEFAULT now() NOT NULL
);
CREATE TABLE public.users (
    id bigint NOT NULL,
    name text NOT NULL,
    email text NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    updated_at timestamp with time zone DEFAULT now() NOT NULL,
    version bigint DEFAULT 1 NOT NULL,
    words text GENERATED ALWAYS AS (public.words(((name || ' '::text) || email))) STORED,
    CONSTRAINT users_created_at_check CHECK (((created_at >= '0001-01-02 00:00:00+00'::timestamp with time zone) AND (created_at <= '9999-12-30 00:00:00+00'::timestamp with time zone))),
    CONSTRAINT users_email_length CHECK (((char_length(email) >= 1) AND (char_length(email) <= 254))),
    CONSTRAINT users_name_length CHECK (((char_length(name) >= 1) AND (char_length(name) <= 100))),
    CONSTRAINT users_updated_at_check CHECK (((updated_at >= '0001-01-02 00:00:00+00'::timestamp with time zone) AND (updated_at <= '9999-12-30 00:00:00+00'::timestamp with time zone)))
);
ALTER TABLE public.users ALTER COLUMN id ADD GENERATED BY DEFAULT AS IDENTITY (
    SEQUENCE NAME public.users_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);
CREATE TABLE public.velikiy_version (
    version_num character varying(32) NOT NULL
);
INSERT INTO public.caches VALUES ('redis', 'redis', '', '00000000-0000-4000-8000-000000000000', '2026-11-28 05:55:46.893963+00', NULL, false);
INSERT INTO public.idempotency_keys VALUES ('kept', '\x01', '{"status":201}', '2026-11-28 05:55:48.789856+00');
INSERT INTO public.imports VALUES ('users', '\x01', 1, '\x02', 1, 0, 0, '2026-11-28 05:55:48.789856+00');
INSERT INTO public.users VALUES (1, 'Alice', 'alice@example.com', '2026-11-28 05:55:46.878245+00', '2026-11-28 05:55:46.878245+00', 1, DEFAULT);
INSERT INTO public.users VALUES (3, 'Charlie', 'charlie@example.com', '2026-11-28 05:55:46.878245+00', '2026-11-28 05:55:46.878245+00', 1, DEFAULT);
INSERT INTO public.users VALUES (2, 'Carried', 'bob@example.com', '2026-11-28 05:55:46.878245+00', '2026-11-28 05:55:48.791597+00', 2, DEFAULT);
INSERT INTO public.velikiy_version VALUES ('0003_resources');
SELECT pg_catalog.setval('public.users_id_seq', 3, true);
ALTER TABLE ONLY public.caches
    ADD CONSTRAINT caches_pkey PRIMARY KEY (name);
ALTER TABLE ONLY public.idempotency_keys
    ADD CONSTRAINT idempotency_keys_pkey PRIMARY KEY (key);
ALTER TABLE ONLY public.imports
    ADD CONSTRAINT imports_pkey PRIMARY KEY (resource, begins_with);
ALTER TABLE ONLY public.users
    ADD CONSTRAINT users_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.velikiy_version
    ADD CONSTRAINT velikiy_version_pkc PRIMARY KEY (version_num);
CREATE INDEX idempotency_keys_by_created_at ON public.idempotency_keys USING btree (created_at);
CREATE INDEX users_by_created_at ON public.users USING btree (created_at, id);
CREATE INDEX users_by_name ON public.users USING btree (name COLLATE "und-x-icu", id);
CREATE UNIQUE INDEX users_email_caseless ON public.users USING btree (lower(email));
CREATE INDEX users_words ON public.users USING gin (words public.gin_trgm_ops);
CREATE TRIGGER row_changed BEFORE UPDATE ON public.users FOR EACH ROW EXECUTE FUNCTION public.row_changed();
CREATE TRIGGER rows_deleted AFTER DELETE ON public.users REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT WHEN (((current_setting('velikiy.fenced'::text, true) IS DISTINCT FROM 'on'::text) OR (pg_trigger_depth() > 0))) EXECUTE FUNCTION public.rows_notify();
CREATE TRIGGER rows_inserted AFTER INSERT ON public.users REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT WHEN (((current_setting('velikiy.fenced'::text, true) IS DISTINCT FROM 'on'::text) OR (pg_trigger_depth() > 0))) EXECUTE FUNCTION public.rows_notify();
CREATE TRIGGER rows_truncated AFTER TRUNCATE ON public.users FOR EACH STATEMENT WHEN (((current_setting('velikiy.fenced'::text, true) IS DISTINCT FROM 'on'::text) OR (pg_trigger_depth() > 0))) EXECUTE FUNCTION public.rows_notify();
CREATE TRIGGER rows_updated AFTER UPDATE ON public.users REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT WHEN (((current_setting('velikiy.fenced'::text, true) IS DISTINCT FROM 'on'::text) OR (pg_trigger_depth() > 0))) EXECUTE FUNCTION public.rows_notify();
