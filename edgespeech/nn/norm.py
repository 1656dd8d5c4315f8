"""Layer normalisation whose arithmetic stays in the activations' own format."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from edgespeech.errors import InputError
from edgespeech.ops.norm import PreNormalizer, lp_normalize, scale_shift
from edgespeech.types import Frames


class LpLayerNorm(nnx.Module):
    """`lp_normalize(x) * scale + bias` over the channels of every frame (see `edgespeech.ops.norm`).

    With p = 2 it is `nnx.LayerNorm` with the same parameters, which computes its statistics in float32; this one
    computes them in the dtype of its input, and stays finite there.

    Args:
        d: channels.
        p: exponent of the norm.
        epsilon: as in layer normalisation.
        pre_normalizer: what keeps powers in range.
        dtype: of the computation; None: that of the input.
        param_dtype: of the parameters.

    Attributes:
        scale, bias: `[d]`.
    """

    def __init__(
        self,
        d: int,
        *,
        p: int = 2,
        epsilon: float = 1e-5,
        pre_normalizer: PreNormalizer = PreNormalizer.MAD,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.scale = nnx.Param(jnp.ones(d, param_dtype))
        self.bias = nnx.Param(jnp.zeros(d, param_dtype))
        self.p = p
        self.epsilon = epsilon
        self.pre_normalizer = pre_normalizer
        self.dtype = dtype

    @classmethod
    def from_layer_norm(
        cls,
        norm: nnx.LayerNorm,
        *,
        pre_normalizer: PreNormalizer = PreNormalizer.MAD,
        dtype: DTypeLike | None = None,
    ) -> "LpLayerNorm":
        """The same function with a copy of the same parameters: nothing has to be trained again.

        Raises:
            InputError: the norm has no scale or no bias.
        """
        if norm.scale is None or norm.bias is None:
            raise InputError(
                "LpLayerNorm.from_layer_norm got a norm without scale or bias: "
                "make it with use_scale=True and use_bias=True"
            )
        scale, bias = norm.scale[...], norm.bias[...]
        new = cls(
            scale.shape[0],
            epsilon=norm.epsilon,
            pre_normalizer=pre_normalizer,
            dtype=dtype,
            param_dtype=scale.dtype,
        )
        new.scale[...], new.bias[...] = scale, bias
        return new

    def __call__(self, x: Frames) -> Frames:
        """`[b n d] -> [b n d]`; a frame's output depends on that frame alone."""
        if self.dtype is not None:
            x = x.astype(self.dtype)
        y = lp_normalize(x, self.p, self.epsilon, self.pre_normalizer)
        return scale_shift(y, self.scale[...], self.bias[...])
