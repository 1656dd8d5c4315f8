"""Exits of an encoder: heads on intermediate frames, and the loss that trains them together."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.nn.conformer import linear
from edgespeech.ops.ctc import ctc_log_probs, ctc_loss
from edgespeech.ops.mask import mask_from_lengths, masked_mean, zero_padding
from edgespeech.types import Array, Bool, Float, Frames, Int, Lengths, Logits


class LinearHead(nnx.Module):
    """`W x + b`, frame by frame (early-exit ASR, arXiv 2309.09546)."""

    def __init__(self, d: int, vocab_size: int, *, rngs: nnx.Rngs):
        self.output = linear(d, vocab_size, rngs)

    def __call__(self, x: Frames, lengths: Lengths) -> Logits:
        """`[b n d], [b] -> [b n v]`, unnormalised."""
        return self.output(x)


class BiLSTMHead(nnx.Module):
    """`W [lstm(x); reversed lstm(x)] + b`: one LSTM layer in each direction (Hochreiter and Schmidhuber, 1997).

        i, f, g, o = split(W_x x_t + b + W_h y_{t-1});   c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)
        y_t = sigmoid(o) tanh(c_t)

    The backward direction starts at each utterance's own last frame.

    Attributes:
        inputs: W_x and b of both directions, `d -> 8 width`, gates in the order i, f, g, o, forward first.
        recurrent: W_h, `[2 width 4*width]`, forward first.
    """

    def __init__(self, d: int, vocab_size: int, width: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.orthogonal()
        self.inputs = linear(d, 8 * width, rngs)
        self.recurrent = nnx.Param(
            jnp.stack([init(rngs.params(), (width, 4 * width)) for _ in range(2)])
        )
        self.output = linear(2 * width, vocab_size, rngs)

    def __call__(self, x: Frames, lengths: Lengths) -> Logits:
        """`[b n d], [b] -> [b n v]`, unnormalised."""
        mask = mask_from_lengths(lengths, x.shape[1])
        gates = jnp.split(self.inputs(zero_padding(x, mask)), 2, axis=-1)
        forward = _lstm(gates[0], self.recurrent[0], mask, reverse=False)
        backward = _lstm(gates[1], self.recurrent[1], mask, reverse=True)
        return self.output(jnp.concatenate([forward, backward], axis=-1))


def _lstm(
    gates: Frames, recurrent: Float[Array, "w 4w"], mask: Bool[Array, "b n"], reverse: bool
) -> Frames:
    """Outputs `[b n w]` of an LSTM over gates `[b n 4w]`; its state stays as it is where the mask is False."""

    def step(state, inputs):
        c, y = state
        gate, valid = inputs
        i, f, g, o = jnp.split(gate + y @ recurrent, 4, axis=-1)
        new_c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        new_y = jax.nn.sigmoid(o) * jnp.tanh(new_c)
        state = jnp.where(valid[:, None], new_c, c), jnp.where(valid[:, None], new_y, y)
        return state, state[1]

    zeros = jnp.zeros((gates.shape[0], recurrent.shape[0]), gates.dtype)
    time_first = jnp.swapaxes(gates, 0, 1), mask.T
    _, outputs = jax.lax.scan(step, (zeros, zeros), time_first, reverse=reverse)
    return jnp.swapaxes(outputs, 0, 1)


def exit_ctc_losses(
    logits: Sequence[Logits],
    lengths: Lengths,
    targets: Int[Array, "b u"],
    target_lengths: Lengths,
) -> Float[Array, "e b"]:
    """CTC loss of every exit and utterance, nats; see `ctc_loss` for the corner cases.

    Args:
        logits: one `[b n v]` for each of the e exits.
        lengths: `[b]`, valid frames.
        targets: token ids without blanks.
        target_lengths: `[b]`.
    """
    # All exits as one batch: a single recursion to compile and to run.
    e = len(logits)
    losses = ctc_loss(
        jnp.concatenate(list(logits)),
        jnp.tile(lengths, e),
        jnp.tile(targets, (e, 1)),
        jnp.tile(target_lengths, e),
    )
    return losses.reshape(e, -1)


def self_distillation(
    logits: Sequence[Logits], lengths: Lengths, temperature: float = 1.0
) -> Float[Array, "e-1 b"]:
    """`T^2 mean_i KL(softmax(z_i / T) || softmax(s_i / T))` in nats, from the last exit z to each exit s before it.

    The mean runs over valid frames; the last exit is a constant here (Hinton et al., 2015; the last exit as the
    teacher: Zhang et al., 2019, arXiv 1905.08094).

    Args:
        logits: one `[b n v]` for each of the e exits, at least two.
        lengths: `[b]`, valid frames.
        temperature: T, above 0.

    Raises:
        InputError: there is one exit alone, or the temperature is not above 0.
    """
    if len(logits) < 2 or not temperature > 0:
        raise InputError(
            f"self-distillation over {len(logits)} exits at temperature {temperature}: it needs at least 2 exits and "
            "a temperature above 0"
        )
    mask = mask_from_lengths(lengths, logits[-1].shape[1])
    stacked = zero_padding(jnp.stack(list(logits)), mask)
    log_probs = ctc_log_probs(stacked / temperature)
    teacher = jax.lax.stop_gradient(log_probs[-1])
    kl = jnp.sum(jnp.exp(teacher) * (teacher - log_probs[:-1]), axis=-1)
    return temperature**2 * masked_mean(kl, mask, axis=-1)[..., 0]


def exit_loss(
    logits: Sequence[Logits],
    lengths: Lengths,
    targets: Int[Array, "b u"],
    target_lengths: Lengths,
    *,
    weights: Sequence[float] | None = None,
    distillation: float = 0.0,
    temperature: float = 1.0,
) -> Float[Array, "b"]:
    """`sum_m w_m CTC_m + distillation * sum_{m<e} KL_m` for every utterance, nats.

    The early-exit papers (arXiv 2309.09546, 2506.18035) use weights of 1 and no distillation.

    Args:
        logits: one `[b n v]` for each of the e exits.
        lengths: `[b]`, valid frames.
        targets: token ids without blanks.
        target_lengths: `[b]`.
        weights: w, one an exit, at least 0 and not all 0; None: all 1.
        distillation: weight of `self_distillation`, at least 0.
        temperature: of `self_distillation`.

    Raises:
        InputError: weights of another number, below 0 or all 0; distillation below 0.
    """
    e = len(logits)
    weights = (1.0,) * e if weights is None else tuple(weights)
    if len(weights) != e or min(weights) < 0 or max(weights) == 0:
        raise InputError(
            f"exit weights are {weights}: give {e} numbers, one an exit, at least 0 and not all 0"
        )
    if distillation < 0:
        raise InputError(f"distillation is {distillation}: it must be at least 0")
    losses = exit_ctc_losses(logits, lengths, targets, target_lengths)
    total = jnp.einsum("eb,e->b", losses, jnp.asarray(weights, losses.dtype))
    if distillation:
        total = total + distillation * jnp.sum(
            self_distillation(logits, lengths, temperature), axis=0
        )
    return total
