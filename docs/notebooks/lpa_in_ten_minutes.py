"""Source of the notebook of the same name: pulses, and a task that they solve."""

# %% [markdown]
# # LPA in ten minutes
#
# Learnable Pulse Accumulation (arXiv 2603.16922; the equations here are our reading of it) replaces self-attention
# by *pulses*: learned windows over the sequence. A pulse averages what is inside it and gives the mean back.
#
# Everything below is **synthetic data**, runs on a CPU in under two minutes, and says nothing about speech.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

from edgespeech.nn import LPA, LPAConfig, harden, set_anneal
from edgespeech.nn.lpa import anneal
from edgespeech.ops import accumulate, pulse

STEPS = int(os.environ.get("NOTEBOOK_STEPS", "400"))

# %% [markdown]
# ## One pulse
#
# A rectangle has a centre and a width, in frames. Soft, it is a product of two sigmoids, so that both can be
# learned; hard, it is open or closed. The mean of the values inside goes back to every open frame.

# %%
mask = jnp.ones((1, 30), bool)
center, width = jnp.full((1, 1, 1), 14.0), jnp.full((1, 1, 1), 8.0)
for tau in (4.0, 1.0, 0.25):
    gate = pulse.rectangle_gates(center, width, mask, tau)
    plt.plot(gate.ravel(), label=f"tau = {tau:g} frames")
hard = pulse.rectangle_gates(center, width, mask, 1.0, hard=True)
plt.step(np.arange(30), hard.ravel(), "k--", where="mid", label="hard")
plt.xlabel("frame")
plt.legend()
plt.show()

values = jnp.arange(30.0).reshape(1, 1, 30, 1)
mean = accumulate.pulse_average(hard, values)
print("open frames 10 to 18, mean", float(mean[0, 0, 0, 0]))
assert abs(float(mean[0, 0, 0, 0]) - 14.0) < 1e-4

# %% [markdown]
# ## A task for runs
#
# Each sequence is cut into segments. One channel says where a new segment begins, another is noise around the
# segment's own level, and the target is that level at every frame. The best guess is the mean over the segment: a
# short convolution sees too little, the mean of the whole sequence too much.

# %%
N, D = 48, 16


def make_batch(key, b=32):
    """Sequences `[b n d]` and their targets `[b n]`."""
    starts_key, level_key, noise_key = jax.random.split(key, 3)
    starts = jax.random.bernoulli(starts_key, 1 / 12, (b, N)).at[:, 0].set(True)
    segment = jnp.cumsum(starts, axis=1) - 1
    levels = jax.random.normal(level_key, (b, N))
    target = jnp.take_along_axis(levels, segment, axis=1)
    noisy = target + jax.random.normal(noise_key, (b, N))
    x = jnp.zeros((b, N, D)).at[..., 0].set(starts * 4.0 - 2.0).at[..., 1].set(noisy)
    return x, target


x, target = make_batch(jax.random.key(0), 1)
plt.plot(x[0, :, 1], ".", label="what is heard")
plt.plot(target[0], label="target")
plt.plot(x[0, :, 0] > 0, ":", label="begin of a segment")
plt.legend()
plt.show()

# %% [markdown]
# ## Train three mixers of one size
#
# LPA with runs (a closed gate ends a pulse), and two controls: the mean of everything, and the local path alone.
# The temperature falls during training, and the last part runs with hard gates.


# %%
def train(config, seed=0):
    """A mixer with hard gates, and the squared error of every step."""
    mixer = LPA(D, 2, config, rngs=nnx.Rngs(seed))
    graphdef, params, rest = nnx.split(mixer, nnx.Param, ...)
    optimizer = optax.adam(1e-2)
    lengths = jnp.full(32, N)

    def loss(params, key, step):
        mixer = nnx.merge(graphdef, params, rest, copy=True)
        done = step / STEPS
        anneal(mixer, jnp.minimum(done / 0.6, 1.0), (done > 0.6).astype(jnp.float32))
        x, target = make_batch(key)
        return jnp.mean((mixer(x, lengths)[..., 0] - target) ** 2)

    @jax.jit
    def run(params, state):
        def update(carry, step):
            params, state = carry
            key = jax.random.fold_in(jax.random.key(1), step)
            value, gradient = jax.value_and_grad(loss)(params, key, step)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(update, (params, state), jnp.arange(STEPS))

    (params, _), losses = run(params, optimizer.init(params))
    mixer = nnx.merge(graphdef, params, rest)
    set_anneal(mixer, 1.0, hard=1.0)
    return harden(mixer), losses


configs = {
    "runs": LPAConfig(aperiodic=0, runs=4, periodic=0, positional=0),
    "mean only": LPAConfig(aperiodic=0, periodic=0, positional=0, mean=4),
    "local only": LPAConfig(aperiodic=0, periodic=0, positional=0),
}
trained = {name: train(config) for name, config in configs.items()}

# %%
# Noise of variance 1 leaves 1 / length in the mean of a segment: over all frames, segments / frames.
print(f"mean over each true segment: squared error {(1 + (N - 1) / 12) / N:.3f}")
for name, (_, losses) in trained.items():
    last = float(np.mean(losses[-20:]))
    print(f"{name}: squared error {last:.3f} at the end (synthetic data)")
    plt.plot(np.convolve(losses, np.ones(10) / 10, mode="valid"), label=name)
plt.xlabel("step")
plt.ylabel("squared error (synthetic data)")
plt.legend()
plt.show()

# %% [markdown]
# ## What it does now
#
# Hard gates, one line per pulse of the first head, over the segments' beginnings. Pulses that are closed at the
# beginning of a segment and open inside have found the task's structure.

# %%
mixer, _ = trained["runs"]
x, target = make_batch(jax.random.key(7), 1)
gates = np.asarray(mixer.gates(x, jnp.array([N]))["runs"])
plt.imshow(gates[0, 0], aspect="auto", cmap="Greys", vmin=0, vmax=1.5)
for begin in np.flatnonzero(x[0, :, 0] > 0):
    plt.axvline(begin, color="tab:red", lw=1)
plt.xlabel("frame")
plt.ylabel("pulse")
plt.show()
assert set(np.unique(gates)) <= {0.0, 1.0}

# %% [markdown]
# Next: `what_the_pulses_learned.ipynb`, and the page on Learnable Pulse Accumulation for the equations and for how
# a trained attention model is converted.
