#!/usr/bin/env bash
# Eight checks against a running stack, with nothing but curl: ./test_app.sh [BASE_URL]
# Without an address: the stack that ./run started, else http://localhost. Leaves no user behind.
set -uo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" || exit

base=${1:-}
if [ -z "$base" ]; then
    base=$(./run status --json 2> /dev/null | grep -A1 '"edges": \[' | grep -o 'http://[^"]*')
fi
base=${base:-http://localhost}
base=${base%/}

case $base in -h | --help | -*)
    echo "usage: ./test_app.sh [BASE_URL]"
    exit
    ;;
esac

patience=10  # seconds; Nginx' copies run out after EDGE_TTL, 5 s
unique="$(date +%s)-$$"
made=()
passed=0
failed=0
file=$(mktemp)

clean_up() {
    for id in "${made[@]}"; do
        curl -s -o /dev/null -X DELETE "$base/users/$id"
    done
    rm -f "$file"
}
trap clean_up EXIT

# Leaves the status in $status, the body in $body, the headers in $headers.
request() {
    local answer
    answer=$(curl -sS -m 15 -D "$file" -w '\n%{http_code}' "$@" 2>&1)
    status=${answer##*$'\n'}
    body=${answer%$'\n'*}
    headers=$(tr -d '\r' < "$file")
}

header() { printf '%s\n' "$headers" | sed -n "s/^$1: //Ip" | head -n 1; }

create() {  # $1: a name; leaves the id in $id
    request -X POST "$base/users" -H 'Content-Type: application/json' -d "{\"name\": \"$1\", \"email\": \"$1@example.com\"}"
    id=$(printf '%s' "$body" | grep -oE '"id": ?[0-9]+' | grep -oE '[0-9]+')
    if [ -n "$id" ]; then made+=("$id"); fi
}

within() {  # repeats a check until it holds, for as long as a stored copy may live
    local until=$((SECONDS + patience))
    until "$@"; do
        [ $SECONDS -lt $until ] || return 1
        sleep 0.2
    done
}

# Follows the pages of a long list.
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

before=
is_cached() {  # the last answer was stored, and this one is the copy
    local last=$before
    request "$base/users/$id"
    before=$(header X-Cache-Status)
    [[ $last =~ ^(MISS|EXPIRED)$ ]] && [ "$before" = HIT ]
}

check() {
    local what=$1
    shift
    if "$@"; then
        passed=$((passed + 1))
        echo "ok      $what"
    else
        failed=$((failed + 1))
        echo "FAILED  $what"
        echo "        last answer: ${status:-none} $(printf '%.300s' "${body:-}")"
    fi
}

created() { create "test-$unique" && [ "$status" = 201 ] && [ -n "$id" ]; }
updated() {
    request -X PUT "$base/users/$id" -H 'Content-Type: application/json' -d "{\"name\": \"renamed-$unique\"}"
    [ "$status" = 200 ] && within reads "renamed-$unique"
}
listed()  { create "second-$unique" && within list_contains "second-$unique"; }
deleted() { request -X DELETE "$base/users/$id" && [ "$status" = 200 ]; }

echo "$base"
request "$base/users"
if [ "$status" = 000 ]; then
    echo "nobody answers there; ./run up or docker compose up starts a stack" >&2
    exit 1
fi
check "the list contains Alice"                        list_contains Alice
check "POST creates a user and returns its id"         created
check "GET reads it back"                              reads "test-$unique"
check "PUT changes it, and the new value is read"      updated
check "Nginx: MISS or EXPIRED, then HIT"               within is_cached
check "a new user appears in the list"                 listed
check "DELETE deletes it"                              deleted
check "it is 404 afterwards"                           within is_gone

echo "$passed of $((passed + failed)) checks passed"
[ "$failed" -eq 0 ]
