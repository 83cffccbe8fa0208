"""Whatever is wrong with a public folder is one clear error, and leaves nothing behind that would load."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.exchange.public import public_vita
from vita_jax.conversion.torch_files import INDEX_NAME, TensorFiles, write_tensors
from vita_jax.errors import UserError
from vita_jax.exchange.exporting import export_checkpoint, open_checkpoint
from vita_jax.exchange.importing import ParamWriter, all_finite, import_released
from vita_jax.exchange.released import guess_model, read_released
from vita_jax.training.checkpoint import load_params


@pytest.fixture
def public(tmp_path):
    folder = tmp_path / "public"
    public_vita(folder, dtype="float32", shard_bytes=30_000)
    return folder


def rewrite(folder: Path, **changes: np.ndarray | None) -> None:
    """Replaces, adds or (None) removes tensors; `__` in a name stands for a dot."""
    tensors = dict(TensorFiles(folder))
    for file in folder.glob("model*safetensors*"):
        file.unlink()
    for name, array in changes.items():
        name = name.replace("__", ".")
        if array is None:
            del tensors[name]
        else:
            tensors[name] = array
    write_tensors(folder, tensors.items())


def refuse(folder: Path, message: str, model: str = "vita_1_5", **options: object) -> str:
    """Imports, expects one line of error with `message` in it, and that nothing loads."""
    run = folder.parent / "run"
    with pytest.raises(UserError, match=message) as error:
        import_released(read_released(model, folder), run, **options)
    text = str(error.value)
    assert "\n" not in text and str(folder) in text
    assert not run.exists()
    return text


def test_all_that_does_not_fit_is_in_one_message(public):
    wide = np.zeros((3, 3), np.float32)
    rewrite(public, model__norm__weight=None, model__stray=wide, lm_head__weight=wide)
    text = refuse(public, r"1 tensors missing: model\.norm\.weight")
    assert "1 tensors that nothing uses: model.stray" in text
    assert "1 tensors of another shape: lm_head.weight (3, 3) instead of" in text and "model.safetensors" in text


def test_what_is_allowed_by_name_is_left_out_and_said(public):
    wide = np.zeros((3, 3), np.float32)
    rewrite(public, model__norm__weight=None, model__stray=wide, lm_head__weight=wide)
    refuse(public, "tensors missing", allow=["unexpected", "misshapen"])
    run = public.parent / "run"
    warnings = import_released(read_released("vita_1_5", public), run, allow=["missing", "unexpected", "misshapen"])
    assert warnings == [
        "left out: language/norm/scale",
        "left out: language/lm_head/kernel",
        "passed over: model.stray",
    ]
    params = load_params(run).params["language"]
    assert "norm" not in params and "lm_head" not in params and "layers" in params


def test_truncated_shard(public):
    file = sorted(public.glob("model-*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-10])
    refuse(public, f"{file.name}: not a complete safetensors file")


def test_missing_shard(public):
    sorted(public.glob("model-*.safetensors"))[0].unlink()
    refuse(public, "which is not there; the download is incomplete")


def test_wrong_index(public):
    index = json.loads((public / INDEX_NAME).read_text())
    index["weight_map"]["lm_head.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    last = sorted(set(index["weight_map"].values()))
    if len(last) > 1:
        index["weight_map"]["lm_head.weight"] = last[1]
    (public / INDEX_NAME).write_text(json.dumps(index))
    refuse(public, "does not match its shards")


def test_a_config_that_contradicts_the_shapes(public):
    fields = json.loads((public / "config.json").read_text())
    (public / "config.json").write_text(json.dumps(fields | {"intermediate_size": 32}))
    refuse(public, r"mlp\.gate_proj\.weight \(24, 16\) instead of \(32, 16\)")
    (public / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 3}))
    refuse(public, r"12 tensors missing: model\.layers\.2\.")
    (public / "config.json").write_text(json.dumps(fields | {"hidden_act": "gelu"}))
    refuse(public, "hidden_act 'gelu' is not offered")


@pytest.mark.parametrize(
    ("content", "message"), [("{", "cannot be read"), ("[]", "holds a list"), (None, "there is no")]
)
def test_config_file(public, content, message):
    (public / "config.json").unlink() if content is None else (public / "config.json").write_text(content)
    refuse(public, message)


def test_the_other_model(public):
    refuse(public, "use --model vita_1_5", model="vita_1_0")
    refuse(public, "there is no model.json|tensor .* is in none of the codec's parts", model="codec")


def test_wrong_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="expected model.safetensors, .*; found none"):
        read_released("vita_1_5", tmp_path / "empty")
    with pytest.raises(UserError, match="does not exist"):
        read_released("vita_1_5", tmp_path / "nowhere")
    with pytest.raises(UserError, match="unknown; use one of vita_1_5"):
        read_released("vita", tmp_path)
    write_tensors(tmp_path / "other", [("a", np.zeros(3))])
    with pytest.raises(UserError, match="those of no known model"):
        guess_model(tmp_path / "other")


def test_values_that_are_no_numbers_are_warned_of(public):
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        good = np.zeros(4, dtype)
        bad = good.copy()
        bad[2] = np.nan
        assert all_finite(good) and not all_finite(bad)
    assert all_finite(np.ones(2, np.int32))
    rewrite(public, model__norm__weight=np.full(16, np.nan, np.float32))
    warnings = import_released(read_released("vita_1_5", public), public.parent / "run")
    assert warnings == ["model.safetensors: tensor model.norm.weight holds values that are no finite numbers"]


def test_a_disk_that_fills_up(public, monkeypatch):
    def full(self, rule, dtype):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ParamWriter, "_array", full)
    run = public.parent / "run"
    with pytest.raises(UserError, match="cannot be written: .*No space left on device"):
        import_released(read_released("vita_1_5", public), run)
    assert not run.exists()


def test_nothing_is_overwritten(public):
    run = public.parent / "run"
    import_released(read_released("vita_1_5", public), run)
    with pytest.raises(UserError, match="run is there already"):
        import_released(read_released("vita_1_5", public), run)
    with pytest.raises(UserError, match="is there already"):
        export_checkpoint(open_checkpoint(run), public)


def test_layers_of_different_dtypes(public):
    rewrite(public, model__layers__1__input_layernorm__weight=np.zeros(16, np.float16))
    run = public.parent / "run"
    with pytest.raises(UserError, match="input_layernorm.weight: dtype float16, but others"):
        import_released(read_released("vita_1_5", public), run)
    assert not run.exists()


def test_a_tokenizer_that_cannot_be_used_is_said_before_the_weights(public, monkeypatch):
    (public / "tokenizer_config.json").unlink()
    monkeypatch.setattr(ParamWriter, "write", None)
    with pytest.raises(UserError, match="tokenizer.json needs tokenizer_config.json"):
        import_released(read_released("vita_1_5", public), public.parent / "run")
