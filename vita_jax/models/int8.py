"""The language model's weights as integers of 8 bits, for inference: functions on parameters, one after the other.

Of a kernel W (*stack *inputs *outputs) two leaves are made, and `nn.Dense` and the experts use them as they find them:

    kernel        int8, as W
    kernel_scale  float32 (*stack *outputs), the largest value of a column divided by 127.5

W is their product with an error of at most half a scale. Scales, rounding and saturation are those of Qwix
(`qwix.quantize`, symmetric, a scale per output), which is needed only where weights are made integers. Its providers,
which intercept the products of a model while it runs, are not used: they know neither stacks of layers nor the grouped
products of experts, and they change functions of jax that other threads are using.

Integers are all projections, all experts and the output head. Norms, biases and the embedding table (which is looked
up, not multiplied) stay as they are; so does the router, whose rounded logits would send tokens to other experts; and
so do towers, connectors and voice, which have few of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vita_jax.conversion.tables import Table, flatten, unflatten
from vita_jax.errors import UserError
from vita_jax.models.lora import KERNEL, LANGUAGE_MODEL, find_sites, is_adapter
from vita_jax.nn.layers import KERNEL_SCALE

# The output head of a bare decoder, or of the one inside VITA.
HEAD = r"^(language/)?lm_head$"
# Its dtype is that of the kernels before they became integers.
_TABLE = "embed_tokens/embedding"

# What is made integers at a time: 64 MiB as float32, several of which the arithmetic takes.
QUANTIZED_VALUES = 2**24

# What becomes of a parameter: its path and value (array, or anything that is read like one) -> paths and values.
LeafChange = Callable[[str, Any], Mapping[str, Any]]


def int8_weights(table: Table) -> LeafChange:
    """What makes a model's parameters ready for inference with int8 weights, one at a time.

    Args:
      table: the weight table of the model.

    Returns:
      A function of a parameter's path and value. A kernel of the language model gives `kernel` and `kernel_scale` as
      numpy arrays; it is read layer by layer and made integers `QUANTIZED_VALUES` at a time, so that no more than a
      layer of it, or the output head, is in memory as it was. Everything else is given back as it is.

    Raises:
      UserError: Qwix is not installed; and from the function, for a part of an adapter (LoRA), which has to be merged.
    """
    quantize = _quantizer()
    sites = {site.path + KERNEL: site for site in find_sites(table, (LANGUAGE_MODEL, HEAD))}

    def change(path: str, leaf: Any) -> Mapping[str, Any]:
        if is_adapter(path):
            raise UserError(
                f"int8 weights: the model has LoRA adapters ({path}) that are not merged; `python -m vita_jax.convert "
                "export --layout vita_jax --from DIR --to NEW` merges them, then use NEW"
            )
        site = sites.get(path)
        if site is None:
            return {path: leaf}
        values = np.empty(leaf.shape, np.int8)
        scales = np.empty((*site.stack, *site.outputs), np.float32)
        # An expert's axis is one of the outputs here: every expert has scales of its own.
        layers = site.stack[:1]
        inputs = tuple(len(site.stack) - len(layers) + axis for axis in range(len(site.inputs)))
        for index in np.ndindex(layers):
            part = np.asarray(leaf[index] if layers else leaf)
            columns = max(1, QUANTIZED_VALUES * part.shape[-1] // part.size)
            for start in range(0, part.shape[-1], columns):
                place = (*index, ..., slice(start, start + columns))
                some = np.asarray(part[place[len(index) :]], np.float32)
                values[place], scales[place] = quantize(some, inputs=inputs)
        return {path: values, f"{site.path}/{KERNEL_SCALE}": scales}

    return change


def _quantizer() -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Kernel float32, axes of its inputs -> int8 of the same shape, and float32 scales without these axes."""
    try:
        import qwix  # only who wants integers needs it
    except ImportError as error:
        raise UserError(f"int8 weights need Qwix: pip install 'vita_jax[int8]' ({error})") from error

    @partial(jax.jit, static_argnames="inputs")
    def quantize(kernel: jax.Array, inputs: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        outputs = [axis for axis in range(kernel.ndim) if axis not in inputs]
        made = qwix.quantize(kernel, jnp.int8, channelwise_axes=outputs)
        return made.qvalue, jnp.squeeze(made.scale, inputs)

    return quantize


def change_params(params: Mapping[str, Any], change: LeafChange) -> dict[str, Any]:
    """A tree with every parameter changed; a file is better changed while it is read (`load_params`)."""
    return unflatten(new for path, leaf in flatten(params).items() for new in change(path, leaf).items())


def weight_bytes(params: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of all parameters as they are, and as they would be with floats where integers are."""
    leaves = flatten(params)
    floats = next((leaf.dtype.itemsize for path, leaf in leaves.items() if path.endswith(_TABLE)), 4)
    now = before = 0
    for path, leaf in leaves.items():
        size = math.prod(leaf.shape)
        now += size * leaf.dtype.itemsize
        before += 0 if _is_scale(path) else size * (floats if leaf.dtype == jnp.int8 else leaf.dtype.itemsize)
    return now, before


def num_weights(params: Mapping[str, Any]) -> int:
    """How many parameters there are; scales of integers are none."""
    return sum(math.prod(leaf.shape) for path, leaf in flatten(params).items() if not _is_scale(path))


def _is_scale(path: str) -> bool:
    return path.rpartition("/")[2] == KERNEL_SCALE
