-- The first groups of rows whose e-mails are equal: the ids of each, as `3, 5`.
SELECT string_agg(id::text, ', ' ORDER BY id) FROM users GROUP BY folded(email) HAVING count(*) > 1
ORDER BY min(id) LIMIT 20
