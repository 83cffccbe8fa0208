#!/usr/bin/env bash
# The main job: builds the quickstart data, trains a small VITA through its vision stages, measures it, writes a report.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/quickstart.sh [--config.FIELD=VALUE ...]

Sets up .venv (see launch/setup.sh), then trains experiments/quickstart.py. A run that was stopped goes on from its last
checkpoint when the same command is given again.

examples:
  launch/quickstart.sh
  launch/quickstart.sh --config.size=smoke --config.run_dir=runs/smoke
  launch/quickstart.sh --config.seed=1 --config.run_dir=runs/seed1
TEXT
}

# Paths in the arguments are relative to the repository.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
run_dir=runs/quickstart
print_only=0
for argument in "$@"; do
  case "$argument" in
    -h | --help) usage && exit 0 ;;
    --config.run_dir=*) run_dir="${argument#--config.run_dir=}" ;;
    --print_config) print_only=1 ;;
  esac
done

cd "$root"
bash launch/setup.sh
.venv/bin/python -m vita_jax.train --config=experiments/quickstart.py "$@"
[ "$print_only" = 0 ] || exit 0

cat <<TEXT

report:  $run_dir/report.html
chat:    .venv/bin/python -m vita_jax.chat --checkpoint $run_dir --image FILE --text "What number is written here?"
TEXT
