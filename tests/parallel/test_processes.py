"""One process alone, and configurations of several that cannot be; how several agree is in tests/training."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from vita_jax.command_line import exit_status
from vita_jax.errors import UserError
from vita_jax.parallel.mesh import MeshConfig, check_processes, make_mesh
from vita_jax.parallel.processes import (
    DistributedConfig,
    Largest,
    gather,
    is_first,
    join_processes,
    on_first,
    own_file,
)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DistributedConfig(num_processes=2), "distributed.num_processes=2 goes with distributed.coordinator=HOST:PORT"),
        (DistributedConfig("auto", process_id=1), "distributed.process_id=1 goes with .* not with auto"),
        (DistributedConfig("host", 2, 0), "distributed.coordinator='host' must be HOST:PORT"),
        (DistributedConfig("host:1234", 2), "distributed.process_id is missing"),
        (DistributedConfig("host:1234", 2, 2), "distributed.process_id=2 of distributed.num_processes=2"),
    ],
)
def test_places_that_cannot_be(config, message):
    with pytest.raises(UserError, match=message):
        join_processes(config)


@pytest.mark.parametrize(("error", "status"), [(RuntimeError("port\nis taken"), 134), (ValueError("no cluster"), 2)])
def test_only_what_another_start_may_mend_is_started_again(monkeypatch, capsys, error, status):
    def initialize(**options):
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    assert exit_status(lambda: join_processes(DistributedConfig("host:1", 2, 0))) == status
    told = capsys.readouterr().err
    assert told.startswith("error: distributed.coordinator=host:1: ") and told.count("\n") == 1


def test_one_process_waits_for_nobody():
    join_processes(DistributedConfig())
    assert not jax.distributed.is_initialized()
    mesh = make_mesh(MeshConfig())
    check_processes(mesh)
    assert is_first() and own_file(Path("run/hang.txt")) == Path("run/hang.txt")
    kept = object()
    assert gather(kept) == [kept] and on_first(lambda: kept) is kept
    assert [Largest(mesh, delay=2)(number) for number in (0, 15)] == [0, 15]
