"""Normalisation of log-mel features by the mean and variance of a corpus (`whale/cmvn.py` of VITA).

The statistics are fixed numbers; they live in the parameter tree because checkpoints hold them, and never train.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vita_jax.errors import UserError

VARIANCE_FLOOR = 1e-20

# Of the released VITA-1.0 and VITA-1.5 encoders: 80 mel bins of int16-scaled speech (their public preprocessor config).
# fmt: off
RELEASED_MEAN = (
    11.837255115918403, 12.473204615847946, 13.416767619583318, 14.077409846458519, 14.692713667734644,
    15.134646755356338, 15.425053998320841, 15.520304088736482, 15.664980906057181, 15.682885368714361,
    15.83134095973795, 15.901056812316575, 16.043105914428832, 16.141928413478638, 16.146063740161384,
    16.17268368755442, 16.13231180127601, 16.065540090344545, 16.170683092860383, 15.998216926090535,
    15.867837768614727, 16.081028935225024, 15.90913485828459, 16.032066529724602, 15.94857810175373,
    16.03539817911192, 15.919972463810511, 16.012130517613077, 15.93573072975294, 15.914797286475908,
    15.949416173227279, 15.914241247262952, 15.9205949984345, 15.979177455555364, 15.986889776762691,
    16.04603056604172, 16.110854420018935, 16.11681722403251, 16.129875546992444, 16.085759281189265,
    16.134709075491045, 16.09818475127177, 16.202892094198077, 16.195676195628295, 16.265984774543206,
    16.368600951439756, 16.48524192770144, 16.53072364237602, 16.58613266332892, 16.682058026108336,
    16.643586991407417, 16.62329213337083, 16.638263919106894, 16.703993486441295, 16.75845666749587,
    16.818435528248443, 16.88729840520967, 16.89038585593233, 16.816687157527294, 16.731004380992307,
    16.674947603018126, 16.562815703508104, 16.50694580056838, 16.427151307327705, 16.33695716109585,
    16.22435176840036, 16.122595445956836, 16.074572001519112, 16.045862034568927, 15.997705599309137,
    15.955502796282088, 15.925529416522258, 15.884868619147634, 15.847951054825177, 15.812488364237238,
    15.791251105720136, 15.698867196814575, 15.451057143452907, 15.043111236177761, 14.453490694177178,
)
RELEASED_ISTD = (
    0.3329853392031094, 0.304457074540202, 0.29546332871219255, 0.3016748868710893, 0.30146666620931134,
    0.29722031038819924, 0.2917111074466677, 0.28384523520067434, 0.28523771805804266, 0.2901033423245173,
    0.29489059636859316, 0.29547348893246006, 0.29620672776488977, 0.2956320049313563, 0.29470081603763376,
    0.2963227174569345, 0.2976606657847016, 0.3003491761055444, 0.30211458429446625, 0.30174903334867953,
    0.30016818970986625, 0.3033775994936976, 0.30356758993511046, 0.30603640492289896, 0.30671985841954447,
    0.3069228273662989, 0.30770085196779645, 0.3067656201661381, 0.3055203785780098, 0.30690623983421333,
    0.30723413937044297, 0.3088911065771803, 0.3091251382267279, 0.30986769010126597, 0.31000059868830204,
    0.30963732259143195, 0.3093967488140671, 0.30918562772813507, 0.30968744324817, 0.3085437993502015,
    0.309308051573859, 0.3087313674687873, 0.30814804868295664, 0.30722053416625006, 0.30732656820194293,
    0.3064066246045986, 0.30390658225471334, 0.302131011830547, 0.3014575331911756, 0.301449202764865,
    0.30039048343978525, 0.29975195531574894, 0.2993214974016792, 0.29809597194189, 0.2950458103872353,
    0.29250998818879875, 0.29285432953044965, 0.2928594451679315, 0.2922642564293608, 0.2934287968886421,
    0.2929937863211079, 0.2921845930953747, 0.2917417094543235, 0.28991734472060865, 0.2888153105794442,
    0.2870270977983177, 0.2843282542200158, 0.2827033299131669, 0.28035104778082265, 0.2782082983359874,
    0.27589950120001683, 0.27325842201376005, 0.27104919439201897, 0.2688075817805597, 0.26814315263564775,
    0.26998556725462286, 0.269346874312791, 0.2673887565870066, 0.2683233739448121, 0.2702135698992237,
)
# fmt: on


def cmvn_from_statistics(
    mean_stat: np.ndarray | Sequence[float],
    var_stat: np.ndarray | Sequence[float],
    frame_num: float,
    variance_floor: float = VARIANCE_FLOOR,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and inverse standard deviation of accumulated statistics.

    Args:
      mean_stat, var_stat: (m) sums and sums of squares over the frames.
      frame_num: how many frames.
      variance_floor: smallest variance.

    Returns:
      mean, istd: (m) float64.

    Raises:
      UserError: lengths differ, or there is no frame.
    """
    sums, squares = np.asarray(mean_stat, np.float64), np.asarray(var_stat, np.float64)
    if sums.shape != squares.shape or sums.ndim != 1 or frame_num < 1:
        raise UserError(
            f"CMVN statistics: {sums.shape} sums, {squares.shape} sums of squares and {frame_num} frames; expected two "
            "lists of one length and at least one frame"
        )
    mean = sums / frame_num
    return mean, 1.0 / np.sqrt(np.maximum(squares / frame_num - mean**2, variance_floor))


def parse_json_cmvn(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and istd, (m) float64, of a JSON file with `mean_stat`, `var_stat` and `frame_num`.

    Raises:
      UserError: not such a file.
    """
    try:
        values = json.loads(text)
        return cmvn_from_statistics(values["mean_stat"], values["var_stat"], values["frame_num"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"not a JSON CMVN file ({error!r}); it needs the fields mean_stat, var_stat, frame_num"
        ) from None


def parse_kaldi_cmvn(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and istd, (m) float64, of a Kaldi text matrix `[ sums... count squares... 0 ]`.

    Raises:
      UserError: a binary file, or no such matrix.
    """
    match = re.fullmatch(r"\s*\[([^\[\]]*)\]\s*", text)
    if match is None:
        raise UserError("not a Kaldi CMVN text file: expected one matrix in brackets (binary files are not read)")
    try:
        values = np.array(match.group(1).split(), np.float64)
    except ValueError as error:
        raise UserError(f"not a Kaldi CMVN text file: {error}") from None
    if values.size < 4 or values.size % 2:
        raise UserError(f"a Kaldi CMVN matrix has two rows of one length, but there are {values.size} numbers")
    sums, squares = np.split(values, 2)
    return cmvn_from_statistics(sums[:-1], squares[:-1], sums[-1])


class Cmvn(nn.Module):
    """`(x - mean) * istd` in float32; `mean` and `istd` (m) get no gradient.

    Attributes:
      statistics: what a fresh model holds: "released" (80 bins) or "identity".
    """

    statistics: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (... m) -> (... m) float32."""
        size = x.shape[-1]
        first = {"identity": (np.zeros(size), np.ones(size)), "released": (RELEASED_MEAN, RELEASED_ISTD)}
        mean, istd = (
            jax.lax.stop_gradient(
                self.param(
                    name,
                    nn.with_logical_partitioning(lambda key, values=values: jnp.asarray(values, jnp.float32), (None,)),
                )
            )
            for name, values in zip(("mean", "istd"), first[self.statistics], strict=True)
        )
        return (x.astype(jnp.float32) - mean) * istd
