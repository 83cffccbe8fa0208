#!/usr/bin/env bash
# Runs the style check and the tests, on the CPU, after setting everything up.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/test.sh [--quick] [PYTEST ARGUMENT ...]

Sets up .venv (see launch/setup.sh), runs ruff, then pytest; then sets up .venv-eval (launch/setup.sh --eval: a
download of some GB the first time) and runs tests/eval_libraries there, the tests of public benchmarks, unless --quick
or any argument but --durations is given.

  --quick   leaves out the tests marked slow

examples:
  launch/test.sh --quick
  launch/test.sh tests/models -k causal
  launch/test.sh tests/parity --golden-dir DIR --areas vision,vita

  VITA_JAX_GOLDEN_DIR         a folder of golden cases to run besides tests/golden
  JAX_COMPILATION_CACHE_DIR   compiled programs, shared by all tests and later runs; default .jax_cache
TEXT
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
arguments=()
for argument in "$@"; do
  case "$argument" in
    -h | --help) usage && exit 0 ;;
    --quick) arguments+=(-m "not slow") ;;
    *) arguments+=("$argument") ;;
  esac
done

# Paths in these are the caller's; everything below runs in the repository.
for name in VITA_JAX_GOLDEN_DIR JAX_COMPILATION_CACHE_DIR; do
  value="${!name:-}"
  [ -z "$value" ] || [ "${value#/}" != "$value" ] || export "$name=$PWD/$value"
done
cd "$root"
# torch, of the extra `convert`: files of torch.save are among what is read.
bash launch/setup.sh dev convert serve

export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
# As the commands do for themselves, see vita_jax/parallel/huge_pages.py; says nothing to other C libraries.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$root/.jax_cache}"
# Tests compile many small programs, most of them below the default threshold.
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0}"
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="${JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES:-0}"

.venv/bin/python -m ruff check .
# ${arguments[@]+...}: an empty list is an error under `set -u` in the bash of macOS.
.venv/bin/python -m pytest ${arguments[@]+"${arguments[@]}"}

# What needs the libraries of public benchmarks, in their own environment; only with everything else.
for argument in ${arguments[@]+"${arguments[@]}"}; do
  case "$argument" in
    --durations=*) ;;
    *) exit 0 ;;
  esac
done
bash launch/setup.sh --eval
exec .venv-eval/bin/python -m pytest ${arguments[@]+"${arguments[@]}"} tests/eval_libraries
