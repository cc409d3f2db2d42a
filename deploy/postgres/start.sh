#!/bin/sh
# Bring the roles of an existing database up to date, then start PostgreSQL as its image does.
#
# The image runs create-database.sh only on the first start, and the superuser cannot log in over the network. So a
# database of an earlier version gets its second role here, by a server without listeners that runs the SQL and ends.
# It takes part of a second. After a crash it also does the recovery, which PostgreSQL then need not do again.
set -eu

if [ -s "$PGDATA/PG_VERSION" ]; then
    cat /etc/velikiy/roles.sql /etc/velikiy/grants.sql | postgres --single -j -D "$PGDATA" \
        -c config_file=/etc/velikiy/postgresql.conf -c exit_on_error=on -c log_min_messages=warning \
        -c velikiy.secrets=/run/secrets -c velikiy.app_role=velikiy velikiy > /dev/null
fi
exec docker-entrypoint.sh "$@"
