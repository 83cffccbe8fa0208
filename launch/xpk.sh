#!/usr/bin/env bash
# Training as a workload of a GKE cluster that XPK made: an image of a commit, and a job set that Kubernetes starts again.
#
# The options of xpk are those of its source of June 2026 (xpk workload create); not run against a cluster.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/xpk.sh ACTION --cluster CLUSTER --zone ZONE [OPTION ...] [-- TRAINING ARGUMENT ...]

  image    builds launch/docker/tpu.Dockerfile from a commit and pushes it
  start    creates the workload: python -m vita_jax.train on every host of the slice
  status   of the cluster's workloads
  logs     of the first host, as they come
  stop     deletes the workload; training gets SIGTERM and saves

  --cluster, --zone, --project   of the cluster (for image none of them is needed)
  --name NAME              of the workload, small letters, digits and -
  --image IMAGE            REGION-docker.pkg.dev/PROJECT/REPOSITORY/vita_jax:TAG
  --slice KIND:SIDES       as --config.slice has it: v5e:8x8, v6e:4x8, v5p:4x4x2
  --tpu-type TYPE          instead, as xpk calls it: v5litepod-64
  --spot | --on-demand     capacity, for clusters that make nodes by themselves
  --restarts N             times that Kubernetes starts it again (default 100)
  --cache FOLDER           compiled programs, best on object storage: gs://BUCKET/cache
  --xpk-flag FLAG          one more of xpk workload create, may be repeated: --xpk-flag=--priority=high
  --commit REVISION        of the image; default HEAD
  --dry-run                prints the commands, and runs none

After a preemption, or when a host dies, the whole job set is started again (status 127 to 255, which SIGTERM's 143 and
jax's 134 are), and training goes on from its last checkpoint: --config.run_dir has to be on object storage, as data,
tokenizer and what the run starts from (docs/launching.md). Other statuses end it: 2, bad input, and 1, a traceback.

examples:
  launch/xpk.sh image --image us-docker.pkg.dev/PROJECT/vita/vita_jax:1
  launch/xpk.sh start --cluster mine --zone us-east5-b --name stage-1-3 --slice v5e:8x8 \
      --image us-docker.pkg.dev/PROJECT/vita/vita_jax:1 --cache gs://BUCKET/cache -- \
      --config=experiments/vita_1_5/stage_1_3.py --config.slice=v5e:8x8 --config.run_dir=gs://BUCKET/vision_sft \
      --config.data.folder=gs://BUCKET/data --config.tokenizer.folder=gs://BUCKET/qwen2/tokenizer \
      --config.stages.vision_sft.start_from=gs://BUCKET/vision_understanding
  launch/xpk.sh logs --cluster mine --zone us-east5-b --name stage-1-3
TEXT
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
command_name=launch/xpk.sh
# shellcheck source=launch/common.bash
. "$root/launch/common.bash"

action="" cluster="" zone="" project="" name="" image="" slice="" type="" restarts=100 cache="" commit=HEAD
capacity=() xpk_flags=() arguments=()

parse() {
  while [ "$#" -gt 0 ]; do
    case "$1" in
      --) shift && arguments=("$@") && return ;;
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    esac
    case "$1" in
      -h | --help) usage && exit 0 ;;
      --dry-run) dry_run=1 ;;
      --spot | --on-demand) capacity=("$1") ;;
      --cluster) cluster="$(value_of "$@")"; shift ;;
      --zone) zone="$(value_of "$@")"; shift ;;
      --project) project="$(value_of "$@")"; shift ;;
      --name) name="$(value_of "$@")"; shift ;;
      --image) image="$(value_of "$@")"; shift ;;
      --slice) slice="$(value_of "$@")"; shift ;;
      --tpu-type) type="$(value_of "$@")"; shift ;;
      --restarts) restarts="$(value_of "$@")"; shift ;;
      --cache) cache="$(value_of "$@")"; shift ;;
      --xpk-flag) xpk_flags+=("$(value_of "$@")"); shift ;;
      --commit) commit="$(value_of "$@")"; shift ;;
      -*) fail "unknown option $1; see $command_name --help" ;;
      *)
        [ -z "$action" ] || fail "$1: arguments of training come behind --; see $command_name --help"
        action="$1"
        ;;
    esac
    shift
  done
}

# What `start` and `image` need beside the cluster.
check() {
  case "$action" in
    image | start) need "$image" --image "where the image is kept" ;;
  esac
  case "$action" in
    image) return ;;
    start)
      [ -z "$slice" ] || type="$(accelerator_of "$slice")"
      need "$type" --slice "for example v5e:8x8"
      case " ${arguments[*]-} " in
        *" --config="* | *" --config "*) ;;
        *) fail "there is no --config=FILE behind --; see $command_name --help" ;;
      esac
      ;;
    status | logs | stop) ;;
    *) fail "unknown action ${action:-(none)}; see $command_name --help" ;;
  esac
  need "$cluster" --cluster "made by xpk cluster create"
  need "$zone" --zone "of the cluster"
  [ "$action" = status ] || need "$name" --name "of the workload"
}

xpk_workload() {
  run xpk workload "$1" "--cluster=$cluster" "--zone=$zone" ${project:+"--project=$project"} "${@:2}"
}

build_image() {
  need_tool docker "install Docker, or build launch/docker/tpu.Dockerfile where it is"
  # The commit and nothing else, whatever lies in the checkout. Root: TPUs' device files belong to it on the nodes.
  say "of $commit"
  if [ "$dry_run" = 1 ]; then
    echo "$(quoted git -C "$root" archive "$commit") | $(quoted docker build --file launch/docker/tpu.Dockerfile \
      --build-arg RUN_AS=root --tag "$image" -)"
  else
    git -C "$root" archive "$commit" |
      docker build --file launch/docker/tpu.Dockerfile --build-arg RUN_AS=root --tag "$image" -
  fi
  run docker push "$image"
}

start() {
  local words=(python -m vita_jax.train "${arguments[@]}") flags=()
  case " ${arguments[*]} " in
    *" --config.distributed.coordinator="*) ;;
    *) words+=(--config.distributed.coordinator=auto) ;;
  esac
  [ -z "$cache" ] || flags+=("--env=JAX_COMPILATION_CACHE_DIR=$cache")
  # exec: xpk runs the command below a shell, which would keep SIGTERM for itself. 300 s to save before SIGKILL.
  xpk_workload create "--workload=$name" "--tpu-type=$type" --num-slices=1 "--docker-image=$image" \
    "--max-restarts=$restarts" --termination-grace-period-seconds=300 ${flags[@]+"${flags[@]}"} \
    ${capacity[@]+"${capacity[@]}"} ${xpk_flags[@]+"${xpk_flags[@]}"} "--command=exec $(quoted "${words[@]}")"
}

parse "$@"
check
[ "$action" = image ] || need_tool xpk "pip install xpk"
case "$action" in
  image) build_image ;;
  start) start ;;
  status) xpk_workload list ;;
  logs)
    need_tool kubectl "gcloud components install kubectl"
    need_tool gcloud "install the Google Cloud SDK and log in: gcloud auth login"
    # Else kubectl asks the cluster that was used last. Clusters that xpk makes belong to a region.
    run gcloud container clusters get-credentials "$cluster" "--region=${zone%-*}" ${project:+"--project=$project"}
    # Pods of a job set: NAME-slice-job-SLICE-HOST-...
    run kubectl logs --follow --tail=50 \
      "--selector=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
    ;;
  stop) xpk_workload delete "--workload=$name" --force ;;
esac
