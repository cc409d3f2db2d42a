DROP INDEX users_email_caseless;
CREATE UNIQUE INDEX users_email_caseless ON users (folded(email));
