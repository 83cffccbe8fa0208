#!/usr/bin/env bash
# The main job: builds the quickstart data, trains a small VITA to see, to listen and to speak, measures it, writes a
# report. Or talks with the one that is kept in the repository.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/quickstart.sh [--dry-run] [--config.FIELD=VALUE ...]
       launch/quickstart.sh [--dry-run] --talk [OPTION ...]

Sets up .venv (see launch/setup.sh), then trains experiments/quickstart.py: a small VITA that sees, listens and answers
aloud. A run that was stopped goes on from its last checkpoint when the same command is given again.

--talk trains nothing: it talks with the weights kept in experiments/quickstart/weights. Options are those of the
command vita_jax.chat, such as --image FILE, --audio FILE, --text TEXT, --speak FILE.wav; without them it asks for
questions. --dry-run prints the commands, and runs none.

examples:
  launch/quickstart.sh
  launch/quickstart.sh --config.size=smoke --config.run_dir=runs/smoke
  launch/quickstart.sh --config.seed=1 --config.run_dir=runs/seed1
  launch/quickstart.sh --talk
  launch/quickstart.sh --talk --image digits.png --text "What is the largest digit?" --speak reply.wav
TEXT
}

# Paths in the arguments are relative to the repository when training, and to the caller's folder when talking.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
weights="$root/experiments/quickstart/weights"
command_name=launch/quickstart.sh
# shellcheck source=launch/common.bash
. "$root/launch/common.bash"

talk() {
  if [ ! -d "$weights" ]; then
    fail "there are no kept weights in experiments/quickstart/weights; train your own with" \
      "launch/quickstart.sh and talk to them with .venv/bin/python -m vita_jax.chat --checkpoint runs/quickstart"
  fi
  run bash "$root/launch/setup.sh"
  run exec "$root/.venv/bin/python" -m vita_jax.chat --checkpoint "$weights" "$@"
}

run_dir=runs/quickstart
print_only=0
arguments=()
for argument in "$@"; do
  case "$argument" in
    -h | --help) usage && exit 0 ;;
    --dry-run) dry_run=1 && continue ;;
    --config.run_dir=*) run_dir="${argument#--config.run_dir=}" ;;
    --print_config) print_only=1 ;;
  esac
  arguments+=("$argument")
done
if [ "${arguments[0]:-}" = --talk ]; then
  talk "${arguments[@]:1}"
  exit
fi

run cd "$root"
run bash launch/setup.sh
run .venv/bin/python -m vita_jax.train --config=experiments/quickstart.py ${arguments[@]+"${arguments[@]}"}
[ "$print_only" = 0 ] && [ "$dry_run" = 0 ] || exit 0

cat <<TEXT

report:  $run_dir/report.html
chat:    .venv/bin/python -m vita_jax.chat --checkpoint $run_dir --image FILE --text "What is the largest digit?"
aloud:   .venv/bin/python -m vita_jax.chat --checkpoint $run_dir --image FILE --audio QUESTION.wav --speak REPLY.wav
sounds:  spoken questions with pictures to try are in $run_dir/data/benchmarks/speech/media
TEXT
