#!/usr/bin/env bash
# Creates .venv with this package and its requirements, or leaves it as it is if nothing changed since last time.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/setup.sh [--get-python] [EXTRA ...]
       launch/setup.sh [--get-python] --eval

Creates .venv in the repository with any Python >= 3.11 of this machine and installs requirements.txt, this package
(editable) and the named extras of pyproject.toml (dev, tpu, cuda, ...). Later runs install only what changed and need
no network while requirements.txt and pyproject.toml stay the same.

  --eval                   creates .venv-eval instead, with the libraries of public benchmarks (extra eval, over a hundred
                           dependencies), the server (extra serve) and this package without what builds data: Beam and
                           TensorFlow Datasets need other versions of the same libraries. torch, which lmms-eval
                           imports, is most of its size; it and torchvision are much smaller where pip is shown their
                           builds for the CPU, too
  --get-python             gets Python 3.12 with uv where there is none that is new enough; needs pip, not root
  PYTHON=/path/to/python   uses this Python to create .venv
TEXT
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
supported='import sys; sys.exit(sys.version_info < (3, 11))'

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# Prints the first Python that is new enough and can create environments.
find_python() {
  local name path no_venv=""
  if [ -n "${PYTHON:-}" ]; then
    "$PYTHON" -c "$supported" 2>/dev/null || fail "PYTHON=$PYTHON does not run or is older than Python 3.11"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
      fail "PYTHON=$PYTHON cannot create environments: install its venv package (Debian and Ubuntu: python3-venv)"
    printf '%s\n' "$PYTHON"
    return
  fi
  for name in python3.12 python3.13 python3.11 python3 python python3.14; do
    path="$(command -v "$name" 2>/dev/null)" || continue
    "$path" -c "$supported" >/dev/null 2>&1 || continue # also a pyenv shim without that version
    if "$path" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      printf '%s\n' "$path"
      return
    fi
    no_venv="$path"
  done
  if [ "$get_python" = 1 ]; then
    { python3 -m pip install --user --quiet uv && python3 -m uv python install --quiet 3.12; } >&2 ||
      fail "uv could not get Python 3.12; install Python >= 3.11 another way"
    python3 -m uv python find 3.12
    return
  fi
  [ -z "$no_venv" ] || fail "$no_venv cannot create environments: install its venv package (Debian and Ubuntu: python3-venv)"
  fail "no Python >= 3.11 found on PATH; install one, or name it: PYTHON=/path/to/python3.11 $0"
}

get_python=0 for_eval=0 wanted_extras=()
for argument in "$@"; do
  case "$argument" in
    -h | --help) usage && exit 0 ;;
    --get-python) get_python=1 ;;
    --eval) for_eval=1 ;;
    -*) fail "unknown option $argument; see launch/setup.sh --help" ;;
    *) wanted_extras+=("$argument") ;;
  esac
done

if [ "$for_eval" = 1 ]; then
  [ "${#wanted_extras[@]}" = 0 ] || fail "--eval has an environment of its own; name no extras beside it"
  venv="$root/.venv-eval"
fi
stamp="$venv/vita_jax_setup"

if ! "$venv/bin/python" -c "$supported" >/dev/null 2>&1; then
  python="$(find_python)"
  echo "creating $venv with $("$python" --version)"
  "$python" -m venv --clear "$venv" || fail "$python could not create $venv"
fi

# The stamp: what was installed from (the path too: the package is linked by it), then the extras.
wanted="$(cat "$root/requirements.txt" "$root/pyproject.toml" | cksum) $root"
installed_from="" extras=""
if [ -f "$stamp" ]; then
  { read -r installed_from && read -r extras; } <"$stamp" || true
fi
missing=0
[ "$installed_from" = "$wanted" ] || missing=1

# Everything but what builds data, then the package itself.
install_eval() {
  local pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check) list status=0
  list="$(mktemp)" || return
  {
    grep -vE '^(apache-beam|tensorflow-datasets)' "$root/requirements.txt" &&
      "$venv/bin/python" - "$root/pyproject.toml" <<'PYTHON'
import sys, tomllib

with open(sys.argv[1], "rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]
print(*extras["eval"], *extras["serve"], sep="\n")
PYTHON
  } >"$list" && "${pip[@]}" --requirement "$list" && "${pip[@]}" --no-deps --editable "$root" || status=$?
  rm -f "$list"
  return "$status"
}

if [ "$for_eval" = 1 ]; then
  [ "$missing" = 1 ] || exit 0
  echo "installing the libraries of public benchmarks into $venv; this takes many minutes the first time"
  install_eval || fail "pip could not install them; it needs a package index, and some GiB of room"
  printf '%s\n\n' "$wanted" >"$stamp"
  exit 0
fi

for extra in ${wanted_extras[@]+"${wanted_extras[@]}"}; do
  case " $extras " in
    *" $extra "*) ;;
    *) extras="${extras:+$extras }$extra" missing=1 ;;
  esac
done
[ "$missing" = 1 ] || exit 0

echo "installing vita_jax${extras:+ with extras $extras}; this takes some minutes the first time"
package="$root${extras:+[${extras// /,}]}"
if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$package"; then
  fail "pip could not install $package; the first set-up, and the first after requirements.txt or pyproject.toml" \
    "changed, needs a package index"
fi
printf '%s\n%s\n' "$wanted" "$extras" >"$stamp"
