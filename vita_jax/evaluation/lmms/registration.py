"""What lmms-eval finds by the entry point `lmms_eval.models` of this package: `--model vita_jax`."""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest

MODEL = "vita_jax"


def manifest() -> ModelManifest:
    """The chat model, and the "simple" one that also ranks options by their likelihood (`--force_simple`)."""
    module = "vita_jax.evaluation.lmms.models"
    return ModelManifest(MODEL, simple_class_path=f"{module}.VitaJaxSimple", chat_class_path=f"{module}.VitaJaxChat")
