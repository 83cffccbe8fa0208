#!/usr/bin/env bash
# The data pipelines on a cluster with Flink. On one machine they need no launcher, see docs/data.md.
#
# Options of Beam are those of 2.71, which data_pipelines.build checks before it starts; not run on a cluster.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/beam.sh flink --master HOST:PORT --parallelism N [OPTION ...] -- ACTION [ARGUMENT ...]
       launch/beam.sh image --image IMAGE [--python 3.11] [--commit REVISION]

ACTION [ARGUMENT ...] is what python -m data_pipelines.build takes: records, recordings or speak.

  --image IMAGE          what workers run, made by the action image: launch/docker/beam.Dockerfile with this package
  --master HOST:PORT     of Flink's job manager
  --parallelism N        of Flink: parts that are done at the same time
  --environment KIND     of Flink's workers: DOCKER (default, needs --image), LOOPBACK (this machine, to try it),
                         or EXTERNAL with --worker-pool HOST:PORT, a pool of workers beside each task manager
  --option KEY=VALUE     one more of Beam's, may be repeated
  --dry-run              prints the command, and runs nothing

All machines have to see sources and output under the same paths: a disk that Flink's task managers mount into the
workers' containers. Beam starts Flink's job server with Java 11 or newer. Google's Dataflow cannot be used: its workers
mount no disk of yours, and data_pipelines read and write disks, not buckets.

examples:
  launch/beam.sh image --image us-docker.pkg.dev/PROJECT/vita/beam:1
  launch/beam.sh flink --master flink:8081 --parallelism 128 --image us-docker.pkg.dev/PROJECT/vita/beam:1 -- \
      records --json /nfs/my.jsonl --root /nfs/media --output /nfs/my_data --shards 512
TEXT
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
command_name=launch/beam.sh
# shellcheck source=launch/common.bash
. "$root/launch/common.bash"

action="" image="" python=3.11 commit=HEAD master="" parallelism="" environment=DOCKER worker_pool=""
options=() arguments=()

parse() {
  while [ "$#" -gt 0 ]; do
    case "$1" in
      --) shift && arguments=("$@") && return ;;
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    esac
    case "$1" in
      -h | --help) usage && exit 0 ;;
      --dry-run) dry_run=1 ;;
      --image) image="$(value_of "$@")"; shift ;;
      --python) python="$(value_of "$@")"; shift ;;
      --commit) commit="$(value_of "$@")"; shift ;;
      --master) master="$(value_of "$@")"; shift ;;
      --parallelism) parallelism="$(value_of "$@")"; shift ;;
      --environment) environment="$(value_of "$@")"; shift ;;
      --worker-pool) worker_pool="$(value_of "$@")"; shift ;;
      --option) options+=("$(value_of "$@")"); shift ;;
      -*) fail "unknown option $1; see $command_name --help" ;;
      *)
        [ -z "$action" ] || fail "$1: what data_pipelines.build is asked for comes behind --; see $command_name --help"
        action="$1"
        ;;
    esac
    shift
  done
}

check_work() {
  case "${arguments[0]-}" in
    records | recordings | speak) ;;
    "") fail "there is nothing behind --; see $command_name --help" ;;
    *) fail "${arguments[0]} is not done by Beam; records, recordings and speak are" ;;
  esac
}

flink() {
  check_work
  need "$master" --master "Flink's job manager, as in flink:8081"
  need "$parallelism" --parallelism "how many parts are done at the same time"
  local option words=() all=("flink_master=$master" "parallelism=$parallelism" "environment_type=$environment")
  case "$environment" in
    LOOPBACK) ;;
    DOCKER) need "$image" --image "what workers run" && all+=("environment_config=$image") ;;
    EXTERNAL) need "$worker_pool" --worker-pool "HOST:PORT of the workers" && all+=("environment_config=$worker_pool") ;;
    *) fail "--environment $environment is none of DOCKER, EXTERNAL, LOOPBACK" ;;
  esac
  for option in "${all[@]}" ${options[@]+"${options[@]}"}; do
    words+=(--runner-option "$option")
  done
  run bash "$root/launch/setup.sh"
  run exec "$root/.venv/bin/python" -m data_pipelines.build "${arguments[@]}" --runner FlinkRunner "${words[@]}"
}

build_image() {
  need "$image" --image "where the image is kept"
  need_tool docker "install Docker, or build launch/docker/beam.Dockerfile where it is"
  local context=(git -C "$root" archive "$commit")
  local made=(docker build --file launch/docker/beam.Dockerfile --build-arg "PYTHON=$python" --tag "$image" -)
  if [ "$dry_run" = 1 ]; then
    echo "$(quoted "${context[@]}") | $(quoted "${made[@]}")"
  else
    "${context[@]}" | "${made[@]}"
  fi
  run docker push "$image"
}

parse "$@"
case "$action" in
  image) build_image ;;
  flink) flink ;;
  dataflow) fail "Dataflow's workers mount no disk, which data_pipelines need; use flink, or one machine: docs/data.md" ;;
  "") fail "ACTION is missing: flink or image; see $command_name --help" ;;
  *) fail "unknown action $action; see $command_name --help" ;;
esac
