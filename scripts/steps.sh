# Sourced by the demos, after setup.sh: steps that are shown with what they took, in a home of their own.
# shellcheck shell=sh

# own_home: everything of a demo lives in a directory of its own, $home, and is gone afterwards. $helper is a process to end.
own_home() {
    home=$(mktemp -d)
    helper=
    CAPSEM_HOME=$home
    CAPSEM_RUN_DIR=$home/run
    export CAPSEM_HOME CAPSEM_RUN_DIR
    trap cleanup EXIT
    trap 'exit 130' INT TERM
}
cleanup() {
    [ ! -f "$home/run/service.pid" ] || kill "$(cat "$home/run/service.pid")" 2>/dev/null || :
    [ -z "$helper" ] || kill "$helper" 2>/dev/null || :
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        [ -f "$home/run/service.pid" ] || break
        sleep 0.3
    done
    rm -rf "$home"
}

now() { python -c 'import time; print(time.monotonic_ns() // 1000000)'; }
# step TEXT COMMAND...: runs it, shows its output and what it took.
step() {
    text=$1
    shift
    printf '\n%s\n    $' "$text"
    printf ' %s' "$@"
    printf '\n'
    began=$(now)
    "$@" >"$home/out" 2>&1 || {
        code=$?
        sed 's/^/    /' "$home/out"
        fail "exit code $code"
    }
    sed 's/^/    /' "$home/out"
    printf '    (%s ms)\n' "$(($(now) - began))"
}
fail() {
    echo "demo: failed: $1" >&2
    exit 1
}
expect() { [ "$(cat "$home/out")" = "$1" ] || fail "expected '$1'"; }
# saying TEXT: what the last step showed has it somewhere.
saying() { grep -qF -- "$1" "$home/out" || fail "expected to read '$1'"; }
