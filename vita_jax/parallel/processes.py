"""Several processes that train together: how they find each other, who writes, and what they agree on.

All are started with the same command and configuration, and have the same folders. Process 0 does for all what must be
done once (`on_first`); whatever else is here has to be called by all of them, in the same order.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import multihost

from vita_jax.errors import TryAgain, UserError

T = TypeVar("T")

AUTO = "auto"
# How long processes wait for one that builds data, measures a model or writes a checkpoint. One that has died is
# noticed by jax, see below.
WAIT_SECONDS = 7 * 24 * 3600
# How long the first process waits for the last to be started: hosts get their code and images at different times.
JOIN_SECONDS = 1800
# A process that ends alone waits so long for the others; then jax ends them.
SHUTDOWN_SECONDS = 60


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run find each other.

    Attributes:
      coordinator: `HOST:PORT` of process 0, which all others can reach; "auto": the machine says this and the two
        below, as TPU slices and Slurm do. None: there is one process.
      num_processes: how many there are.
      process_id: which one this is, from 0; of all fields, the only one that differs between them.
      heartbeat_seconds: a process that has not been heard of for so long counts as dead, and the others end.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    heartbeat_seconds: int = 100


def validate_distributed(config: DistributedConfig) -> None:
    """Raises UserError naming the field that is missing, out of range or of no use."""
    numbers = {"num_processes": config.num_processes, "process_id": config.process_id}
    if config.heartbeat_seconds < 1:
        raise UserError(f"distributed.heartbeat_seconds={config.heartbeat_seconds} must be at least 1")
    if config.coordinator is None or config.coordinator == AUTO:
        for field, value in numbers.items():
            if value is not None:
                raise UserError(
                    f"distributed.{field}={value} goes with distributed.coordinator=HOST:PORT, not with "
                    f"{config.coordinator or 'none'}"
                )
        return
    host, _, port = config.coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"distributed.coordinator={config.coordinator!r} must be HOST:PORT, auto or none")
    for field, value in numbers.items():
        if value is None:
            raise UserError(f"distributed.{field} is missing; distributed.coordinator={config.coordinator} needs it")
    if config.num_processes < 1 or not 0 <= config.process_id < config.num_processes:
        raise UserError(
            f"distributed.process_id={config.process_id} of distributed.num_processes={config.num_processes}: "
            "processes are numbered from 0"
        )


def join_processes(config: DistributedConfig) -> None:
    """Waits for the other processes; does nothing if there are none, or if this one has joined them before.

    Has to come before anything that asks jax for its devices.

    Raises:
      UserError: the configuration does not fit, or the machine says nothing of other processes.
      TryAgain: there was no connection: the port is still taken, say. (Where others do not come in `JOIN_SECONDS`, jax
        ends the process, with the same status.)
    """
    validate_distributed(config)
    if jax.distributed.is_initialized():
        return
    if config.coordinator is None:
        if jax.process_count() > 1:
            raise UserError(
                f"this is one of {jax.process_count()} processes of a slice; give --config.distributed.coordinator=auto"
            )
        return
    # It would take SIGTERM for itself.
    jax.config.update("jax_enable_preemption_service", False)
    options: dict[str, Any] = {
        "initialization_timeout": JOIN_SECONDS,
        "shutdown_timeout_seconds": SHUTDOWN_SECONDS,
        "heartbeat_timeout_seconds": config.heartbeat_seconds,
    }
    if config.coordinator != AUTO:
        options |= {"coordinator_address": config.coordinator, "cluster_detection_method": "deactivate"}
        options |= {"num_processes": config.num_processes, "process_id": config.process_id}
    try:
        jax.distributed.initialize(**options)
    except ValueError as error:
        raise UserError(f"distributed.coordinator={config.coordinator}: {error}") from error
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise TryAgain(f"distributed.coordinator={config.coordinator}: no connection: {told}") from error


def is_first() -> bool:
    """Whether this process is the one that writes what all share."""
    return jax.process_index() == 0


def own_file(path: Path) -> Path:
    """The name under which this process writes a file that every one of several has of its own: `hang_p1.txt`."""
    return path.with_stem(f"{path.stem}_p{jax.process_index()}") if jax.process_count() > 1 else path


def gather(value: Any) -> list[Any]:
    """What every process gives, in their order: anything that JSON can hold."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(text.size))
    padded = multihost_utils.process_allgather(np.pad(text, (0, int(sizes.max()) - text.size)))
    return [json.loads(bytes(row[:size])) for row, size in zip(padded, sizes, strict=True)]


_barriers = itertools.count()


def on_first(action: Callable[[], T]) -> T:
    """Runs `action` on process 0 only, while the others wait for it.

    Returns:
      On all processes what it returned: anything that JSON can hold.

    Raises:
      UserError: what `action` raised, on the other processes with the same text.
    """
    if jax.process_count() == 1:
        return action()
    result, error = None, None
    if is_first():
        try:
            result = action()
        except Exception as raised:
            error = raised
    # They wait on their hosts: devices that wait for others give up after minutes.
    multihost.get_barrier_sync_fn()(key=f"vita_jax_{next(_barriers)}", timeout_ms=1000 * WAIT_SECONDS)
    result, told = gather((result, None if error is None else f"{error}" or repr(error)))[0]
    if told is not None:
        raise error or UserError(f"process 0: {told}")
    return result


class Largest:
    """The largest number that any process has given, which all learn in the same call.

    Nothing waits for it: it is what was given `delay` calls before. With one process, it is the number itself.
    """

    def __init__(self, mesh: Mesh, delay: int) -> None:
        self._delay, self._asked = delay, deque[jax.Array]()
        self._each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, number: int) -> int:
        """Gives a number, gets the largest; all processes call it equally often."""
        if jax.process_count() == 1:
            return number
        own = np.full(jax.local_device_count(), number, np.int32)
        self._asked.append(self._largest(jax.make_array_from_process_local_data(self._each, own)))
        return int(self._asked.popleft()) if len(self._asked) > self._delay else 0
