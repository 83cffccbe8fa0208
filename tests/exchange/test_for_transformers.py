"""A LLaVA that was trained here, in transformers: the same pixels, tokens and logits from the exported folder alone."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.exchange.test_llava import public_llava, trained
from vita_jax.conversion.tables import flatten
from vita_jax.conversion.torch_files import TensorFiles
from vita_jax.data.images import ImageConfig, normalise, single_tile
from vita_jax.data.llava_prompts import encode_prompt
from vita_jax.data.splice import FeatureLayout, expand_placeholders, pad_rows
from vita_jax.data.templates import get_template
from vita_jax.data.tokenizer import load_tokenizer, train_sentencepiece
from vita_jax.data.vocabulary import enlarge
from vita_jax.errors import UserError
from vita_jax.exchange.exporting import Stored, export_checkpoint, open_checkpoint
from vita_jax.exchange.importing import import_released
from vita_jax.exchange.released import read_released
from vita_jax.models import llava_weights
from vita_jax.models.llava import Llava
from vita_jax.models.vita import VitaInputs

QUESTION = "Two things, 12 & é,\nare\tthere?"
PIXELS = np.random.default_rng(1).integers(0, 256, (11, 19, 3), dtype=np.uint8)


def ours(stored: Stored) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids with -200 in the picture's places, normalised pixels (3 S S), and logits (s v)."""
    config = stored.config
    tokenizer, template = load_tokenizer(stored.run_dir / "tokenizer"), get_template(config.template)
    prompt = encode_prompt(f"<image>\n{QUESTION}", tokenizer=tokenizer, template=template)
    span = FeatureLayout(config.model.tokens_per_tile).tile_span(0)
    row = pad_rows([expand_placeholders(prompt.input_ids.tolist(), None, [span])])
    row.pop("labels")
    tile = single_tile(Image.fromarray(PIXELS), config.image)
    model, variables = Llava(config.model), {"params": jax.tree.map(jnp.asarray, stored.params)}
    with jax.default_matmul_precision("highest"):
        hidden = model.apply(variables, VitaInputs(tiles=tile[None, None], **row))
        logits = model.apply(variables, hidden, method="logits")[0]
    ids = np.where(row["feature_index"][0] >= 0, -200, row["tokens"][0])
    return ids, np.moveaxis(normalise(tile, config.image), -1, 0), np.asarray(logits)


def theirs(folder) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same by transformers."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    text = f"USER: <image>\n{QUESTION} ASSISTANT:"
    inputs = processor(text=text, images=Image.fromarray(PIXELS), return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0].numpy()
    ids = inputs["input_ids"][0].numpy()
    return np.where(ids == model.config.image_token_id, -200, ids), inputs["pixel_values"][0].numpy(), logits


def assert_same(folder, stored: Stored) -> None:
    (ids, pixels, logits), (got_ids, got_pixels, got) = ours(stored), theirs(folder)
    np.testing.assert_array_equal(got_ids, ids)
    np.testing.assert_allclose(got_pixels, pixels, atol=1e-6)
    used, tolerance = load_tokenizer(stored.run_dir / "tokenizer").vocab_size, 1e-4 * np.abs(logits).max()
    np.testing.assert_allclose(got[:, :used], logits[:, :used], atol=tolerance)
    new = got[:, used : used + 2]
    np.testing.assert_allclose(new, np.broadcast_to(logits[:, :used].mean(1)[:, None], new.shape), atol=tolerance)
    assert got.shape[1] == (logits.shape[1] if used + 2 <= logits.shape[1] else -(-(used + 2) // 64) * 64)


@pytest.mark.parametrize("layout", ["hf", "hf_5", "hf_memory"])
def test_a_run_of_ours_sees_pictures_there(tmp_path, layout):
    image = ImageConfig.clip(8, "square" if layout == "hf_5" else "pad")
    stored = trained(tmp_path / "run", image=image)
    export_checkpoint(stored, tmp_path / "public", layout=layout)
    assert_same(tmp_path / "public", stored)


def test_with_a_tokenizer_of_ours(tmp_path):
    texts = ["USER: two things, 12 & ASSISTANT: are there?", "one thing is there"] * 9
    tokenizer = train_sentencepiece(texts, 299, None, at_most=True)
    enlarge(tokenizer, [], ("</s>",)).tokenizer.save(tmp_path / "tokenizer")
    stored = trained(tmp_path / "run", tmp_path / "tokenizer", 310)  # with spare rows, which are used
    export_checkpoint(stored, tmp_path / "public", layout="hf")
    assert_same(tmp_path / "public", stored)
    end = json.loads((tmp_path / "public" / "generation_config.json").read_text())["eos_token_id"]
    own = load_tokenizer(tmp_path / "tokenizer")
    assert set(end) == {own.eos_id, own.token_to_id("</s>")}


def test_one_of_the_original_comes_back_with_more_rows(tmp_path):
    config = public_llava(tmp_path / "original", "original")
    import_released(read_released("llava", tmp_path / "original"), tmp_path / "run")
    stored, rows = open_checkpoint(tmp_path / "run"), config.language.vocab_size
    export_checkpoint(stored, tmp_path / "public", layout="hf_5")
    assert set(llava_weights.weight_table(config, "hf_5").torch_names) == set(TensorFiles(tmp_path / "public"))
    import_released(read_released("llava", tmp_path / "public"), tmp_path / "back")
    back, tokenizer = open_checkpoint(tmp_path / "back"), load_tokenizer(tmp_path / "back" / "tokenizer")
    assert back.config.image == stored.config.image and tokenizer.token_to_id("<image>") == rows
    got = flatten(back.params)
    for path, leaf in flatten(stored.params).items():
        whole = np.asarray(got[path])
        kept = whole[:rows] if "embed_tokens" in path else whole[:, :rows] if "lm_head" in path else whole
        np.testing.assert_array_equal(kept, leaf, err_msg=path)
    # It has both tokens now: nothing is added again, neither from there nor from a run that went on from it.
    export_checkpoint(back, tmp_path / "same", layout="hf_5")
    shutil.rmtree(tmp_path / "back" / "original")
    export_checkpoint(open_checkpoint(tmp_path / "back"), tmp_path / "again", layout="hf_5")
    for folder in ("same", "again"):
        for name in ("tokenizer.json", "config.json", "preprocessor_config.json", "model.safetensors"):
            assert (tmp_path / folder / name).read_bytes() == (tmp_path / "public" / name).read_bytes(), name


def test_padding_is_read_where_only_the_processor_says_it(tmp_path):
    export_checkpoint(trained(tmp_path / "run"), tmp_path / "public", layout="hf")
    fields = json.loads((tmp_path / "public" / "config.json").read_text())
    assert fields.pop("image_aspect_ratio") == "pad"
    (tmp_path / "public" / "config.json").write_text(json.dumps(fields))
    assert read_released("llava", tmp_path / "public").aspect == "pad"
    pixels = (tmp_path / "public" / "preprocessor_config.json").read_text()
    (tmp_path / "public" / "preprocessor_config.json").unlink()
    assert read_released("llava", tmp_path / "public").aspect == "square"
    (tmp_path / "public" / "processor_config.json").write_text(f'{{"image_processor": {pixels}}}')
    assert read_released("llava", tmp_path / "public").aspect == "pad"


def test_without_a_tokenizer_it_is_refused(tmp_path):
    stored = trained(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    with pytest.raises(UserError, match="there is no tokenizer .* need one with <image> in it; use --layout original"):
        export_checkpoint(stored, tmp_path / "public", layout="hf")
    assert not (tmp_path / "public").exists()
