"""Rates, the share of the machine's peak, memory; and a profile on request."""

from __future__ import annotations

import dataclasses
import io
from types import SimpleNamespace

import jax
import pytest

from tests.training.tiny import experiment, make_batches, stage
from vita_jax import config as config_lib
from vita_jax.errors import UserError
from vita_jax.training import loop, speed
from vita_jax.training.experiment import validate
from vita_jax.training.flops import stage_flops
from vita_jax.training.metrics import Progress, read_metrics
from vita_jax.training.speed import Machine, Speed, machine_of, memory, speed_of


def devices(kind: str, number: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(device_kind=kind)] * number


def test_machines():
    assert machine_of(devices("TPU v5", 8)) == Machine("TPU v5", 8, 8 * 459e12)
    assert machine_of(devices("TPU7x", 8)) == Machine("TPU7x", 4, 4 * 2307e12), "two devices a chip"
    assert machine_of(jax.devices()[:1]).peak_flops is None


def test_rates_and_formula():
    speed = Speed(Machine("TPU v5", 4, 4 * 459e12), 9.18e14)
    rates = speed.rates(tokens=64_000, steps=10, seconds=20.0)
    assert rates == {
        "tokens_per_second": 3200.0,
        "tokens_per_second_per_chip": 800.0,
        "step_seconds": 2.0,
        "mfu": pytest.approx(9.18e14 / (2.0 * 4 * 459e12)),
    }
    assert speed.formula() == (
        "MFU = 9.18e+14 model FLOPs of a step / (seconds of a step x 1.836e+15 FLOP/s, the bfloat16 peak of 4 TPU v5)"
    )
    unknown = Speed(Machine("cpu", 1, None))
    assert "mfu" not in unknown.rates(1, 1, 1.0) and unknown.formula() is None


def test_flops_are_worked_out_where_the_peak_is_known(tmp_path):
    config = experiment(tmp_path)
    own = config.stages[1]
    assert speed_of(config, own, devices("TPU v4", 2)).step_flops == stage_flops(config, own).total > 0
    assert speed_of(config, own, devices("cpu", 2)).step_flops is None


def test_memory_of_host_and_devices(monkeypatch):
    assert set(memory()) == {"memory_gb"} and 0.05 < memory()["memory_gb"] < 1000
    stats = [{"peak_bytes_in_use": 3 << 30, "bytes_limit": 16 << 30}, {"peak_bytes_in_use": 5 << 30}, None]
    local = [SimpleNamespace(memory_stats=lambda entry=entry: entry) for entry in stats]
    monkeypatch.setattr(speed.jax, "local_devices", lambda: local)
    assert (memory()["device_memory_gb"], memory()["device_limit_gb"]) == (5.0, 16.0)


def test_progress_shows_the_share_of_the_peak():
    stream = io.StringIO()
    Progress("a", 10, stream, plain_seconds=0.0).report(5, {"loss": 1.0, "mfu": 0.4567}, 10.0, 1.0)
    assert stream.getvalue() == "a  step 5/10  loss 1.0000  10 tok/s  MFU 45.7%  ETA 0:01\n"


def test_a_run_reports_its_share_where_the_peak_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "machine_of", lambda devices: Machine("fast", 2, 1e12))
    config = experiment(tmp_path, stages=(stage("only", trainable=("^projector/",), steps=4),))
    stream = io.StringIO()
    loop.run(config, make_batches=make_batches, stream=stream)
    assert "stage only: MFU = " in stream.getvalue()
    flops = stage_flops(config, config.stages[0]).total
    for record in (r for r in read_metrics(tmp_path) if r["event"] == "step"):
        assert record["mfu"] == pytest.approx(flops / (record["step_seconds"] * 1e12))
        assert record["tokens_per_second_per_chip"] == pytest.approx(record["tokens_per_second"] / 2)
        assert record["data_share"] == pytest.approx(record["data_seconds"] / record["step_seconds"])


def test_a_profile_of_some_steps_of_every_stage(tmp_path):
    config = config_lib.apply_overrides(experiment(tmp_path), {"profile.start": "3", "profile.count": "2"})
    stages = tuple(dataclasses.replace(own, steps=3) for own in config.stages)  # it ends within the steps asked for
    loop.run(dataclasses.replace(config, stages=stages), make_batches=make_batches, stream=io.StringIO())
    for name in ("naming", "joint"):
        (file,) = (tmp_path / "profile" / name).rglob("*.xplane.pb")
        assert file.stat().st_size > 1000


@pytest.mark.parametrize("override", [{"profile.start": "0"}, {"profile.count": "0"}])
def test_profiles_are_validated(tmp_path, override):
    with pytest.raises(UserError, match=f"{next(iter(override))}=0"):
        validate(config_lib.apply_overrides(experiment(tmp_path), override))
