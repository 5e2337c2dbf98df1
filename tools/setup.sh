#!/usr/bin/env bash
# Creates the virtual environment of this checkout: finds a Python >= 3.12, creates .venv with it
# and installs this package with its development tools.
#
#   tools/setup.sh               set up; does nothing if the environment is complete and current
#   tools/setup.sh --find-only   print the Python that would be used; changes nothing
#
# Settings, all optional, from the environment:
#   PYTHON=/path/to/python3.12   use this Python only
#   VENV=.venv                   the directory of the environment
#   TORCH_INDEX_URL=URL          the package index for torch (e.g. one with CPU-only wheels)
#
# Safe to run again at any time: an interrupted set-up starts over, and an environment whose
# Python was removed is created again. Written for bash 3.2, the version of macOS.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV="${VENV:-.venv}"
readonly BEGUN="$VENV/.set-up-begun"
readonly COMPLETE="$VENV/.set-up-complete"
readonly LOG="$VENV/set-up.log"
readonly OLDEST_MINOR=12

# Prints one line: major, minor, status ("usable" or the reason why not), and the real executable
# behind pyenv shims and virtual environments (this script may delete its own environment).
readonly PROBE='
import sys
status = "usable"
if sys.version_info >= (3, 12):
    import sysconfig
    if sys.implementation.name != "cpython":
        status = sys.implementation.name
    elif sysconfig.get_config_var("Py_GIL_DISABLED"):
        status = "free-threaded"
    else:
        try:
            import ensurepip, venv
        except ImportError:
            status = "no-venv"
print("%d %d %s %s" % (sys.version_info[0], sys.version_info[1], status,
                       getattr(sys, "_base_executable", None) or sys.executable))
'

say() { printf 'setup: %s\n' "$*" >&2; }
die() {
    say "$@"
    exit 1
}

best=""          # the best executable so far
best_minor=999   # its minor version
best_source=""   # where it is from
rejected=""      # one line for each rejected Python, for the error message
lacks_venv=""    # the minor version of a Python that lacks only the venv module

# consider SOURCE COMMAND: use COMMAND if it runs, is new enough and better than the best so far.
# The lowest sufficient version wins: torch and megatron-core publish wheels for new Pythons late.
consider() {
    local source="$1" command="$2" answer major minor status executable
    # Only running it shows that it works: pyenv has shims for versions that are not selected.
    if ! answer="$("$command" -E -c "$PROBE" </dev/null 2>/dev/null)"; then
        rejected="$rejected  $command ($source): does not run"$'\n'
        return 0
    fi
    read -r major minor status executable <<<"$answer"
    if [[ "$major" != 3 || "$minor" -lt "$OLDEST_MINOR" ]]; then
        rejected="$rejected  $command ($source): is Python $major.$minor"$'\n'
    elif [[ "$status" == no-venv ]]; then
        rejected="$rejected  $command ($source): Python $major.$minor without its venv module"$'\n'
        lacks_venv="$minor"
    elif [[ "$status" != usable ]]; then
        rejected="$rejected  $command ($source): is a $status build"$'\n'
    elif [[ "$minor" -lt "$best_minor" ]]; then
        best="$executable"
        best_minor="$minor"
        best_source="$source"
    fi
}

consider_path() {
    local name command
    for name in python3.12 python3.13 python3.14 python3 python; do
        # All of them, not only the first: a broken shim may precede a working Python.
        while IFS= read -r command; do
            [[ -z "$command" ]] || consider "on PATH" "$command"
        done <<<"$(type -a -p "$name" 2>/dev/null || true)"
    done
}

consider_pyenv() {
    local command
    for command in "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/*/bin/python; do
        [[ ! -x "$command" ]] || consider "in a pyenv installation" "$command"
    done
}

consider_uv() {
    local version command
    command -v uv >/dev/null || return 0
    for version in 3.12 3.13 '>=3.12'; do
        # --system: not the environment that this script creates.
        command="$(uv python find --system "$version" </dev/null 2>/dev/null || true)"
        [[ -z "$command" ]] || consider "found by uv" "$command"
    done
}

explain_none() {
    say "no Python 3.$OLDEST_MINOR or newer on PATH, in pyenv or from uv."
    if [[ -n "$rejected" ]]; then
        printf 'Rejected:\n%s' "$rejected" >&2
    fi
    if [[ -n "$lacks_venv" ]]; then
        printf 'Install the missing module:\n  sudo apt install python3.%s-venv\n' \
            "$lacks_venv" >&2
        printf 'or another Python:\n' >&2
    else
        printf 'Install one of these:\n' >&2
    fi
    cat >&2 <<'END'
  Debian 13, Ubuntu 24.04:  sudo apt install python3 python3-venv
  pyenv:                    pyenv install 3.12
  uv:                       uv python install 3.12
  macOS (Homebrew):         brew install python@3.12
and run this again, or name an installed one: PYTHON=/path/to/python3.12 make setup
END
}

# Sets best and best_source, or prints the reason and exits.
find_python() {
    if [[ -n "${PYTHON:-}" ]]; then
        consider "named by PYTHON" "$PYTHON"
        if [[ -z "$best" ]]; then
            printf '%s' "$rejected" >&2
            [[ -z "$lacks_venv" ]] || say "install its venv module: sudo apt install python3.$lacks_venv-venv"
            die "PYTHON=$PYTHON cannot be used: a CPython 3.$OLDEST_MINOR or newer is needed." \
                "Correct PYTHON, or unset it to search for one."
        fi
    else
        consider_path
        consider_pyenv
        consider_uv
        if [[ -z "$best" && "$find_only" == no ]] && command -v uv >/dev/null; then
            say "no Python 3.$OLDEST_MINOR or newer is installed; installing one with uv"
            uv python install 3.12 >&2 </dev/null || true
            consider_uv
        fi
        if [[ -z "$best" ]]; then
            explain_none
            exit 1
        fi
    fi
    say "Python 3.$best_minor $best_source: $best"
    [[ "$best_minor" -le 13 ]] ||
        say "megatron-core has no wheel for Python 3.$best_minor: a C++ compiler is needed"
}

# The inputs of the installation: if one changes, the packages are installed again.
fingerprint() { printf '%s\n%s\n' "$(cksum <pyproject.toml)" "$PWD"; }

venv_runs() {
    "$VENV/bin/python" -c "import sys; sys.exit(sys.version_info < (3, $OLDEST_MINOR))" \
        </dev/null >/dev/null 2>&1
}

create_venv() {
    if [[ -e "$VENV" && ! -e "$BEGUN" && ! -e "$VENV/pyvenv.cfg" ]]; then
        die "$VENV exists and is not a virtual environment; remove it or set VENV to another directory"
    fi
    find_python
    rm -rf "$VENV"
    mkdir -p "$VENV"
    touch "$BEGUN"
    "$best" -m venv "$VENV" || die "$best could not create a virtual environment in $VENV"
}

# pip_install ARGUMENT...: run pip; prints only large downloads and the last step.
pip_install() {
    "$VENV/bin/python" -m pip install --disable-pip-version-check --progress-bar off "$@" \
        </dev/null 2>&1 | tee -a "$LOG" | awk '
            /Downloading .*\(([0-9.]+ GB|[0-9][0-9][0-9]\.[0-9]+ MB)\)/ { print "  " $2, $3, $4 }
            /^Installing collected packages/ { print "  installing", NF - 3, "packages" }
            { fflush() }' >&2 && return 0
    tail -n 15 "$LOG" >&2
    die "pip install failed; see $LOG. Fix the problem and run this again."
}

install() {
    local torch
    : >"$LOG"
    say "installing into $VENV; the first time downloads about 3 GB and takes minutes"
    if [[ -n "${TORCH_INDEX_URL:-}" ]]; then
        torch="$("$VENV/bin/python" -c 'import tomllib
for need in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]:
    if need.startswith("torch"): print(need)')"
        pip_install --index-url "$TORCH_INDEX_URL" "$torch"
    fi
    pip_install --editable '.[dev,quickstart]'
}

find_only=no
case "${1:-}" in
    "") ;;
    --find-only) find_only=yes ;;
    *) die "unknown argument $1; the only option is --find-only" ;;
esac

if [[ "$find_only" == yes ]]; then
    find_python
    printf '%s\n' "$best"
    exit 0
fi

# $BEGUN exists only after an interrupted creation, whose packages may be incomplete.
if [[ -e "$BEGUN" ]] || ! venv_runs; then
    create_venv
elif [[ -e "$COMPLETE" && "$(cat "$COMPLETE")" == "$(fingerprint)" ]]; then
    exit 0
fi
rm -f "$COMPLETE"
install
fingerprint >"$COMPLETE"
rm -f "$BEGUN"
say "done: $("$VENV/bin/python" --version) in $VENV"
