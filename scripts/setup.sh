# Sourced by scripts/demo and scripts/test: installs what is missing. Needs only a shell, Python >= 3.11 and apt.
# shellcheck shell=sh

say() { printf '\033[1m==> %s\033[0m\n' "$*" >&2; }
[ -t 2 ] || say() { printf '==> %s\n' "$*" >&2; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null 2>&1; then sudo "$@"; else
        echo "error: root is needed for: $*" >&2
        echo "hint: run it as root, or install sudo" >&2
        exit 1
    fi
}

# apt_install PACKAGE...: those that are not installed yet.
apt_install() {
    missing=
    for package in "$@"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    command -v apt-get >/dev/null 2>&1 || {
        echo "error: not a Debian or Ubuntu machine; missing:$missing" >&2
        exit 1
    }
    say "installing system packages:$missing"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get update -q >/dev/null
    # shellcheck disable=SC2086 # a list of words
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing >/dev/null
}

# python_environment LOCK: a virtual environment in .venv with what the lock file names, and Capsem itself, editable.
python_environment() {
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: Python 3.11 or newer is needed, $("$python" --version) was found" >&2
        echo "hint: set PYTHON to a newer one" >&2
        exit 1
    }
    stamp=.venv/.installed-$(basename "$1")
    if [ ! -e "$stamp" ] || [ "$1" -nt "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
        "$python" -c 'import venv, ensurepip' 2>/dev/null || apt_install python3-venv
        [ -x .venv/bin/python ] || "$python" -m venv .venv
        say "installing Python packages"
        .venv/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r "$1"
        .venv/bin/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
        touch "$stamp"
    fi
    PATH=$PWD/.venv/bin:$PATH
    export PATH
}

system_packages() {
    # shellcheck disable=SC2046 # a list of words
    apt_install $(sed 's/#.*//' scripts/packages.txt)
}
