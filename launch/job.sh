#!/usr/bin/env bash
# A command that goes on when the terminal or the connection is gone, with its log and how it ended in a folder.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/job.sh start FOLDER -- COMMAND [ARGUMENT ...]
       launch/job.sh status | stop | logs FOLDER [--follow] [--dry-run]

  start    starts the command, detached; refuses if one of this folder is running
  status   prints one line: job: none, running, lost (killed without a word), or exit N
  stop     SIGTERM, then waits: training saves and ends with status 143
  logs     the last lines of FOLDER/log.txt; --follow: and those that come

FOLDER gets log.txt (of all starts), command, pid, keeper and exit_status. The other launchers start training by this on
their machines.

examples:
  launch/job.sh start runs/mine.job -- launch/gpu.sh --config=experiments/own_data.py --config.run_dir=runs/mine
  launch/job.sh logs runs/mine.job --follow
  launch/job.sh stop runs/mine.job
TEXT
}

command_name=launch/job.sh
# shellcheck source=launch/common.bash
. "$(dirname "${BASH_SOURCE[0]}")/common.bash"

job_state() {
  if [ -f "$folder/exit_status" ]; then
    printf 'exit %s\n' "$(cat "$folder/exit_status")"
  elif [ ! -s "$folder/keeper" ]; then
    echo none
  else
    local keeper boot
    read -r keeper boot <"$folder/keeper"
    if [ "$boot" = "$(boot_id)" ] && kill -0 "$keeper" 2>/dev/null; then echo running; else echo lost; fi
  fi
}

# Tells a process from one that got its number after the machine was started again.
boot_id() {
  cat /proc/sys/kernel/random/boot_id 2>/dev/null || echo unknown
}

# The process that stays: starts the command, and writes down how it ends before it ends itself.
keep() {
  local status=0 child
  "$@" &
  child=$!
  echo "$child" >"$folder/pid"
  echo "$$ $(boot_id)" >"$folder/keeper"
  wait "$child" || status=$?
  # Whoever looks finds all of it or nothing.
  echo "$status" >"$folder/exit_status.new"
  mv "$folder/exit_status.new" "$folder/exit_status"
}

start() {
  [ "$#" -gt 0 ] || fail "there is no command behind --; see $command_name --help"
  if [ "$dry_run" = 1 ]; then
    say "detached, with the log in $folder/log.txt"
    quoted "$@"
    return
  fi
  [ "$(job_state)" != running ] || fail "$folder has a command that is running; stop it first: launch/job.sh stop $folder"
  need_tool setsid "it comes with util-linux"
  mkdir -p "$folder"
  rm -f "$folder/exit_status" "$folder/pid" "$folder/keeper"
  quoted "$@" >"$folder/command"
  printf '==== %s %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$(quoted "$@")" >>"$folder/log.txt"
  # A session of its own: what ends the terminal's processes does not end it.
  setsid nohup bash "${BASH_SOURCE[0]}" keep "$folder" -- "$@" >>"$folder/log.txt" 2>&1 </dev/null &
  local looks=0
  until [ -s "$folder/keeper" ] || [ -s "$folder/exit_status" ]; do
    looks=$((looks + 1))
    [ "$looks" -le 600 ] || fail "the command was not started within 30 s; see $folder/log.txt"
    sleep 0.05
  done
  echo "started; log: $folder/log.txt"
}

stop() {
  if [ "$dry_run" = 1 ]; then
    echo "kill -TERM \"\$(cat $(quoted "$folder")/pid)\""
    return
  fi
  if [ "$(job_state)" != running ]; then
    echo "not running; job: $(job_state)"
    return
  fi
  kill -TERM "$(cat "$folder/pid")"
  while [ "$(job_state)" = running ]; do
    sleep 0.2
  done
  echo "job: $(job_state)"
}

action="" folder="" follow=0
while [ "$#" -gt 0 ]; do
  case "$1" in
    -h | --help) usage && exit 0 ;;
    --dry-run) dry_run=1 ;;
    --follow) follow=1 ;;
    --) shift && break ;;
    -*) fail "unknown option $1; see $command_name --help" ;;
    *)
      if [ -z "$action" ]; then
        action="$1"
      elif [ -z "$folder" ]; then
        folder="$1"
      else
        fail "$1: the command comes behind --; see $command_name --help"
      fi
      ;;
  esac
  shift
done
need "$action" ACTION "start, status, stop or logs"
need "$folder" FOLDER "the place of log and status"

case "$action" in
  start) start "$@" ;;
  keep) keep "$@" ;;
  status) if [ "$dry_run" = 1 ]; then quoted cat "$folder/exit_status"; else echo "job: $(job_state)"; fi ;;
  stop) stop ;;
  logs) if [ "$follow" = 1 ]; then run tail -n 50 -F "$folder/log.txt"; else run tail -n 50 "$folder/log.txt"; fi ;;
  *) fail "unknown action $action; see $command_name --help" ;;
esac
