-- The ids of the first rows that no response could show, or that no request could have written.
SELECT id FROM users
WHERE id IS NULL OR id < 1
   OR name IS NULL OR char_length(name) NOT BETWEEN 1 AND 100
   OR email IS NULL OR char_length(email) NOT BETWEEN 1 AND 254
   OR lower(email) IN (SELECT lower(email) FROM users GROUP BY 1 HAVING count(*) > 1)
   OR id IN (SELECT id FROM users GROUP BY 1 HAVING count(*) > 1)
   OR NOT isfinite(created_at)
ORDER BY id LIMIT 20
