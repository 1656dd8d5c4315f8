"""Source of the notebook of the same name: learned windows beside the known answer."""

# %% [markdown]
# # What the pulses learned
#
# Windows can be looked at, which attention's matrices make harder. Here LPA learns a task whose answer is known, so
# that what its gates became can be held against it.
#
# **Synthetic data**, CPU, under two minutes. The kinds of pulse are those of arXiv 2603.16922 as we read it.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

from edgespeech.nn import LPA, LPAConfig, harden
from edgespeech.nn.lpa import anneal

STEPS = int(os.environ.get("NOTEBOOK_STEPS", "300"))
N, D = 48, 16

# %% [markdown]
# ## The task
#
# Noise in two channels. The target of every frame in the first third is the mean of channel 0 over the first third,
# and of every other frame 0; plus, on every fourth frame, the mean of channel 1 over all fourth frames. So one
# window belongs to a place in the sequence and one is periodic.

# %%
FIRST_THIRD = (np.arange(N) < N // 3).astype(np.float32)
EVERY_FOURTH = (np.arange(N) % 4 == 0).astype(np.float32)


def make_batch(key, b=64):
    """Sequences `[b n d]` and their targets `[b n]`."""
    x = jnp.zeros((b, N, D)).at[..., :2].set(2 * jax.random.normal(key, (b, N, 2)))
    place = (x[..., 0] * FIRST_THIRD).sum(1) / FIRST_THIRD.sum()
    beat = (x[..., 1] * EVERY_FOURTH).sum(1) / EVERY_FOURTH.sum()
    return x, place[:, None] * FIRST_THIRD + beat[:, None] * EVERY_FOURTH


# %% [markdown]
# ## Training
#
# Two heads with periodic windows of the periods 2, 8 and 4, 16 (they are fixed; phase and duty are learned) and two
# positional windows each; no local path. Gates start half way down the temperature curriculum and are 0 or 1 from 60 %
# of the steps on. Started at its top, the soft gates of several pulses add up to the answer (error 2e-7 after 240 of
# 600 steps), and hardening them leaves 0.06: windows that are to be hard should be hard enough early.

# %%
config = LPAConfig(aperiodic=0, periodic=2, positional=2, max_period=16.0, local=False)
mixer = LPA(D, 2, config, rngs=nnx.Rngs(0))
graphdef, params, rest = nnx.split(mixer, nnx.Param, ...)
optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, STEPS))
lengths = jnp.full(64, N)


def loss(params, step):
    """Squared error on the batch of a step."""
    mixer = nnx.merge(graphdef, params, rest, copy=True)
    done = step / STEPS
    anneal(mixer, jnp.minimum(0.4 + done, 1.0), (done > 0.6).astype(jnp.float32))
    x, target = make_batch(jax.random.fold_in(jax.random.key(0), step))
    return jnp.mean((mixer(x, lengths)[..., 0] - target) ** 2)


@jax.jit
def run(params, state):
    """All steps as one program."""

    def update(carry, step):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, step)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(update, (params, state), jnp.arange(STEPS))


(params, _), losses = run(params, optimizer.init(params))
mixer = harden(nnx.merge(graphdef, params, rest))
print(
    f"squared error {float(np.mean(losses[-20:])):.1e} at the end, with hard gates (synthetic data)"
)
plt.semilogy(np.convolve(losses, np.ones(10) / 10, mode="valid"))
plt.xlabel("step")
plt.ylabel("squared error (synthetic data)")
plt.show()

# %% [markdown]
# ## The windows
#
# The truth on top, then the hard gate of every pulse. One whose weight is small may look like anything.

# %%
x, _ = make_batch(jax.random.key(1), 1)
gates = {kind: np.asarray(g[0]) for kind, g in mixer.gates(x, lengths[:1]).items()}
rows = {"first third": FIRST_THIRD, "every fourth": EVERY_FOURTH}
for kind, gate in gates.items():
    for head, pulse_index in np.ndindex(gate.shape[:2]):
        rows[f"{kind}, head {head}, pulse {pulse_index}"] = gate[head, pulse_index]

figure, ax = plt.subplots(figsize=(8, 4))
ax.imshow(np.stack(list(rows.values())), aspect="auto", cmap="Greys", vmin=0, vmax=1.5)
ax.axhline(1.5, color="tab:red")
ax.set(yticks=range(len(rows)), yticklabels=rows, xlabel="frame")
plt.show()


# %%
def overlap(gate, truth):
    """Intersection over union."""
    both = gate * truth
    return both.sum() / (gate + truth - both).sum()


for truth_name in ("first third", "every fourth"):
    truth = rows[truth_name]
    scores = {name: overlap(row, truth) for name, row in list(rows.items())[2:]}
    best = max(scores, key=scores.get)
    print(f"{truth_name}: best matched by {best}, intersection over union {scores[best]:.2f}")
assert all(set(np.unique(row)) <= {0.0, 1.0} for row in rows.values())

# %% [markdown]
# ## Of a real model
#
# A hybrid that `make lpa` saved is loaded with `load_pretrained(Path("runs/lpa/hybrid_8"))` of
# `edgespeech.interop.pretrained`; every layer's `mixer.gates(x, lengths)` gives its windows on the layer's own
# input, which `edgespeech.conversion.capture.capture` hands out. The report of a run draws them under the
# spectrogram.
