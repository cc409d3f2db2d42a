#!/usr/bin/env bash
# Run eight checks against a running stack, only with curl: ./test_app.sh [BASE_URL]
# Without an address, check the stack that ./run started, else http://localhost. The script deletes the users that it
# creates.
set -uo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" || exit

base=${1:-}
if [ -z "$base" ]; then
    base=$(./run status --json 2> /dev/null | grep -A1 '"edges": \[' | grep -o 'https\?://[^"]*')
fi
base=${base:-http://localhost}
base=${base%/}

case $base in -h | --help | -*)
    echo "usage: ./test_app.sh [BASE_URL]"
    exit
    ;;
esac

# The own machine is reached without a proxy, and so is the stack that ./run started, whatever its address.
direct=localhost,127.0.0.1,::1
if [ $# -eq 0 ]; then host=${base#*://} direct=$direct,${host%:*}; fi
# The certificate of the own stack names its public host, or signs itself. Another address is checked by curl's rules:
# CURL_CA_BUNDLE=cert.pem ./test_app.sh https://localhost:8443
trust=()
if [ $# -eq 0 ]; then trust=(--insecure); fi
no_proxy=$direct,${no_proxy:-${NO_PROXY:-}}
export no_proxy NO_PROXY=$no_proxy

unique="$(date +%s)-$$"
made=()
passed=0
failed=0
file=$(mktemp)

clean_up() {
    for id in "${made[@]}"; do
        curl -s "${trust[@]}" -o /dev/null -X DELETE "$base/users/$id"
    done
    rm -f "$file"
}
trap clean_up EXIT

# Send a request. Set $status, $body and $headers to the parts of the response.
request() {
    local response
    response=$(curl -sS "${trust[@]}" -m 15 -D "$file" -w '\n%{http_code}' "$@" 2>&1)
    status=${response##*$'\n'}
    body=${response%$'\n'*}
    headers=$(tr -d '\r' < "$file")
}

header() { printf '%s\n' "$headers" | sed -n "s/^$1: //Ip" | head -n 1; }

create() {  # $1: a name; sets $id
    request -X POST "$base/users" -H 'Content-Type: application/json' -d "{\"name\": \"$1\", \"email\": \"$1@example.com\"}"
    id=$(printf '%s' "$body" | grep -oE '"id": ?[0-9]+' | grep -oE '[0-9]+')
    if [ -n "$id" ]; then made+=("$id"); fi
}

# Return whether a page of the list contains the name.
list_contains() {
    local page=/users
    while [ -n "$page" ]; do
        request "$base$page"
        [ "$status" = 200 ] || return 1
        [[ $body == *"\"name\":\"$1\""* ]] && return
        page=$(header Link | sed -n 's/.*<\([^>]*\)>; *rel="next".*/\1/p')
    done
    return 1
}

reads()   { request "$base/users/$id" && [ "$status" = 200 ] && [[ $body == *"\"name\":\"$1\""* ]]; }
is_gone() { request "$base/users/$id" && [ "$status" = 404 ]; }

is_cached() {  # after a write, the app sends the first response, and Nginx stores it and sends the second
    local until=$((SECONDS + 5)) first
    while :; do
        rename "renamed-$unique" && request "$base/users/$id"
        first=$(header X-Cache-Status)
        # For a moment after its start, and while it cannot reach an app, an edge does not use its cache.
        [ "$first" = BYPASS ] && [ $SECONDS -lt $until ] || break
        sleep 0.2
    done
    request "$base/users/$id"
    [ "$first" = MISS ] && [ "$(header X-Cache-Status)" = HIT ]
}

check() {
    local name=$1
    shift
    if "$@"; then
        passed=$((passed + 1))
        echo "ok      $name"
    else
        failed=$((failed + 1))
        echo "FAILED  $name"
        echo "        last response: ${status:-none} $(printf '%.300s' "${body:-}")"
    fi
}

created() { create "test-$unique" && [ "$status" = 201 ] && [ -n "$id" ]; }
rename() {
    request -X PUT "$base/users/$id" -H 'Content-Type: application/json' -d "{\"name\": \"$1\"}"
    [ "$status" = 200 ]
}
updated() { reads "test-$unique" && rename "renamed-$unique" && reads "renamed-$unique"; }
listed()  { create "second-$unique" && list_contains "second-$unique"; }
deleted() { request -X DELETE "$base/users/$id" && [ "$status" = 200 ]; }

echo "$base"
request "$base/users"
if [ "$status" = 000 ]; then
    echo "no response from $base. Start a stack with ./run up or docker compose up." >&2
    exit 1
fi
check "the list contains Alice, who is in every new database"  list_contains Alice
check "POST creates a user and returns its id"         created
check "GET returns the new user"                              reads "test-$unique"
check "PUT changes the user, and the next read shows the change"     updated
check "after a write, Nginx reports MISS, then HIT"     is_cached
check "a new user is in the list immediately"              listed
check "DELETE deletes the user"                              deleted
check "the next read is a 404"                         is_gone

echo "$passed of $((passed + failed)) checks passed"
[ "$failed" -eq 0 ]
