-- The extension provides indexes on trigrams, which the search uses.
CREATE EXTENSION IF NOT EXISTS pg_trgm;

-- The words of a text, each after a space: `words LIKE '%' || words('Ali') || '%'` matches a text with a word that
-- begins with "Ali". A text without letters and digits has no words; the result is null, which matches nothing.
CREATE FUNCTION words(value text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN
    nullif(rtrim(regexp_replace(' ' || lower(normalize(value, NFKC)), '[^[:alnum:]]+', ' ', 'g')), '');
