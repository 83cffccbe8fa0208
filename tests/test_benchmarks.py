"""The benchmarks run: what they measure is not asserted, what they compute is."""

from __future__ import annotations

import pytest

from experiments.benchmarks import conversion
from vita_jax.errors import UserError

pytestmark = pytest.mark.slow


def test_conversion_gives_every_tensor_its_bits_and_leaves_nothing(tmp_path):
    steps, different = conversion.measure("small", tmp_path)
    assert [step.name for step in steps] == ["plain copy of one file", "import", "export"] and different == 0
    assert all(step.peak_gigabytes > 0 for step in steps[1:])
    assert not list(tmp_path.iterdir())
    (tmp_path / "small.run").mkdir()
    with pytest.raises(UserError, match=r"small\.run is in the way"):
        conversion.measure("small", tmp_path)
    table = conversion.format_steps("small", steps, different)
    assert "every tensor has its bits" in table and table.count("\n") == 4


def test_changed_bits_are_found(tmp_path):
    config = conversion.vita_small(32, 1, 32, 64)
    conversion.write_public(tmp_path, config)
    assert conversion.count_different(tmp_path, config) == 0
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert conversion.count_different(tmp_path, config) == 1
