"""The benchmarks run: what they measure is not asserted, what they compute is."""

from __future__ import annotations

import pytest

from experiments.benchmarks import conversion, loader
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


def test_every_modality_is_read_by_both_loaders():
    rates = list(loader.run(2, loader.MODALITIES))
    assert [rate.modality for rate in rates] == list(loader.MODALITIES)
    for rate in rates:
        assert rate.records > 0 and rate.torch_records > 0 and 0 < rate.fill <= 1
        assert (rate.media > 0) == (rate.modality != "text")
    table = loader.format_rates(rates, 4.59e14)
    assert table.count("\n") == 5 and "one chip trains 4,026 tokens/s" in table
    with pytest.raises(UserError, match="'smell' is unknown"):
        next(loader.run(2, ["smell"]))
