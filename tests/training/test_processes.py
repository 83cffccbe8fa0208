"""What several processes of one run agree on."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest

from tests.training.test_checkpoint import save_some

SCRIPT = """
import json, sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from vita_jax.training.loop import gathered_state

class Batches:
    def get_state(self):
        return {"lanes": {str(jax.process_index()): {"taken": 7 ** (jax.process_index() + 1)}}, "given": 0}

print(json.dumps(gathered_state(Batches())))
"""


FIND = """
import json, sys
from types import SimpleNamespace
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from pathlib import Path
from vita_jax.errors import UserError
from vita_jax.training.loop import usable_checkpoint

found = []
for folder in sys.argv[3:]:
    try:
        meta = usable_checkpoint(SimpleNamespace(stream=sys.stderr), SimpleNamespace(title="s"), Path(folder))
        found.append(meta and meta["step"])
    except UserError as error:
        found.append("error")
print(json.dumps(found))
"""


def in_two_processes(script: str, *arguments: str) -> list:
    """What each of two processes prints in its last line."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-c", script, place]
    running = [subprocess.Popen([*command, str(i), *arguments], stdout=subprocess.PIPE, text=True) for i in range(2)]
    return [json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in running]


@pytest.mark.slow
def test_a_checkpoint_holds_the_lanes_of_all_processes():
    states = in_two_processes(SCRIPT)
    assert states == [{"lanes": {"0": {"taken": 7}, "1": {"taken": 49}}, "given": 0}] * 2


@pytest.mark.slow
def test_all_processes_go_on_from_the_checkpoint_that_the_first_finds(tmp_path):
    """The newest is damaged; or all are; or there is none."""
    some, none = tmp_path / "some", tmp_path / "none"
    some_folder, _, _ = save_some(some, steps=(2, 4))
    all_folder, _, _ = save_some(none, steps=(2, 4))
    for folder in (some_folder / "4", all_folder / "4", all_folder / "2"):
        (folder / "meta" / "metadata").write_text("{")
    found = in_two_processes(FIND, str(some_folder), str(all_folder), str(tmp_path / "nothing"))
    assert found == [[2, "error", None]] * 2
    assert (some_folder / "damaged-4").is_dir() and not (all_folder / "damaged-4").exists()
