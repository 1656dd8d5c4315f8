"""Connectionist temporal classification (Graves et al., 2006): loss, feasibility, greedy path."""

import jax
import jax.numpy as jnp
import optax

from edgespeech.ops.mask import mask_from_lengths
from edgespeech.types import Array, Bool, Float, Int, Lengths, Logits

BLANK = 0


def ctc_feasible(
    lengths: Lengths, targets: Int[Array, "b u"], target_lengths: Lengths
) -> Bool[Array, "b"]:
    """True where an alignment exists: `frames >= tokens + adjacent repeats` (a blank must part a repeat)."""
    u = targets.shape[1]
    repeats = jnp.sum(
        (targets[:, 1:] == targets[:, :-1]) & mask_from_lengths(target_lengths - 1, u - 1), axis=1
    )
    return lengths >= target_lengths + repeats


def ctc_loss(
    logits: Logits, lengths: Lengths, targets: Int[Array, "b u"], target_lengths: Lengths
) -> Float[Array, "b"]:
    """Negative log likelihood of each target in nats, `-log sum over alignments of prod p`, in float32.

    The recursion is optax's; what is ours are the corner cases. An empty target costs the blanks alone. An utterance
    with no frames, or whose target has no alignment (see `ctc_feasible`), costs 0 and has a zero gradient: the caller
    counts it, nothing becomes infinite. Rounding may leave a certain target slightly below 0; the loss is cut at 0.

    Args:
        logits: `[b n v]`, unnormalised, any floating dtype, blank at 0.
        lengths: valid frames.
        targets: token ids without blanks; what lies beyond a target's length is ignored.
        target_lengths: tokens of each target.
    """
    n, u = logits.shape[1], targets.shape[1]
    possible = ctc_feasible(lengths, targets, target_lengths) & (lengths > 0)
    frame_mask = mask_from_lengths(lengths, n)
    token_mask = mask_from_lengths(target_lengths, u) & possible[:, None]
    # Zeros where nothing counts: optax multiplies by the mask, and NaN * 0 is NaN.
    logits = jnp.where(frame_mask[..., None], logits.astype(jnp.float32), 0.0)
    targets = jnp.where(token_mask, targets, 1)
    loss = optax.ctc_loss(
        logits,
        (~frame_mask).astype(jnp.float32),
        targets,
        (~token_mask).astype(jnp.float32),
        blank_id=BLANK,
    )
    return jnp.where(possible, jnp.maximum(loss, 0.0), 0.0)


def greedy_path(logits: Logits, lengths: Lengths) -> Int[Array, "b n"]:
    """The most likely token of every frame, blank beyond the length; repeats and blanks are still in it."""
    path = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jnp.where(mask_from_lengths(lengths, logits.shape[1]), path, BLANK)


def ctc_log_probs(logits: Logits) -> Logits:
    """`logits - logsumexp(logits)` in float32."""
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
