"""What several processes of one run agree on."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest

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


@pytest.mark.slow
def test_a_checkpoint_holds_the_lanes_of_all_processes():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-c", SCRIPT, place]
    running = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True) for i in range(2)]
    states = [json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in running]
    assert states == [{"lanes": {"0": {"taken": 7}, "1": {"taken": 49}}, "given": 0}] * 2
