#!/usr/bin/env bash
# Training on the GPUs of one machine: looks at the driver, sets up, starts.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/gpu.sh [--dry-run] TRAINING ARGUMENT ...

Checks that the NVIDIA driver is new enough, sets up .venv with the extra cuda (the CUDA libraries come with it, nothing
else has to be installed), and starts python -m vita_jax.train: one process with all GPUs. CUDA_VISIBLE_DEVICES=0,1
leaves the others alone. XLA_FLAGS and XLA_PYTHON_CLIENT_MEM_FRACTION are set unless they are set already. Training runs in
the repository, wherever this is given: paths that are not absolute start there.

examples:
  launch/gpu.sh --config=experiments/quickstart.py --config.run_dir=runs/gpu
  launch/gpu.sh --config=experiments/vita_1_5/stage_1_3.py --config.mesh.fsdp=8 --config.run_dir=runs/stage_1_3
  launch/job.sh start runs/mine.job -- launch/gpu.sh --config=experiments/own_data.py    # goes on without the terminal
TEXT
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
command_name=launch/gpu.sh
# shellcheck source=launch/common.bash
. "$root/launch/common.bash"

# Of the wheels of CUDA 12 (minor versions are compatible from here on).
oldest_driver=525

arguments=()
for argument in "$@"; do
  case "$argument" in
    -h | --help) usage && exit 0 ;;
    --dry-run) dry_run=1 ;;
    *) arguments+=("$argument") ;;
  esac
done
case " ${arguments[*]-} " in
  *" --config="* | *" --config "*) ;;
  *) fail "--config=FILE is missing, for example --config=experiments/quickstart.py; see $command_name --help" ;;
esac

check_driver() {
  local found
  need_tool nvidia-smi "install NVIDIA's driver, or run launch/quickstart.sh for the CPU"
  if [ "$dry_run" = 1 ]; then
    say "the driver must be at least $oldest_driver:"
    quoted nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
    return
  fi
  found="$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader)" || fail "nvidia-smi: $found"
  say "GPUs: $(printf '%s\n' "$found" | sort | uniq -c | sed 's/^ *//' | paste -sd ';' -)"
  local version="${found%%$'\n'*}"
  version="${version##*, }"
  [ "${version%%.*}" -ge "$oldest_driver" ] ||
    fail "the NVIDIA driver is $version; CUDA 12 needs $oldest_driver or newer"
}

check_driver
run cd "$root"
run bash launch/setup.sh cuda
gpu_environment
run exec .venv/bin/python -m vita_jax.train "${arguments[@]}"
