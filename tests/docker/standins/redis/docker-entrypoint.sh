#!/bin/sh
# As in the official image: options alone mean redis-server, and what it writes is readable by it only.
set -eu
if [ "${1#-}" != "$1" ] || [ "${1%.conf}" != "$1" ]; then
    set -- redis-server "$@"
fi
umask 0077
exec "$@"
