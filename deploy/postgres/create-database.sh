#!/bin/sh
# On the first start the PostgreSQL image runs this as the superuser, through the socket: the app gets a role
# without rights over the server, and a database that is its own. The superuser's password, which the image
# insists on, is taken away again: over the network nobody is superuser, whoever reads the secrets folder; inside
# the container `psql -U postgres` needs none.
set -eu

psql -v ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" --no-password --no-psqlrc --quiet \
    -v password="$(cat /run/secrets/app_password)" <<'SQL'
CREATE ROLE velikiy LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE PASSWORD :'password';
CREATE DATABASE velikiy OWNER velikiy;
REVOKE ALL ON DATABASE velikiy FROM PUBLIC;
ALTER ROLE CURRENT_USER PASSWORD NULL;
SQL
