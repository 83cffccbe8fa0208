"""The shell commands, as far as they answer without setting anything up."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("launch/*.*"))
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("launch/*.sh"), ROOT / ".ci" / "run"))


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env or None)


@pytest.mark.parametrize("script", SCRIPTS)
def test_is_valid_shell(script: str) -> None:
    assert run("bash", "-n", script).stderr == ""


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name.startswith("launch/")])
def test_help_says_how_to_call_it(script: str) -> None:
    shown = run("bash", script, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith(f"usage: {script}")


def test_shellcheck_finds_nothing() -> None:
    checked = run(str(Path(sys.executable).with_name("shellcheck")), "--external-sources", *SOURCES, ".ci/run")
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


TRAIN = ("--", "--config=experiments/own_data.py", "--config.run_dir=gs://b/my run")
QUOTED = "--config=experiments/own_data.py '--config.run_dir=gs://b/my run'"
IN_SSH = QUOTED.replace("'", "'\\''")
TPU = ("--name", "vita", "--zone=us-central1-a")
SSH = "gcloud compute tpus tpu-vm ssh vita --zone=us-central1-a"
QUEUED = "gcloud compute tpus queued-resources"
INSTALL = f"""\
git -C ROOT archive --format=tar.gz --output=TMP/vita_jax_vita.tar.gz HEAD
gcloud compute tpus tpu-vm scp TMP/vita_jax_vita.tar.gz vita:vita_jax.tar.gz --zone=us-central1-a --worker=all
{SSH} --worker=all '--command=mkdir -p vita_jax && touch vita_jax.list \
&& (cd vita_jax && xargs rm -f <../vita_jax.list) && tar -tzf vita_jax.tar.gz | grep -v /$ >vita_jax.list; \
tar -xzf vita_jax.tar.gz -C vita_jax && cd vita_jax \
&& bash launch/setup.sh --get-python tpu gcs'
"""
START = f"""\
{SSH} --worker=all '--command=cd vita_jax && bash launch/job.sh start ../vita_jax_job -- \
env JAX_COMPILATION_CACHE_DIR=gs://b/c .venv/bin/python -m vita_jax.train {IN_SSH} \
--config.distributed.coordinator=auto'
"""
CREATE = f"""\
{QUEUED} create vita --zone=us-central1-a --node-id=vita --accelerator-type=v5litepod-64 \
--runtime-version=v2-alpha-tpuv5-lite --spot
# every 60 s, until it is ACTIVE:
{QUEUED} describe vita --zone=us-central1-a '--format=value(state.state)'
"""
SLICE = ("--slice=v5e:8x8", "--spot", "--cache", "gs://b/c")
XPK = ("--cluster", "mine", "--zone", "us-east5-b", "--name", "vita", "--image", "r/vita:1")
GPU = "export XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true XLA_PYTHON_CLIENT_MEM_FRACTION=0.92\n"
RECORDS = ("--", "records", "--json", "my.jsonl", "--output", "built")
STATUS = f"""\
{QUEUED} describe vita --zone=us-central1-a '--format=value(state.state)'
{SSH} --worker=0 '--command=bash vita_jax/launch/job.sh status vita_jax_job'
"""
BEAM = """\
bash ROOT/launch/setup.sh
exec ROOT/.venv/bin/python -m data_pipelines.build records --json my.jsonl --output built --runner FlinkRunner \
--runner-option flink_master=f:8081 --runner-option parallelism=8 --runner-option environment_type="""
FLINK = ("beam.sh", "flink", "--master=f:8081", "--parallelism=8")
DRY_RUNS = {
    ("quickstart.sh", "--config.size=smoke", "--config.run_dir=my run"): """\
cd ROOT
bash launch/setup.sh
.venv/bin/python -m vita_jax.train --config=experiments/quickstart.py --config.size=smoke '--config.run_dir=my run'
""",
    ("quickstart.sh", "--talk", "--text", "How many?"): """\
bash ROOT/launch/setup.sh
exec ROOT/.venv/bin/python -m vita_jax.chat --checkpoint ROOT/experiments/quickstart/weights --text 'How many?'
""",
    ("tpu_pod.sh", "create", *TPU, *SLICE): CREATE,
    ("tpu_pod.sh", "run", *TPU, *SLICE, *TRAIN): f"""\
# if it is not there:
{CREATE}# on a slice that is new:
{INSTALL}{START}# every 60 s, until training has ended:
{STATUS}# if the slice is SUSPENDED, which is what a preemption does; then all of it again:
{QUEUED} delete vita --zone=us-central1-a --force --quiet
""",
    ("tpu_pod.sh", "install", *TPU): INSTALL,
    ("tpu_pod.sh", "start", *TPU, "--cache=gs://b/c", *TRAIN): START,
    ("tpu_pod.sh", "status", *TPU): STATUS,
    ("tpu_pod.sh", "delete", *TPU, "--project=p"): f"""\
{QUEUED} delete vita --zone=us-central1-a --project=p --force --quiet
""",
    ("tpu_pod.sh", "logs", *TPU, "--worker=3", "--follow", "--internal-ip"): f"""\
{SSH} --internal-ip --worker=3 '--command=bash vita_jax/launch/job.sh logs vita_jax_job --follow'
""",
    ("tpu_pod.sh", "stop", *TPU): f"""\
{SSH} --worker=all '--command=bash vita_jax/launch/job.sh stop vita_jax_job'
""",
    ("xpk.sh", "image", "--image", "r/vita:1"): """\
# of HEAD
git -C ROOT archive HEAD | docker build --file launch/docker/tpu.Dockerfile --build-arg RUN_AS=root --tag r/vita:1 -
docker push r/vita:1
""",
    ("xpk.sh", "start", *XPK, "--slice=v5p:4x4x2", "--cache=gs://b/c", "--spot", *TRAIN): f"""\
xpk workload create --cluster=mine --zone=us-east5-b --workload=vita --tpu-type=v5p-64 --num-slices=1 \
--docker-image=r/vita:1 --max-restarts=100 --termination-grace-period-seconds=300 \
--env=JAX_COMPILATION_CACHE_DIR=gs://b/c --spot '--command=exec python -m vita_jax.train {IN_SSH} \
--config.distributed.coordinator=auto'
""",
    ("xpk.sh", "status", *XPK, "--project=p"): """\
xpk workload list --cluster=mine --zone=us-east5-b --project=p
""",
    ("xpk.sh", "logs", *XPK, "--project=p"): """\
gcloud container clusters get-credentials mine --region=us-east5 --project=p
kubectl logs --follow --tail=50 \
--selector=jobset.sigs.k8s.io/jobset-name=vita,batch.kubernetes.io/job-completion-index=0
""",
    ("slurm.sbatch", "--config=x.py", "--config.distributed.coordinator=a:1"): f"""\
cd ROOT
bash launch/setup.sh cuda
{GPU}srun --kill-on-bad-exit=0 --gpu-bind=none .venv/bin/python -m vita_jax.train --config=x.py \
--config.distributed.coordinator=a:1
# if it ends with another status than 0 (done) or 2 (bad input), up to 20 times:
scontrol requeue JOB
""",
    ("xpk.sh", "stop", *XPK): """\
xpk workload delete --cluster=mine --zone=us-east5-b --workload=vita --force
""",
    ("slurm.sbatch", *TRAIN[1:]): f"""\
cd ROOT
bash launch/setup.sh cuda
{GPU}srun --kill-on-bad-exit=0 --gpu-bind=none .venv/bin/python -m vita_jax.train {QUOTED} \
--config.distributed.coordinator=auto
# if it ends with another status than 0 (done) or 2 (bad input), up to 20 times:
scontrol requeue JOB
""",
    ("gpu.sh", *TRAIN[1:]): f"""\
# the driver must be at least 525:
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
cd ROOT
bash launch/setup.sh cuda
{GPU}exec .venv/bin/python -m vita_jax.train {QUOTED}
""",
    ("job.sh", "start", "runs/mine.job", "--", "sleep", "1"): """\
# detached, with the log in runs/mine.job/log.txt
sleep 1
""",
    ("job.sh", "status", "runs/mine.job"): "cat runs/mine.job/exit_status\n",
    ("job.sh", "stop", "runs/my job"): "kill -TERM \"$(cat 'runs/my job'/pid)\"\n",
    ("job.sh", "logs", "runs/mine.job", "--follow"): "tail -n 50 -F runs/mine.job/log.txt\n",
    (*FLINK, "--image", "r/beam:1", *RECORDS): f"{BEAM}DOCKER --runner-option environment_config=r/beam:1\n",
    (*FLINK, "--environment=LOOPBACK", "--option", "flink_version=1.18", *RECORDS): (
        f"{BEAM}LOOPBACK --runner-option flink_version=1.18\n"
    ),
    (*FLINK, "--environment=EXTERNAL", "--worker-pool=w:50000", *RECORDS): (
        f"{BEAM}EXTERNAL --runner-option environment_config=w:50000\n"
    ),
    ("beam.sh", "image", "--image=r/beam:1"): """\
git -C ROOT archive HEAD | docker build --file launch/docker/beam.Dockerfile --build-arg PYTHON=3.11 --tag r/beam:1 -
docker push r/beam:1
""",
}


@pytest.mark.parametrize("command", DRY_RUNS, ids=" ".join)
def test_a_dry_run_prints_what_would_be_done(command: tuple[str, ...]) -> None:
    script, *arguments = command
    shown = run("bash", f"launch/{script}", "--dry-run", *arguments, PATH="/usr/bin:/bin", TMPDIR="TMP")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.replace(str(ROOT), "ROOT") == DRY_RUNS[command]


MISTAKES = {
    ("tpu_pod.sh", "run", "--zone=z"): "--name is missing: of the slice",
    ("tpu_pod.sh", "create", *TPU): "--slice is missing: for example v5e:8x8",
    ("tpu_pod.sh", "create", *TPU, "--slice=v9:2x2"): "slice v9:2x2: v9 is none of v5e, v6e, v5p",
    ("tpu_pod.sh", "create", *TPU, "--slice=v5e-64"): "slice v5e-64 must be a kind and its sides",
    ("tpu_pod.sh", "create", *TPU, "--accelerator-type=v4-8"): "--runtime-version is missing",
    ("tpu_pod.sh", "start", *TPU): "there is no --config=FILE behind --",
    ("tpu_pod.sh", "fly", *TPU): "unknown action fly",
    ("tpu_pod.sh", "status", *TPU, "--zone"): "--zone needs a value",
    ("tpu_pod.sh", "status", *TPU, "--config=x"): "unknown option --config",
    ("xpk.sh", "start", *XPK): "--slice is missing",
    ("xpk.sh", "image"): "--image is missing",
    ("xpk.sh", "logs", *XPK[:4]): "--name is missing",
    ("slurm.sbatch",): "--config=FILE is missing",
    ("gpu.sh", "--config.size=smoke"): "--config=FILE is missing",
    ("job.sh", "start", "runs/x"): "there is no command behind --",
    ("beam.sh", "flink", "--master=f:1", *RECORDS): "--parallelism is missing",
    ("beam.sh", "flink", "--master=f:1", "--parallelism=2", *RECORDS): "--image is missing",
    ("beam.sh", "flink", "--", "join"): "join is not done by Beam",
    ("beam.sh", "dataflow", *RECORDS): "Dataflow's workers mount no disk, which data_pipelines need",
}


@pytest.mark.parametrize("command", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_clear_line(command: tuple[str, ...]) -> None:
    script, *arguments = command
    refused = run("bash", f"launch/{script}", "--dry-run", *arguments, PATH="/usr/bin:/bin")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert refused.stderr.startswith(f"error: {MISTAKES[command]}")


MISSING = {
    ("tpu_pod.sh", "status", *TPU): "gcloud",
    ("xpk.sh", "status", *XPK): "xpk",
    ("beam.sh", "image", "--image=x"): "docker",
    ("slurm.sbatch", "--config=x.py"): "srun",
    ("gpu.sh", "--config=x.py"): "nvidia-smi",
}


@pytest.mark.parametrize("command", MISSING, ids=" ".join)
def test_a_missing_tool_is_named(command: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "dirname").symlink_to("/usr/bin/dirname")
    refused = run("/bin/bash", f"launch/{command[0]}", *command[1:], PATH=str(tmp_path))
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert refused.stderr.startswith(f"error: {MISSING[command]} is not on PATH; ")


def test_options_of_beam_are_those_it_has() -> None:
    from apache_beam.options.pipeline_options import PipelineOptions

    given = {name for text in DRY_RUNS.values() for name in re.findall(r"--runner-option (\w+)=", text)}
    assert given == {"flink_master", "parallelism", "environment_type", "environment_config", "flink_version"}
    assert given <= set(PipelineOptions([]).get_all_options())


IMAGES = sorted(ROOT.glob("launch/docker/*.Dockerfile"))
# Versions of packages are those of requirements.txt and pyproject.toml; the user has a name that is made in the file.
NOT_PINNED_HERE, NAMED_USER = "DL3013", "DL3066"


def test_hadolint_finds_nothing() -> None:
    checked = run(
        str(Path(sys.executable).with_name("hadolint")),
        *(f"--ignore={rule}" for rule in (NOT_PINNED_HERE, NAMED_USER)),
        *map(str, IMAGES),
    )
    assert len(IMAGES) == 3 and (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_images_have_a_pinned_base_no_root_and_copy_what_is_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for path in IMAGES:
        lines = path.read_text(encoding="utf-8").splitlines()
        copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1] if name[:2] != "--"]
        assert len(copied) >= 6 and all((ROOT / name).exists() for name in copied), path.name
        (extra,) = [found for line in lines for found in re.findall(r'pip install "\.\[([a-z,]+)\]"', line)]
        assert set(extra.split(",")) <= set(extras), path.name
        arguments = dict(line[4:].split("=", 1) for line in lines if line.startswith("ARG "))
        (base,) = [line[5:] for line in lines if line.startswith("FROM ")]
        for name, value in arguments.items():
            base = base.replace(f"${{{name}}}", value)
        assert re.search(r":\d+\.\d+\.\d+", base), path.name
        (user,) = [line for line in lines if line.startswith("USER ")]
        assert user in ("USER vita", "USER ${RUN_AS}") and arguments.get("RUN_AS", "vita") == "vita", path.name


def test_a_list_of_packages_that_cannot_be_made_is_not_installed(empty_checkout: Path, tmp_path: Path) -> None:
    """One that is cut short would be installed, and the stamp say that all is there."""
    root = empty_checkout.parents[1]
    (root / "requirements.txt").write_text("numpy\n")
    (root / "pyproject.toml").write_text("")
    python = root / ".venv-eval" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/bash\necho "$*" >>"{root}/called"\n[ "$1" != - ]\n')
    python.chmod(0o755)
    refused = run("bash", str(empty_checkout), "--eval", PATH="/usr/bin:/bin")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert refused.stderr.startswith("error: pip could not install them")
    assert "-m pip" not in (root / "called").read_text() and not (python.parents[1] / "vita_jax_setup").exists()


@pytest.fixture
def empty_checkout(tmp_path: Path) -> Path:
    """A folder with only the set-up script, so that it has no environment."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "setup.sh").write_bytes((ROOT / "launch" / "setup.sh").read_bytes())
    return tmp_path / "launch" / "setup.sh"


def test_a_machine_without_python_gets_a_clear_error(empty_checkout: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("dirname", "bash"):
        (tools / tool).symlink_to(f"/usr/bin/{tool}")
    refused = run("/bin/bash", str(empty_checkout), PATH=str(tools))
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: no Python >= 3.11 found on PATH")


def test_an_unusable_python_is_named(empty_checkout: Path) -> None:
    refused = run("bash", str(empty_checkout), PATH="/usr/bin:/bin", PYTHON="/nowhere/python")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "PYTHON=/nowhere/python does not run" in refused.stderr


def test_an_unknown_option_of_setup_is_an_error(empty_checkout: Path) -> None:
    refused = run("bash", str(empty_checkout), "--dev", PATH="/usr/bin:/bin")
    assert refused.returncode == 1
    assert "unknown option --dev" in refused.stderr


# What it is given -> what pip is then told to install.
SETUPS = {
    (): "--editable ROOT",
    ("tpu",): "--editable ROOT[tpu]",
    ("cuda",): "--editable ROOT[cuda]",
    ("convert",): "--editable ROOT[convert]",
    ("serve", "convert"): "--editable ROOT[serve,convert]",
    ("--get-python", "tpu", "gcs"): "--editable ROOT[tpu,gcs]",
    ("--eval",): "--no-deps --editable ROOT",
}


def test_what_is_set_up(empty_checkout: Path) -> None:
    """With a stand-in for the environment's Python; the second time nothing is installed."""
    root = empty_checkout.parents[1]
    for name in ("requirements.txt", "pyproject.toml"):
        (root / name).write_text("numpy\n")
    for arguments, installed in SETUPS.items():
        for venv in (".venv", ".venv-eval"):
            shutil.rmtree(root / venv, ignore_errors=True)
            (root / venv / "bin").mkdir(parents=True)
            (root / venv / "bin" / "python").write_text(f'#!/bin/bash\necho "$*" >>"{root}/called"\n')
            (root / venv / "bin" / "python").chmod(0o755)
        wanted = f"-m pip install --quiet --disable-pip-version-check {installed}".replace("ROOT", str(root))
        for last in (wanted, ""):
            (root / "called").write_text("")
            done = run("bash", str(empty_checkout), *arguments, PATH="/usr/bin:/bin")
            assert (done.returncode, done.stderr) == (0, ""), arguments
            called = [line for line in (root / "called").read_text().splitlines() if line.startswith("-m pip")]
            assert "".join(called[-1:]) == last


def copied_quickstart(folder: Path) -> Path:
    """The script in another checkout, which has nothing else."""
    (folder / "launch").mkdir()
    for name in ("quickstart.sh", "common.bash"):
        (folder / "launch" / name).write_bytes((ROOT / "launch" / name).read_bytes())
    return folder / "launch" / "quickstart.sh"


@pytest.mark.parametrize(
    "arguments, second",
    {(): True, ("--durations=15",): True, ("--quick",): False, ("tests/models", "--durations=3"): False}.items(),
)
def test_tests_of_public_benchmarks_belong_to_all_tests(
    tmp_path: Path, arguments: tuple[str, ...], second: bool
) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "test.sh").write_bytes((ROOT / "launch" / "test.sh").read_bytes())
    (tmp_path / "launch" / "setup.sh").write_text('echo "setup $*"\n')
    for name in (".venv", ".venv-eval"):
        python = tmp_path / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/usr/bin/env bash\necho "{name} $*"\n')
        python.chmod(0o755)
    tested = run("bash", str(tmp_path / "launch" / "test.sh"), *arguments, PATH="/usr/bin:/bin")
    given = " ".join(("-m not slow" if one == "--quick" else one) for one in arguments)
    first = ["setup dev convert serve", ".venv -m ruff check .", f".venv -m pytest {given}".strip()]
    more = ["setup --eval", f".venv-eval -m pytest {given} tests/eval_libraries".replace("  ", " ")]
    assert (tested.returncode, tested.stderr) == (0, "")
    assert tested.stdout.splitlines() == first + (more if second else [])


def test_talking_without_kept_weights_says_how_to_get_some(tmp_path: Path) -> None:
    script = copied_quickstart(tmp_path)
    refused = run("bash", str(script), "--talk", "--text", "a")
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert refused.stderr.startswith("error: there are no kept weights in experiments/quickstart/weights; train")


def test_talk_hands_its_options_to_chat(tmp_path: Path) -> None:
    script = copied_quickstart(tmp_path)
    (tmp_path / "launch" / "setup.sh").write_text("exit 0\n")
    (tmp_path / "experiments" / "quickstart" / "weights").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/usr/bin/env bash\nprintf "%s|" "$@"\n')
    python.chmod(0o755)
    talked = run("bash", str(script), "--talk", "--text", "How many?", "--speak", "a.wav")
    weights = tmp_path / "experiments" / "quickstart" / "weights"
    assert talked.stdout == f"-m|vita_jax.chat|--checkpoint|{weights}|--text|How many?|--speak|a.wav|"
