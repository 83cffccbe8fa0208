#!/usr/bin/env bash
# Training on a slice of TPUs: asked for as a queued resource, set up, started on all workers, and again after preemption.
#
# The flags of gcloud are those of Google Cloud SDK 528 (compute tpus queued-resources | tpu-vm). The order of commands and
# what is done in which state is tested with a stand-in for gcloud; nothing here has been run against a real slice.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/tpu_pod.sh ACTION --name NAME --zone ZONE [OPTION ...] [-- TRAINING ARGUMENT ...]

  run       creates, installs and starts, whatever of that is left to do, and watches: after a preemption the slice is
            asked for again and training goes on from its last checkpoint. Ends with training. May be stopped (Ctrl-C) at
            any time, and given again; training that had ended by then is started anew, from the commit that is given now
  create    asks for the slice and waits for it
  install   copies a commit to all workers and sets it up there
  start     starts python -m vita_jax.train on all workers, detached
  status    of the slice and of training
  logs      of a worker
  stop      SIGTERM: training saves and ends; the slice stays, and costs
  delete    gives the slice back

  --name NAME               of the slice
  --zone ZONE               where it is, for example us-central1-a
  --project PROJECT         default: that of gcloud
  --slice KIND:SIDES        as --config.slice has it: v5e:8x8, v6e:4x8, v5p:4x4x2
  --accelerator-type TYPE   instead, as Google Cloud calls it: v5litepod-64
  --runtime-version NAME    software of the workers; default by the kind of TPU
  --spot | --reserved       cheaper, may be preempted | from a reservation; else on demand
  --create-flag FLAG        one more of gcloud's, may be repeated: --create-flag=--network=mine
  --internal-ip             workers have no addresses outside of the network that this machine is in, too
  --commit REVISION         what is installed; default HEAD, of a checkout without changes
  --extra NAME              one more extra of pyproject.toml, may be repeated
  --cache FOLDER            compiled programs, best on object storage: gs://BUCKET/cache
  --worker N, --follow      of logs: which one (default 0); and lines that come
  --interval SECONDS        between looks at the slice (default 60)
  --restarts N              of training that died on a slice that is well (default 5)
  --dry-run                 prints the commands, and runs none

Training arguments are those of python -m vita_jax.train. --config.run_dir has to be one folder for all workers that
outlives them: gs://BUCKET/RUN, or a disk that all of them mount. So have data, tokenizer and what the run starts from;
docs/launching.md says how they are brought to a bucket.

examples:
  launch/tpu_pod.sh run --name vita --zone us-central1-a --slice v5e:8x8 --spot --cache gs://BUCKET/cache -- \
      --config=experiments/vita_1_5/stage_1_3.py --config.slice=v5e:8x8 --config.run_dir=gs://BUCKET/vision_sft \
      --config.data.folder=gs://BUCKET/data --config.tokenizer.folder=gs://BUCKET/qwen2/tokenizer \
      --config.stages.vision_sft.start_from=gs://BUCKET/vision_understanding
  launch/tpu_pod.sh logs --name vita --zone us-central1-a --follow
  launch/tpu_pod.sh delete --name vita --zone us-central1-a
TEXT
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
command_name=launch/tpu_pod.sh
# shellcheck source=launch/common.bash
. "$root/launch/common.bash"

# In the home of every worker.
code=vita_jax job=vita_jax_job
# What is only needed while this runs.
scratch=""
trap '[ -z "$scratch" ] || rm -rf "$scratch"' EXIT

action="" name="" zone="" project="" slice="" type="" runtime="" commit="" cache="" worker=0 interval=60 restarts=5
follow="" internal="" tier=() create_flags=() extras=(tpu gcs) arguments=()

parse() {
  while [ "$#" -gt 0 ]; do
    case "$1" in
      --) shift && arguments=("$@") && return ;;
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    esac
    case "$1" in
      -h | --help) usage && exit 0 ;;
      --dry-run) dry_run=1 ;;
      --spot | --reserved) tier=("$1") ;;
      --follow) follow=--follow ;;
      --internal-ip) internal=1 ;;
      --name) name="$(value_of "$@")"; shift ;;
      --zone) zone="$(value_of "$@")"; shift ;;
      --project) project="$(value_of "$@")"; shift ;;
      --slice) slice="$(value_of "$@")"; shift ;;
      --accelerator-type) type="$(value_of "$@")"; shift ;;
      --runtime-version) runtime="$(value_of "$@")"; shift ;;
      --create-flag) create_flags+=("$(value_of "$@")"); shift ;;
      --commit) commit="$(value_of "$@")"; shift ;;
      --extra) extras+=("$(value_of "$@")"); shift ;;
      --cache) cache="$(value_of "$@")"; shift ;;
      --worker) worker="$(value_of "$@")"; shift ;;
      --interval) interval="$(value_of "$@")"; shift ;;
      --restarts) restarts="$(value_of "$@")"; shift ;;
      -*) fail "unknown option $1; see $command_name --help" ;;
      *)
        [ -z "$action" ] || fail "$1: arguments of training come behind --; see $command_name --help"
        action="$1"
        ;;
    esac
    shift
  done
}

check() {
  need "$action" ACTION "run, create, install, start, status, logs, stop or delete"
  need "$name" --name "of the slice"
  need "$zone" --zone "where the slice is"
  case "$action" in
    run | create)
      [ -z "$slice" ] || type="$(accelerator_of "$slice")"
      need "$type" --slice "for example v5e:8x8"
      [ -n "$runtime" ] || runtime="$(runtime_of "$type")"
      ;;
  esac
  case "$action" in
    run | start)
      case " ${arguments[*]-} " in
        *" --config="* | *" --config "*) ;;
        *) fail "there is no --config=FILE behind --; see $command_name --help" ;;
      esac
      ;;
  esac
  need_tool gcloud "install the Google Cloud SDK and log in: gcloud auth login"
}

# One commit for as long as this runs: what is installed after a preemption days later is what was installed first.
pin_commit() {
  if [ "$dry_run" = 1 ]; then
    commit="${commit:-HEAD}"
    return
  fi
  if [ -z "$commit" ] && [ -n "$(git -C "$root" status --porcelain)" ]; then
    fail "the checkout has changes that are not committed: commit them, or leave them out with --commit HEAD"
  fi
  commit="$(git -C "$root" rev-parse --verify --quiet "${commit:-HEAD}^{commit}")" || fail "--commit: no such commit"
}

# The software that Google Cloud recommends for a kind of TPU.
runtime_of() {
  case "$1" in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "--runtime-version is missing: there is no default for $1" ;;
  esac
}

# ---- gcloud ---------------------------------------------------------------------------------------------------------

# Sets `place`: the flags of every command.
where() {
  place=("--zone=$zone")
  [ -z "$project" ] || place+=("--project=$project")
}

queued() {
  run gcloud compute tpus queued-resources "$1" "$name" "${place[@]}" "${@:2}"
}

# on_workers WORKER COMMAND: by ssh; "all" for all at the same time.
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" ${internal:+--internal-ip} "--worker=$1" "--command=$2"
}

# What Google Cloud says, ABSENT, or UNKNOWN with the reason: a network that is down for a minute ends nothing.
slice_state() {
  local told
  if told="$(queued describe "--format=value(state.state)" 2>&1)"; then
    printf '%s\n' "$told" | tail -n 1
    return
  fi
  case "$told" in
    *NOT_FOUND* | *"not found"*) echo ABSENT ;;
    *) echo "UNKNOWN ($(printf '%s\n' "$told" | tail -n 1))" ;;
  esac
}

# What launch/job.sh says on the first worker: none, running, lost, exit N; or unreachable.
job_state() {
  local told
  told="$(on_workers 0 "if [ -f $code/launch/job.sh ]; then bash $code/launch/job.sh status $job; else echo job: none; fi" 2>&1)" ||
    told="job: unreachable"
  printf '%s\n' "$told" | sed -n 's/^job: //p' | tail -n 1
}

# ---- actions --------------------------------------------------------------------------------------------------------

ask() {
  queued create "--node-id=$name" "--accelerator-type=$type" "--runtime-version=$runtime" \
    ${internal:+--internal-ips} ${tier[@]+"${tier[@]}"} ${create_flags[@]+"${create_flags[@]}"}
}

# Waits for the slice. Returns 1 if it will not come.
wait_for_slice() {
  local state before=""
  if [ "$dry_run" = 1 ]; then
    say "every $interval s, until it is ACTIVE:"
    queued describe "--format=value(state.state)"
    return
  fi
  while :; do
    state="$(slice_state)"
    [ "$state" = "$before" ] || say "slice $name: $state"
    before="$state"
    case "$state" in
      ACTIVE) return ;;
      ABSENT | FAILED | SUSPENDED) return 1 ;;
    esac
    sleep "$interval"
  done
}

install() {
  local archive="${TMPDIR:-/tmp}/vita_jax_$name.tar.gz" unpack setup
  if [ "$dry_run" = 0 ]; then
    # No name that others on this machine can know: workers run what is in it.
    [ -n "$scratch" ] || scratch="$(mktemp -d)" || return
    archive="$scratch/vita_jax.tar.gz"
  fi
  # What an earlier commit had and this one has not must not stay; what was made there must.
  unpack="mkdir -p $code && touch $code.list && (cd $code && xargs rm -f <../$code.list) &&"
  unpack="$unpack tar -tzf $code.tar.gz | grep -v /\$ >$code.list; tar -xzf $code.tar.gz -C $code"
  setup="cd $code && bash launch/setup.sh --get-python ${extras[*]}"
  run git -C "$root" archive --format=tar.gz "--output=$archive" "$commit" &&
    run gcloud compute tpus tpu-vm scp "$archive" "$name:$code.tar.gz" "${place[@]}" ${internal:+--internal-ip} --worker=all &&
    on_workers all "$unpack && $setup"
}

# The command of all workers, as a line.
training() {
  local words=(.venv/bin/python -m vita_jax.train "${arguments[@]}")
  case " ${arguments[*]} " in
    *" --config.distributed.coordinator="*) ;;
    *) words+=(--config.distributed.coordinator=auto) ;;
  esac
  [ -z "$cache" ] || words=(env "JAX_COMPILATION_CACHE_DIR=$cache" "${words[@]}")
  quoted "${words[@]}"
}

start() {
  on_workers all "cd $code && bash launch/job.sh start ../$job -- $(training)"
}

describe_run() {
  say "if it is not there:"
  ask
  wait_for_slice
  say "on a slice that is new:"
  install
  start
  say "every $interval s, until training has ended:"
  queued describe "--format=value(state.state)"
  on_workers 0 "bash $code/launch/job.sh status $job"
  say "if the slice is SUSPENDED, which is what a preemption does; then all of it again:"
  queued delete --force --quiet
}

# Brings everything up from whatever state it is in, and looks after it until training has ended.
watch() {
  local state before=""
  # ours: what worker 0 says is of a start by this script, or of the same command.
  died=0 stopped=0 ours=0
  while :; do
    state="$(slice_state)"
    [ "$state" = "$before" ] || say "slice $name: $state"
    case "$state" in
      ACTIVE) look_after ;;
      ABSENT)
        died=0 stopped=0
        if ! ask; then
          [ -n "$before" ] || fail "slice $name was refused"
          say "slice $name was refused; it is asked for again"
        fi
        ;;
      SUSPENDED) queued delete --force --quiet || say "slice $name is not deleted yet" ;;
      FAILED) fail "slice $name cannot be had; gcloud compute tpus queued-resources describe $name --zone=$zone says why" ;;
      UNKNOWN*) [ -n "$before" ] || fail "gcloud: $state" ;;
    esac
    before="$state"
    sleep "$interval"
  done
}

# One look at training on a slice that is there; ends the script when nothing is left to look after.
look_after() {
  local job_now
  job_now="$(job_state)"
  case "$job_now" in
    unreachable | "") say "worker 0 does not answer" ;;
    none)
      ours=1
      install_and_start
      ;;
    *) if [ "$ours" = 1 ]; then look_on "$job_now"; else take_over "$job_now"; fi ;;
  esac
}

# take_over STATE: training that was started before this script was.
take_over() {
  local command
  case "$1" in
    running | "exit 0")
      if ! command="$(on_workers 0 "if [ -f $job/command ]; then cat $job/command; fi" 2>/dev/null)"; then
        say "worker 0 does not answer"
        return
      fi
      if printf '%s\n' "$command" | grep -Fxq -e "$(training)"; then
        ours=1
        look_on "$1"
        return
      fi
      [ "$1" != running ] || fail "another command is running there: $command_name stop --name $name --zone $zone"
      ;;
  esac
  say "an earlier start has ended ($1)"
  if on_workers all "bash $code/launch/job.sh stop $job && rm -f $job/exit_status $job/keeper"; then
    ours=1
    install_and_start
  else
    say "not all workers answered"
  fi
}

# look_on STATE: of training that this script has started.
look_on() {
  local job_now="$1"
  case "$job_now" in
    running) stopped=0 ;;
    "exit 0")
      say "training is done; the slice is still there: $command_name delete --name $name --zone $zone"
      exit 0
      ;;
    "exit 2") fail "training cannot go on as it is; $command_name logs --name $name --zone $zone says why" ;;
    "exit 143" | "exit 130")
      # A worker that is being taken away gets the signal before the slice is called SUSPENDED.
      stopped=$((stopped + 1))
      [ "$stopped" -lt 3 ] || fail "training was stopped, and the slice is still there: start it again, or delete the slice"
      ;;
    *)
      died=$((died + 1))
      [ "$died" -le "$restarts" ] || fail "training died more than $restarts times (now: $job_now); see logs"
      say "training died ($job_now); start $died of $restarts"
      if on_workers all "bash $code/launch/job.sh stop $job"; then start || say "not all workers answered"; fi
      ;;
  esac
}

install_and_start() {
  say "setting up"
  if install; then
    start || say "not all workers answered"
  else
    say "not all workers are set up; they are tried again"
  fi
}

parse "$@"
check
where
case "$action" in
  run | install) pin_commit ;;
esac
case "$action" in
  run) if [ "$dry_run" = 1 ]; then describe_run; else watch; fi ;;
  create)
    ask
    wait_for_slice || fail "slice $name does not come: $(slice_state)"
    ;;
  install) install ;;
  start) start ;;
  status)
    queued describe "--format=value(state.state)"
    on_workers 0 "bash $code/launch/job.sh status $job"
    ;;
  logs) on_workers "$worker" "bash $code/launch/job.sh logs $job${follow:+ $follow}" ;;
  stop) on_workers all "bash $code/launch/job.sh stop $job" ;;
  delete) queued delete --force --quiet ;;
  *) fail "unknown action $action; see $command_name --help" ;;
esac
