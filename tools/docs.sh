#!/usr/bin/env bash
# Builds the documentation site into build/site: `make docs`. Arguments are passed to mkdocs.
#
# Its programs (the extra `docs` of pyproject.toml) get a small environment: neither torch nor the
# package is needed, because docstrings are read from the source. Installing it, which is needed
# once, and after a change of the extra, is the only step that uses the network.
#
# Settings, optional, from the environment: PYTHON as in tools/setup.sh, DOCS_VENV=.venv-docs
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

DOCS_VENV="${DOCS_VENV:-.venv-docs}"
readonly COMPLETE="$DOCS_VENV/.set-up-complete"
readonly READ_EXTRA='
import tomllib
with open("pyproject.toml", "rb") as file:
    print("\n".join(tomllib.load(file)["project"]["optional-dependencies"]["docs"]))
'

# Without the stamp an earlier start may have been interrupted; venv then repairs what is there.
if [[ ! -e "$COMPLETE" || ! -x "$DOCS_VENV/bin/python" ]]; then
    python="$(tools/setup.sh --find-only)"
    "$python" -m venv "$DOCS_VENV"
fi
requirements="$("$DOCS_VENV/bin/python" -c "$READ_EXTRA")"
if [[ "$(cat "$COMPLETE" 2>/dev/null)" != "$requirements" ]]; then
    printf 'docs: installing into %s\n' "$DOCS_VENV" >&2
    "$DOCS_VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
        --requirement /dev/stdin <<<"$requirements"
    printf '%s\n' "$requirements" >"$COMPLETE"
fi
# The theme's own notice about another program.
export NO_MKDOCS_2_WARNING=1
"$DOCS_VENV/bin/python" -m mkdocs build --strict "$@"
printf 'docs: build/site/index.html\n'
printf 'docs: with search: %s -m http.server --directory build/site\n' "$DOCS_VENV/bin/python"
