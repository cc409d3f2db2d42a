#!/bin/bash
# Do what this project needs from the official image's entrypoint, in the official order: run initdb with the
# superuser's password from a file, require a password on every network connection, run the scripts of
# /docker-entrypoint-initdb.d against a server that listens only on its socket, then start the real server.
set -euo pipefail

if [ "$(id -u)" = 0 ]; then
    echo "this stand-in runs as the user postgres (70) only" >&2
    exit 1
fi

start_for_scripts=("$@" -c "listen_addresses=" -p 5432)
if [ "$1" = postgres ] && [ ! -s "$PGDATA/PG_VERSION" ]; then
    PGPASSWORD="$(cat "$POSTGRES_PASSWORD_FILE")"
    export PGPASSWORD POSTGRES_USER=postgres POSTGRES_DB=postgres
    eval 'initdb --username=postgres --pwfile=<(printf "%s\n" "$PGPASSWORD") '"${POSTGRES_INITDB_ARGS:-}"
    printf '\nhost all all all scram-sha-256\n' >> "$PGDATA/pg_hba.conf"
    pg_ctl -D "$PGDATA" -o "$(printf '%q ' "${start_for_scripts[@]:1}")" -w start
    for script in /docker-entrypoint-initdb.d/*; do
        # shellcheck disable=SC1090
        case "$script" in
            *.sh) if [ -x "$script" ]; then "$script"; else . "$script"; fi ;;
            *.sql) psql -v ON_ERROR_STOP=1 --username postgres --no-password --no-psqlrc -f "$script" ;;
        esac
    done
    pg_ctl -D "$PGDATA" -m fast -w stop
    unset PGPASSWORD
fi

exec "$@"
