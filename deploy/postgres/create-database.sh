#!/bin/sh
# Create the app's role, which has no rights over the server, and its database. On the first start the PostgreSQL image
# runs this script as the superuser, through the socket.
#
# The image requires a password for the superuser. The script removes that password, so that a reader of the secrets
# folder cannot become superuser over the network. Inside the container `psql -U postgres` needs no password.
set -eu

psql -v ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" --no-password --no-psqlrc --quiet \
    -v password="$(cat /run/secrets/app_password)" <<'SQL'
CREATE ROLE velikiy LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE PASSWORD :'password';
CREATE DATABASE velikiy OWNER velikiy;
REVOKE ALL ON DATABASE velikiy FROM PUBLIC;
ALTER ROLE CURRENT_USER PASSWORD NULL;
SQL
