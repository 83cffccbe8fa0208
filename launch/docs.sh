#!/usr/bin/env bash
# Makes a site of the documentation; a link that leads nowhere is an error.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/docs.sh [FOLDER]

Sets up .venv with the extra docs (see launch/setup.sh) and writes the pages of docs/ as HTML to FOLDER, default
docs/site; open its index.html in any browser.

examples:
  launch/docs.sh
  launch/docs.sh /tmp/site
TEXT
}

case "${1:-}" in
  -h | --help) usage && exit 0 ;;
  -*) echo "error: unknown option $1; see launch/docs.sh --help" >&2 && exit 2 ;;
esac

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
site="${1:-$root/docs/site}"
bash "$root/launch/setup.sh" docs
"$root/.venv/bin/python" -m sphinx -b html -W --keep-going -q "$root/docs" "$site"
echo "written: $site/index.html"
