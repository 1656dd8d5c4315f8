"""Learnable Pulse Accumulation (LPA): a token mixer that is linear in the number of frames.

LPA (Shkolnikov 2026, arXiv 2603.16922) replaces query-key products by learned gates: rectangles
placed by content, periodic windows and functions of the position. A pulse averages what is inside
it; at inference its gate is 0 or 1. The equations, initial values and temperatures below are ours:
a reading consistent with the paper's abstract, not a copy of its design.

    v = x W_V + b_V                                   z = DWConv(x)
    A_p = sum_i g_pi v_i / (sum_i g_pi + eps)
    y_i = sum_p alpha_p g_pi A_p + sum_(k, j in window k of i) w_ik v_j + lambda DWConv(v)_i
    out = concat_h(y) W_O + b_O

The middle sum is of windows that move with the frame: see `nn.relative_windows`.
"""

from typing import Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from edgespeech.errors import InputError
from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.lpa_config import LPAConfig
from edgespeech.nn.relative_windows import RelativeWindows
from edgespeech.nn.rotary import RotarySelfAttention
from edgespeech.ops import pulse
from edgespeech.ops.accumulate import EPS, broadcast, pulse_average, run_average, run_broadcast
from edgespeech.ops.conv import depthwise_conv
from edgespeech.ops.mask import mask_from_lengths, zero_padding
from edgespeech.types import Array, Bool, Float, Frames, Lengths, Mask, Scalar

Init = Literal["attention", "fit", "random"]  # of the projections: see `LPA.from_attention`
# Temperatures at progress 0 and 1 (ours). A rectangle's is in frames; the other gates' has no unit.
RECTANGLE_TAU = (8.0, 0.25)
GATE_TAU = (1.0, 0.02)


@nnx.register_variable_name("anneal")
class Anneal(nnx.Variable):
    """Annealing state: part of the model's state and of checkpoints, but not for the optimiser."""


@nnx.register_variable_name("kept_gates")
class KeptGates(nnx.Variable):
    """Lengths `[b]` and their `LPA.length_gates`: see `nn.kept_gates`. Saved nowhere."""


class LPA(nnx.Module):
    """Learnable Pulse Accumulation mixer, `(x [b n d], lengths [b]) -> [b n d]`.

    Padding never changes a valid frame. Gates and sums are float32 whatever `dtype` is; the output
    on padding is finite and has no meaning.

    Initial values (ours): rectangles have anchors spread evenly over the utterance in each head and
    widths from 1/2 (first head) to 1/32 (last head) of it; every pulse weighs `alpha = 1/p`; the
    local path starts as the mean over its window, because attention's output too is an average of
    values: an identity kernel would start far above its scale.

    Attributes:
        v_proj, out_proj: linear layers `d -> d`, the two that attention also has.
        progress: position in the temperature curriculum, float32 in [0, 1]; geometric from tau
            8 to 0.25 frames for rectangles and 1 to 0.02 for the other gates.
        hard: straight-through strength of the binary gates, float32 in [0, 1].
        inference: static; binary gates by comparisons only (`harden`).

    Raises:
        InputError: num_heads does not divide the width.
    """

    # Whether the convolutions reach only into the past.
    causal = False
    kept: KeptGates  # set by `keep_gates`

    def __init__(
        self,
        d: int,
        num_heads: int,
        config: LPAConfig,
        *,
        rngs: nnx.Rngs,
        inference: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        if d % num_heads:
            raise InputError(
                f"LPA width {d} is not a multiple of num_heads {num_heads}; change either one"
            )
        self.config = config
        self.num_heads = num_heads
        self.inference = inference
        self.progress = Anneal(jnp.zeros((), jnp.float32))
        self.hard = Anneal(jnp.zeros((), jnp.float32))
        self.v_proj = nnx.Linear(d, d, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.out_proj = nnx.Linear(d, d, rngs=rngs, dtype=dtype, param_dtype=param_dtype)

        def param(value) -> nnx.Param:
            return nnx.Param(jnp.asarray(value, param_dtype))

        def linear_map(pulses: int) -> nnx.Param:
            init = nnx.initializers.normal(d**-0.5)
            return nnx.Param(init(rngs.params(), (d, num_heads, pulses), param_dtype))

        h, c = num_heads, config
        if c.aperiodic or c.runs or c.octaves or c.readout == "content":
            delta = np.zeros((c.kernel_size, d))
            delta[-1 if self.causal else c.kernel_size // 2] = 1.0
            self.content_kernel = param(delta)
        if c.aperiodic:
            self.rho_kernel = linear_map(c.aperiodic)
            self.rho_bias = param(np.zeros((h, c.aperiodic)))
            anchors = (np.arange(c.aperiodic) + 0.5) / c.aperiodic
            self.anchor = param(np.tile(anchors, (h, 1)))
            # Zero: widths start the same for all content, spread over the heads.
            self.width_kernel = param(np.zeros((d, h, c.aperiodic)))
            share = 0.5 * 2.0 ** -np.linspace(0.0, 4.0, h)
            width_bias = np.log(share / (1 - share))[:, None]
            self.width_bias = param(np.tile(width_bias, (1, c.aperiodic)))
        if c.runs:
            self.run_kernel = linear_map(c.runs)
            self.run_bias = param(np.zeros((h, c.runs)))
        if c.periodic:
            golden = np.arange(h * c.periodic) * (5**0.5 - 1) / 2
            self.phase = param((golden % 1.0).reshape(h, c.periodic))
            self.duty_logit = param(np.zeros((h, c.periodic)))
        if c.positional:
            noise = jax.random.normal(rngs.params(), (h, c.positional, c.num_basis), param_dtype)
            # Falling with the order, so that windows start broad; the constant is beta's.
            amplitude = np.concatenate([[0.0], 1.0 / np.arange(1, c.num_basis)])
            self.cosine = param(noise * amplitude)
            self.cosine_bias = param(np.zeros((h, c.positional)))
        if c.num_pulses:
            self.alpha = param(np.full((h, c.num_pulses), 1.0 / c.num_pulses))
            if c.readout == "content":
                self.readout_kernel = param(np.zeros((d, h, c.num_pulses)))
                self.readout_bias = param(np.zeros((h, c.num_pulses)))
        if c.octaves:
            if self.causal:
                raise InputError(
                    "a streaming LPA has no windows to come: set LPAConfig.octaves to 0"
                )
            self.relative = RelativeWindows(
                d, h, c.taps, c.octaves, rngs=rngs, param_dtype=param_dtype
            )
        if c.local:
            self.local_kernel = param(np.full((c.local_kernel_size, d), 1 / c.local_kernel_size))
            self.local_scale = param(np.ones(h))

    @classmethod
    def from_attention(
        cls,
        attention: SelfAttention | RotarySelfAttention,
        config: LPAConfig,
        *,
        rngs: nnx.Rngs,
        init: Init = "attention",
    ) -> Self:
        """LPA that starts with the attention's value and output projections, copied; missing biases are zero.

        The paper's "selective initialisation" is, as we read it, this; everything else is new. With `init="random"`
        nothing is copied but the sizes; "fit" is for whoever has data: see `conversion.fit`, which starts from here.
        """
        v_proj = attention.v_proj
        lpa = cls(
            v_proj.in_features,
            attention.num_heads,
            config,
            rngs=rngs,
            dtype=v_proj.dtype,
            param_dtype=v_proj.param_dtype,
        )
        if init == "random":
            return lpa
        for ours, theirs in ((lpa.v_proj, v_proj), (lpa.out_proj, attention.out_proj)):
            nnx.update(ours, nnx.state(copy_module(theirs)))
        return lpa

    def __call__(self, x: Frames, lengths: Lengths) -> Frames:
        """`[b n d], [b] -> [b n d]`."""
        mask = mask_from_lengths(lengths, x.shape[1])
        x = zero_padding(x, mask)
        v = self.v_proj(x)
        z = self._content(x, mask)
        y = local = None
        if self.config.num_pulses:
            gates = self._gates(z, lengths, mask)
            y = self._pulses(gates, self._heads(v), self._readout(z))
        if self.config.octaves:
            near = self.relative(z, v, mask).swapaxes(1, 2)
            y = near if y is None else y + near
        if self.config.local:
            local = depthwise_conv(v, self.local_kernel[...], mask)
        return self._output(y, local, v.dtype)

    def gates(self, x: Frames, lengths: Lengths) -> dict[str, Float[Array, "b h p n"]]:
        """Gates of each kind present, at the current temperature, in the order of `alpha`."""
        mask = mask_from_lengths(lengths, x.shape[1])
        z = self._content(zero_padding(x, mask), mask)
        gates = self._gates(z, lengths, mask)
        return {kind: gate.astype(jnp.float32) for kind, gate in gates.items()}

    def _content(self, x: Frames, mask: Mask) -> Frames:
        """What content gates read, in the compute dtype; x itself where there are none."""
        if not hasattr(self, "content_kernel"):
            return x
        x = x.astype(self.v_proj.dtype or x.dtype)
        return depthwise_conv(x, self.content_kernel[...], mask)

    def _scores(self, z: Frames, *kernels: nnx.Param) -> Float[Array, "b n h k"]:
        """`z W` for several maps in one product, float32, side by side in the last axis."""
        kernel = jnp.concatenate([kernel[...] for kernel in kernels], axis=-1).astype(z.dtype)
        d, h, k = kernel.shape
        return (z @ kernel.reshape(d, h * k)).reshape(*z.shape[:2], h, k).astype(jnp.float32)

    def _heads(self, v: Frames) -> Float[Array, "b h n c"]:
        return v.reshape(*v.shape[:2], self.num_heads, -1).swapaxes(1, 2)

    def _output(
        self, y: Float[Array, "b h n c"] | None, local: Frames | None, dtype: DTypeLike
    ) -> Frames:
        """`concat_h(y + lambda local) W_O + b_O`; either term may be missing."""
        total = jnp.zeros((), jnp.float32)
        if y is not None:
            b, h, n, c = y.shape
            total = total + y.swapaxes(1, 2).reshape(b, n, h * c)
        if local is not None:
            scale = jnp.repeat(_float32(self.local_scale), local.shape[-1] // self.num_heads)
            total = total + scale * local.astype(jnp.float32)
        return self.out_proj(total.astype(dtype))

    def _temperature(self, first: float, last: float) -> Scalar:
        return first * (last / first) ** self.progress[...]

    def _hard(self) -> pulse.Hard:
        return True if self.inference else self.hard[...]

    def _gates(self, z: Frames, lengths: Lengths, mask: Mask) -> dict[str, pulse.Gates]:
        """Gates `[b h p n]` by kind."""
        c, gates = self.config, {}
        if c.aperiodic:
            tau = self._temperature(*RECTANGLE_TAU)
            bounds = self._rectangles(z, lengths, mask)
            gates["aperiodic"] = pulse.rectangle_gates(*bounds, mask, tau, self._hard())
        if c.runs:
            gates["runs"] = self._run_gates(z, mask)
        gates |= self._kept_or_new(lengths, mask.shape[1])
        if c.mean:
            gates["mean"] = self._mean_gates(mask)
        return gates

    def length_gates(self, lengths: Lengths, n: int) -> dict[str, pulse.Gates]:
        """Gates `[b h p n]` that lengths and parameters decide, whatever is heard: periodic and positional ones."""
        c, gates = self.config, {}
        tau, hard = self._temperature(*GATE_TAU), self._hard()
        if c.periodic:
            period = pulse.log_spaced_periods(self.num_heads, c.periodic, c.max_period)
            duty = jax.nn.sigmoid(_float32(self.duty_logit))
            phase, mask = _float32(self.phase), mask_from_lengths(lengths, n)
            gates["periodic"] = pulse.periodic_gates(period, phase, duty, mask, tau, hard)
        if c.positional:
            series = _float32(self.cosine), _float32(self.cosine_bias)
            gates["positional"] = pulse.positional_gates(*series, lengths, n, tau, hard)
        return gates

    def _kept_or_new(self, lengths: Lengths, n: int) -> dict[str, pulse.Gates]:
        """`length_gates`: what is kept, where it is of these lengths."""
        if not hasattr(self, "kept"):
            return self.length_gates(lengths, n)
        kept_lengths, gates = self.kept.get_value()
        if kept_lengths.shape != lengths.shape or any(g.shape[-1] != n for g in gates.values()):
            return self.length_gates(lengths, n)
        # A branch and no select: only the one taken is computed.
        return lax.cond(
            jnp.all(kept_lengths == lengths), lambda: gates, lambda: self.length_gates(lengths, n)
        )

    def _run_gates(self, z: Frames, mask: Mask) -> pulse.Gates:
        logit = self._scores(z, self.run_kernel) + _float32(self.run_bias)
        tau = self._temperature(*GATE_TAU)
        return pulse.run_gates(logit.transpose(0, 2, 3, 1), mask, tau, self._hard())

    def _mean_gates(self, mask: Mask) -> Bool[Array, "b h p n"]:
        b, n = mask.shape
        return jnp.broadcast_to(mask[:, None, None], (b, self.num_heads, self.config.mean, n))

    def _rectangles(self, z: Frames, lengths: Lengths, mask: Mask) -> tuple[Array, Array]:
        """Centres and widths `[b h p]` in frames.

            rho_i = m_i sigmoid(w.z_i + b);  pool(f) = sum(rho f) / (sum(rho) + eps)
            center = (n_valid - 1) clip(anchor + pool(u) - 1/2, 0, 1)
            width  = wmin + (wmax - wmin) sigmoid(pool(r.z) + b_w),  wmax = n_valid

        1/2 is pool(u) for a flat rho, so an anchor is where its pulse starts.
        """
        scores = self._scores(z, self.rho_kernel, self.width_kernel)
        rho_score, width_score = jnp.split(scores, 2, axis=-1)
        rho = jax.nn.sigmoid(rho_score + _float32(self.rho_bias))
        rho = jnp.where(mask[:, :, None, None], rho, 0.0)
        u = pulse.relative_position(lengths, mask.shape[1])[..., None, None]
        weight = rho.sum(1) + EPS
        place = (rho * u).sum(1) / weight - 0.5 + _float32(self.anchor)
        width = (rho * width_score).sum(1) / weight + _float32(self.width_bias)
        n_valid = lengths.astype(jnp.float32)[:, None, None]
        center = jnp.clip(place, 0.0, 1.0) * jnp.maximum(n_valid - 1.0, 0.0)
        least = self.config.min_width
        widest = jnp.maximum(n_valid, least)
        return center, least + (widest - least) * jax.nn.sigmoid(width)

    def _readout(self, z: Frames) -> Float[Array, "h p"] | Float[Array, "b h p n"]:
        alpha = _float32(self.alpha)
        if self.config.readout == "static":
            return alpha
        score = self._scores(z, self.readout_kernel) + _float32(self.readout_bias)
        return alpha[..., None] * (1.0 + jnp.tanh(score)).transpose(0, 2, 3, 1)

    def _pulses(self, gates: dict, values: Array, alpha: Array) -> Float[Array, "b h n c"]:
        """`sum_p alpha_p g_pi A_p` over all kinds."""
        pulse_axis = 1 if alpha.ndim == 2 else 2
        sizes = np.cumsum([gate.shape[2] for gate in gates.values()])[:-1]
        weights = dict(zip(gates, jnp.split(alpha, sizes, axis=pulse_axis), strict=True))
        y = jnp.zeros((), jnp.float32)
        run_gate = gates.pop("runs", None)
        if run_gate is not None:
            means = run_average(run_gate, values)
            y = y + run_broadcast(run_gate, means, weights.pop("runs"))
        if gates:
            gate = jnp.concatenate(list(gates.values()), axis=2)
            weight = jnp.concatenate(list(weights.values()), axis=pulse_axis)
            y = y + broadcast(gate, pulse_average(gate, values), weight)
        return y


def _float32(param: nnx.Param) -> Array:
    return param[...].astype(jnp.float32)


def copy_module(module: nnx.Linear) -> nnx.Linear:
    """The same layer in arrays of its own: donating one model's buffers leaves the other alive."""
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, jax.tree.map(jnp.copy, state))


def harden(model: nnx.Module) -> nnx.Module:
    """Switches every LPA in the model, in place, to binary gates by comparisons; returns the model.

    Outputs equal those at `hard = 1`; `progress` and `hard` are no longer read.

    Raises:
        InputError: the model has no LPA.
    """
    for lpa in _mixers(model):
        lpa.inference = True
    return model


def anneal(module: nnx.Module, progress: Array, hard: Array) -> None:
    """Writes progress and strength into every LPA of a module, in place.

    Works inside jit and on stacked state; a module without an LPA is left as it is.
    """
    for _, node in nnx.iter_graph(module):
        if isinstance(node, LPA):
            node.progress[...] = jnp.broadcast_to(progress, node.progress.shape)
            node.hard[...] = jnp.broadcast_to(hard, node.hard.shape)


def set_anneal(model: nnx.Module, progress: float, hard: float = 0.0) -> None:
    """Sets the temperature progress and the straight-through strength, each in [0, 1], in place.

    Raises:
        InputError: a value is outside [0, 1], or the model has no LPA.
    """
    for name, value in (("progress", progress), ("hard", hard)):
        if not 0.0 <= value <= 1.0:
            raise InputError(f"set_anneal got {name}={value}; it must lie in [0, 1]")
    _mixers(model)
    anneal(model, jnp.float32(progress), jnp.float32(hard))


def _mixers(model: nnx.Module) -> list[LPA]:
    mixers = [node for _, node in nnx.iter_graph(model) if isinstance(node, LPA)]
    if not mixers:
        raise InputError(f"{type(model).__name__} has no LPA mixer; convert a layer's mixer first")
    return mixers
