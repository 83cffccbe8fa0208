# What the launchers share; sourced by them.
# shellcheck shell=bash

# 1: commands are printed instead of run (--dry-run).
dry_run=0
# For messages; set by whoever sources this.
command_name="${command_name:-$0}"

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# A line for whoever watches; in a dry run a comment between the commands.
say() {
  if [ "$dry_run" = 1 ]; then
    printf '# %s\n' "$*"
  else
    printf '%s %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$*" >&2
  fi
}

# The words as a line that a shell reads back as the same words.
quoted() {
  local word line="" mark="'" escaped="'\\''"
  for word in "$@"; do
    case "$word" in
      "" | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//$mark/$escaped}'" ;;
    esac
    line="$line${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Runs a command; in a dry run prints it.
run() {
  if [ "$dry_run" = 1 ]; then
    quoted "$@"
  else
    "$@"
  fi
}

# value_of OPTION [VALUE ...]: the value that follows an option.
value_of() {
  if [ "$#" -lt 2 ] || [ -z "$2" ]; then
    fail "$1 needs a value; see $command_name --help"
  fi
  printf '%s\n' "$2"
}

# need VALUE OPTION WHAT: refuses to go on without an option.
need() {
  [ -n "$1" ] || fail "$2 is missing: $3; see $command_name --help"
}

# need_tool NAME ADVICE: refuses to go on without a program; a dry run needs none.
need_tool() {
  [ "$dry_run" = 1 ] || command -v "$1" >/dev/null 2>&1 || fail "$1 is not on PATH; $2"
}

# What XLA is told on NVIDIA GPUs unless it is set already: collectives while something else is computed, as JAX's guide for
# GPUs has it; and 92 % of the memory instead of 75 %.
gpu_environment() {
  export XLA_FLAGS="${XLA_FLAGS:---xla_gpu_enable_latency_hiding_scheduler=true}"
  export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
  if [ "$dry_run" = 1 ]; then
    quoted export "XLA_FLAGS=$XLA_FLAGS" "XLA_PYTHON_CLIENT_MEM_FRACTION=$XLA_PYTHON_CLIENT_MEM_FRACTION"
  fi
}

# The name that Google Cloud gives to a slice as --config.slice says it: v5e:8x8 -> v5litepod-64. Types of v5p count
# cores, two a chip; the others chips.
accelerator_of() {
  local kind="${1%%:*}" sides="${1#*:}" chips=1 side
  case "$sides" in
    "" | "$1" | *[!0-9x]* | x* | *x | *xx*) fail "slice $1 must be a kind and its sides, as in v5e:8x8" ;;
  esac
  for side in ${sides//x/ }; do
    chips=$((chips * side))
  done
  case "$kind" in
    v5e) printf 'v5litepod-%d\n' "$chips" ;;
    v6e) printf 'v6e-%d\n' "$chips" ;;
    v5p) printf 'v5p-%d\n' $((2 * chips)) ;;
    *) fail "slice $1: $kind is none of v5e, v6e, v5p; give --accelerator-type as Google Cloud calls it" ;;
  esac
}
