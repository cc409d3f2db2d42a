#!/usr/bin/env bash
# ./run check: all checks that need no running server. $1: the folder of the tools.
set -uo pipefail
tools=$1
failed=()

check() {
    local name=$1
    shift
    if output=$("$@" 2>&1); then
        echo "ok      $name"
    else
        failed+=("$name")
        printf 'FAILED  %s\n%s\n' "$name" "$output"
    fi
}

edge=$(mktemp -d)
trap 'rm -rf "$edge"' EXIT
export EDGE_SECRET=only-for-checks-0 EDGE_DATA=$edge EDGE_APPS=127.0.0.1:5000 EDGE_LISTEN=127.0.0.1:8080
mapfile -t images < <(git ls-files --cached --others --exclude-standard -- 'Dockerfile' '*/Dockerfile')
mapfile -t scripts < <(git ls-files --cached --others --exclude-standard -- ':!*.md' | xargs grep -lE '^#!.*\b(ba)?sh$')

check "ruff"        "$tools/ruff" check .
check "ruff format" "$tools/ruff" format --check .
check "bandit"      "$tools/bandit" --quiet --recursive --configfile pyproject.toml -ll -ii velikiy migrations
check "mypy"        "$tools/python" -m mypy
check "import-linter" "$tools/lint-imports" --no-cache
check "shellcheck"  "$tools/shellcheck" -x "${scripts[@]}"
check "hadolint"    "$tools/hadolint" "${images[@]}"
check "nginx -t"    edge/start -t
check "gixy"        "$tools/gixy" "$edge/nginx.conf"
check "luacheck"    luacheck --no-color --std ngx_lua --max-line-length 120 edge
check "luacheck, load" luacheck --no-color --std luajit --max-line-length 120 --read-globals number \
                       --globals setup init 'done' request counts recorded late -- bench/load

# The database of known vulnerabilities is on the Internet. A mirror of packages may have none.
audit=$(timeout 120 "$tools/pip-audit" --disable-pip --require-hashes --progress-spinner off -r requirements.txt 2>&1)
case $audit in
    *"Found "*" known vulnerabilit"*)
        failed+=("pip-audit")
        printf 'FAILED  pip-audit\n%s\n' "$audit"
        ;;
    *"could not be audited"* | "" | *rror*) echo "skipped pip-audit: no database of vulnerabilities is reachable" ;;
    *) echo "ok      pip-audit" ;;
esac

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
