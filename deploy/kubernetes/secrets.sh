#!/bin/sh
# Create the Secrets of the service, one for each part with what that part needs (docs/kubernetes.md). Argument: a
# folder with the files that `velikiy secrets` writes. Further runs replace the Secrets.
set -eu

folder=${1:?"usage: deploy/kubernetes/secrets.sh FOLDER"}
namespace=velikiy

# Arguments: the name of the part, and its files.
create() {
    name=$1
    shift
    for file in "$@"; do
        shift
        set -- "$@" "--from-file=$folder/$file"
    done
    kubectl --namespace "$namespace" create secret generic "$name" "$@" --dry-run=client --output yaml \
        | kubectl apply -f -
}

# The migration also reads the name of the apps' role, in database_url. Without a role of its own it needs nothing else.
if [ -e "$folder/migration_database_url" ]; then
    create migrate migration_database_url database_url
else
    create migrate database_url
fi
create app database_url redis_url edge_secret
create relay database_url redis_url edge_secret
create edge redis_url edge_secret
# Only the overlay trial has these two servers.
if [ -e "$folder/postgres_password" ]; then
    create postgres postgres_password owner_password app_password
    create redis redis.conf
fi
