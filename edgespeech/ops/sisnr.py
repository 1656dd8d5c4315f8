"""Scale-invariant signal-to-noise ratio (Le Roux et al., 2019, "SDR - half-baked or well done?"), in dB."""

from itertools import permutations

import jax.numpy as jnp
import numpy as np

from edgespeech.ops.mask import mask_from_lengths
from edgespeech.types import Array, Float, Int, Lengths, Scalar

# As in SpeechBrain's loss: silence scores 10 log10(EPS) = -80 dB, and nothing divides by zero.
EPS = 1e-8
# Utterances that are better than 30 dB teach nothing more (SpeechBrain's SepFormer recipe, `threshold: -30`).
THRESHOLD = -30.0


def si_snr_reference(estimate: np.ndarray, target: np.ndarray) -> float:
    """`si_snr` of one utterance in float64 NumPy: `[t], [t] ->` dB.

    s = target - mean, e = estimate - mean, p = <e, s> s / ||s||^2
    SI-SNR = 10 log10(||p||^2 / ||e - p||^2)
    """
    s = np.asarray(target, np.float64) - np.mean(target, dtype=np.float64)
    e = np.asarray(estimate, np.float64) - np.mean(estimate, dtype=np.float64)
    p = (e @ s) * s / (s @ s + EPS)
    return float(10 * np.log10(p @ p / ((e - p) @ (e - p) + EPS) + EPS))


def si_snr(
    estimate: Float[Array, "b *i t"], target: Float[Array, "b *i t"], lengths: Lengths
) -> Float[Array, "b *i"]:
    """SI-SNR in dB over the valid samples, float32; higher is better.

    No factor on either signal and no offset changes it (until the energy comes near 1e-8). Silence on either side
    gives -80 dB with a zero or finite gradient.

    Args:
        estimate: `[b ... t]`, any further axes in the middle, which broadcast against the target's.
        target: `[b ... t]`.
        lengths: `[b]`, valid samples; what lies beyond is ignored, NaN included. A row of length 0 scores -80 dB.
    """
    s, e = (_centred(x, lengths) for x in (target, estimate))
    p = jnp.sum(e * s, -1, keepdims=True) * s / (jnp.sum(s * s, -1, keepdims=True) + EPS)
    ratio = jnp.sum(p * p, -1) / (jnp.sum(jnp.square(e - p), -1) + EPS)
    return 10.0 * jnp.log10(ratio + EPS)


def _centred(x: Float[Array, "b *i t"], lengths: Lengths) -> Float[Array, "b *i t"]:
    """The valid samples without their mean, zeros elsewhere."""
    shape = (len(lengths),) + (1,) * (x.ndim - 2)
    mask = mask_from_lengths(lengths, x.shape[-1]).reshape(*shape, x.shape[-1])
    count = jnp.maximum(lengths, 1).astype(jnp.float32).reshape(*shape, 1)
    x = jnp.where(mask, x.astype(jnp.float32), 0.0)
    return jnp.where(mask, x - jnp.sum(x, -1, keepdims=True) / count, 0.0)


def permutation_invariant_si_snr(
    estimates: Float[Array, "b spk t"], targets: Float[Array, "b spk t"], lengths: Lengths
) -> tuple[Float[Array, "b"], Int[Array, "b spk"]]:
    """Mean SI-SNR over speakers under the best assignment (Yu et al., 2017, permutation invariant training).

        max over permutations q of  mean_j SI-SNR(estimate_{q(j)}, target_j)

    Args:
        estimates: one row a speaker, in any order.
        targets: one row a speaker.
        lengths: `[b]`, valid samples.

    Returns:
        The mean in dB, and the permutation: estimate `permutation[b, j]` belongs to target j.
    """
    pairs = si_snr(estimates[:, :, None], targets[:, None, :], lengths)  # [b estimate target]
    count = targets.shape[1]
    orders = jnp.asarray(list(permutations(range(count))))
    means = jnp.mean(pairs[:, orders, jnp.arange(count)], -1)  # [b order]
    best = jnp.argmax(means, -1)
    return jnp.take_along_axis(means, best[:, None], 1)[:, 0], orders[best]


def si_snr_loss(
    estimates: Float[Array, "b spk t"],
    targets: Float[Array, "b spk t"],
    lengths: Lengths,
    weights: Float[Array, "b"] | None = None,
    threshold: float = THRESHOLD,
) -> Scalar:
    """Mean negative SI-SNR in dB of the utterances that are not yet better than the threshold.

        L_b = -SI-SNR_b (best permutation);  loss = mean of those L_b with L_b > threshold

    As in SpeechBrain's recipe (`threshold_byloss`), an utterance at or below the threshold leaves the mean instead of
    being cut off at it. Where none is left the loss is 0 with a zero gradient (the recipe skips the batch).

    Args:
        estimates: `[b spk t]`; one speaker is enhancement.
        targets: `[b spk t]`.
        lengths: `[b]`, valid samples.
        weights: `[b]`, 0 for filler rows; None: every row counts.
        threshold: dB, negative.
    """
    loss = -permutation_invariant_si_snr(estimates, targets, lengths)[0]
    weight = jnp.where(loss > threshold, 1.0 if weights is None else weights, 0.0)
    return jnp.sum(jnp.where(weight > 0, loss * weight, 0.0)) / jnp.maximum(jnp.sum(weight), 1e-6)
