"""Stages of the voice: who gets which gradient, what falls, what stays, what is dropped."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.tiny import Batches, experiment, make_batch, model_config, stage
from tests.training.voice import CODEC, SPEECH, crops, pairs, voice_config
from vita_jax.errors import UserError
from vita_jax.models.codec.codec import Codec
from vita_jax.models.codec.discriminators import Discriminators
from vita_jax.models.codec.losses import codec_losses, discriminator_loss
from vita_jax.models.vita import Vita
from vita_jax.parallel.rules import unbox
from vita_jax.training import loop
from vita_jax.training.checkpoint import checkpoint_folder, load_params
from vita_jax.training.metrics import read_metrics
from vita_jax.training.objectives import OBJECTIVES, init_params
from vita_jax.training.objectives.speech import CODEC_STATE, DISCRIMINATORS
from vita_jax.training.stages import flatten

pytestmark = pytest.mark.slow

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model_and_params():
    model = Vita(voice_config())
    return model, unbox(jax.jit(lambda key: init_params(model, OBJECTIVES["codec"], key))(KEY))


def test_each_side_gets_the_gradient_of_its_own_loss(model_and_params):
    model, params = model_and_params
    batch = {name: jnp.asarray(wave) for name, wave in crops(0).items()}
    trained = {name: params[name] for name in ("codec", DISCRIMINATORS)}

    def objective(trained):
        return OBJECTIVES["codec"].loss(model, {**params, **trained}, batch, KEY).loss / 4

    def two_losses(trained):
        training = model.config.codec_training
        made, _ = Codec(CODEC).apply(
            {"params": trained["codec"]}, batch["waves"], batch["other_waves"], mutable=["updates"]
        )

        def judge(side, wave):
            return Discriminators(training.discriminators).apply({"params": side}, wave)

        fixed, detached = jax.lax.stop_gradient((trained[DISCRIMINATORS], made.wave))
        codec = codec_losses(
            batch["waves"], made, judge(fixed, batch["waves"]), judge(fixed, made.wave), 1600, training.losses
        )["loss"]
        own = trained[DISCRIMINATORS]
        return codec, discriminator_loss(judge(own, batch["waves"]), judge(own, detached))

    @jax.jit
    def gradients(trained):
        apart = [jax.grad(lambda t, i=i: two_losses(t)[i])(trained) for i in range(2)]
        return jax.grad(objective)(trained), *apart

    joint, of_codec, of_discriminators = gradients(trained)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-3), joint["codec"], of_codec["codec"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-3),
        joint[DISCRIMINATORS],
        of_discriminators[DISCRIMINATORS],
    )
    assert all(not np.any(g) for g in jax.tree.leaves(of_codec[DISCRIMINATORS]))
    assert all(not np.any(g) for g in jax.tree.leaves(of_discriminators["codec"]))
    assert any(np.any(g) for g in jax.tree.leaves(joint[DISCRIMINATORS]))


def test_statistics_come_back_as_updates(model_and_params):
    model, params = model_and_params
    sums = jax.jit(lambda p, b: OBJECTIVES["codec"].loss(model, p, b, KEY))(params, crops(0))
    paths = set(flatten(params))
    assert set(sums.updates) <= paths
    state = {path for path in paths if path.split("/")[0] == CODEC_STATE}
    assert state <= set(sums.updates)
    assert {path for path in paths if path.startswith("codec/quantizer/")} <= set(sums.updates)
    assert {path for path in sums.updates if path.endswith("/u")}
    assert float(sums.updates[f"{CODEC_STATE}/step"]) == 1


def test_parameters_of_a_model_without_a_voice_are_the_same():
    def paths(config):
        draw = functools.partial(init_params, Vita(config), OBJECTIVES["language_modeling"])
        return flatten(unbox(jax.eval_shape(draw, KEY)))

    plain, voiced = paths(model_config()), paths(voice_config())
    assert {path for path in voiced if path.split("/")[0] not in ("codec", "speech")} == set(plain)


@dataclasses.dataclass
class VoiceBatches(Batches):
    """Four batches over and over, of the kind that the objective reads."""

    objective: str = ""

    def __next__(self):
        made = {"codec": crops, "speech_decoder": pairs, "cell_naming": make_batch}[self.objective](self.position % 4)
        self.position += 1
        return made


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """`codec` with discriminators from step 30 of 60, then `decoders`."""
    folder = tmp_path_factory.mktemp("voice")
    shared = {"warmup_ratio": 0.1, "codec_frames": 8, "row_tiles": 0}
    stages = (
        stage("codec", objective="codec", trainable=("^codec/",), steps=60, **shared),
        stage("decoders", objective="speech_decoder", trainable=("^speech/",), steps=60, start_from="codec", **shared),
    )
    config = experiment(folder, model=voice_config(30), stages=stages)
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every_steps=100))
    loop.run(config, make_batches=lambda _, s: VoiceBatches(0, 4, 8, 0, objective=s.objective))
    return folder


def test_losses_fall_and_discriminators_wait(run_dir):
    steps = [r for r in read_metrics(run_dir) if r["event"] == "step"]
    codec = [r for r in steps if r["stage"] == "codec"]
    assert all(r["discriminator"] == 0 for r in codec if r["step"] <= 30)
    assert all(r["discriminator"] > 0 and r["adversarial"] > 0 for r in codec if r["step"] > 30)
    assert codec[-1]["mel"] < 0.7 * codec[0]["mel"]
    assert codec[-1]["perplexity"] > 2
    decoders = [r for r in steps if r["stage"] == "decoders"]
    assert decoders[-1]["loss"] < 0.7 * decoders[0]["loss"]
    assert decoders[-1]["initial"] < decoders[0]["initial"]


def test_only_the_voice_changes_and_helpers_are_dropped(run_dir):
    saved = {name: flatten(load_params(checkpoint_folder(run_dir, name)).params) for name in ("codec", "decoders")}
    before, after = saved["codec"], saved["decoders"]
    assert set(before) == set(after)
    assert {path.split("/")[0] for path in before} == {"vision", "projector", "language", "codec", "speech"}
    for path in before:
        same = np.array_equal(before[path], after[path])
        assert same or path.startswith("speech/"), path
    # Statistics are kept, though no gradient reaches them: a fresh running mean is zero.
    assert np.any(before["codec/encoder/global_encoder/fn_2/running_mean"])


def test_what_does_not_fit_is_said(model_and_params):
    model, params = model_and_params
    with pytest.raises(UserError, match="multiple of the codec's hop"):
        OBJECTIVES["codec"].loss(model, params, {"waves": np.zeros((2, 17), np.float32)}, KEY)
    with pytest.raises(UserError, match="needs a codec"):
        OBJECTIVES["codec"].loss(Vita(model_config()), params, crops(0), KEY)
    with pytest.raises(UserError, match="must divide"):
        dataclasses.replace(voice_config(), speech=dataclasses.replace(SPEECH, hidden_size=12))
    with pytest.raises(UserError, match="set the config's `codec`"):
        dataclasses.replace(voice_config(), codec=None)
    with pytest.raises(UserError, match="speech.num_codes is 7"):
        dataclasses.replace(voice_config(), speech=dataclasses.replace(SPEECH, num_codes=7))
