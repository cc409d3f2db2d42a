#!/bin/sh
# As in the official image: options without a command are for redis-server, and other users cannot read its files.
set -eu
if [ "${1#-}" != "$1" ] || [ "${1%.conf}" != "$1" ]; then
    set -- redis-server "$@"
fi
umask 0077
exec "$@"
