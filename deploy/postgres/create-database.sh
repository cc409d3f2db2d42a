#!/bin/sh
# Create the database of the app and its roles. On the first start the PostgreSQL image runs this script as the superuser,
# through the socket.
#
# The image requires a password for the superuser. The script removes that password, so that a reader of the secrets
# folder cannot become superuser over the network. Inside the container `psql -U postgres` needs no password.
set -eu

as_superuser() {
    psql -v ON_ERROR_STOP=1 --username "$POSTGRES_USER" --no-password --no-psqlrc --quiet "$@"
}

as_superuser --dbname "$POSTGRES_DB" <<'SQL'
CREATE DATABASE velikiy;
REVOKE ALL ON DATABASE velikiy FROM PUBLIC;
ALTER ROLE CURRENT_USER PASSWORD NULL;
SQL
PGOPTIONS="-c velikiy.secrets=/run/secrets" as_superuser --dbname velikiy --file /etc/velikiy/roles.sql
