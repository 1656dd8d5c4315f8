"""Source of the notebook of the same name: a rule's curve between fixed exits and an oracle."""

# %% [markdown]
# # Early exit curves
#
# A model with exits gives a transcript after every few layers, and a rule decides when to stop. What a rule is
# worth is its whole curve of errors against compute, with the threshold chosen on dev, between the fixed exits and
# an oracle.
#
# The exits here are **synthetic**: errors and entropies are drawn from a simple model of easy and hard utterances.
# No recogniser is run, and the figures say nothing about one. It takes a few seconds.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np

from edgespeech.inference.exit_policy import (
    ExitStatistics,
    chosen_exits,
    cost_and_wer,
    exit_curve,
    oracle_exits,
    tune_threshold,
)

UTTERANCES = int(os.environ.get("NOTEBOOK_UTTERANCES", "2000"))
EXITS = 6

# %% [markdown]
# ## Utterances
#
# Each has a difficulty. An error rate falls from exit to exit, later for hard ones; the entropy of an exit follows
# its error rate, with noise: a rule sees the entropy alone.


# %%
def make_utterances(seed):
    """Statistics of exits of so many utterances."""
    random = np.random.default_rng(seed)
    difficulty = random.gamma(1.0, 0.9, UTTERANCES)
    words = random.integers(5, 30, UTTERANCES)
    depth = np.arange(1, EXITS + 1)[:, None]
    rate = 0.9 * np.exp(-1.1 * depth / (0.35 + difficulty)) + 0.01 * difficulty
    errors = random.binomial(words, np.minimum(rate, 0.95))
    entropy = rate * np.exp(0.25 * random.normal(size=rate.shape))
    return ExitStatistics(entropy, errors, words, np.arange(1.0, EXITS + 1))


dev, test = make_utterances(0), make_utterances(1)
fixed = [cost_and_wer(np.full(UTTERANCES, exit), test) for exit in range(EXITS)]
for exit, (cost, wer) in enumerate(fixed, 1):
    print(f"exit {exit}: {cost:.0%} of the compute, WER {wer:.1%} (synthetic)")

# %% [markdown]
# ## The rule, and the oracle
#
# An utterance leaves at the first exit whose entropy is at or below the threshold. The oracle knows the errors: it
# takes the cheapest of the exits with the fewest, and its curve asks ever more errors for a unit of compute.

# %%
curve = exit_curve("entropy", test)
oracle = np.array(
    [cost_and_wer(oracle_exits(test, price), test) for price in np.geomspace(1e-3, 20, 40)]
)
plt.plot(*np.array(fixed).T, "o-", label="fixed exits")
plt.plot(curve.cost, curve.wer, label="entropy")
plt.plot(*oracle.T, "--", label="oracle")
plt.xlabel("share of the compute of the last exit")
plt.ylabel("WER (synthetic data)")
plt.legend()
plt.show()

# The ends of a rule's curve are the first exit and the last.
np.testing.assert_allclose((curve.cost[0], curve.wer[0]), fixed[0])
np.testing.assert_allclose((curve.cost[-1], curve.wer[-1]), fixed[-1])

# %% [markdown]
# ## A threshold from dev
#
# Ask for half of the compute on dev, and see what that threshold does on test.

# %%
threshold = tune_threshold("entropy", dev, target_cost=0.5)
for name, statistics in (("dev", dev), ("test", test)):
    cost, wer = cost_and_wer(chosen_exits("entropy", threshold, statistics.scores), statistics)
    print(
        f"{name}: threshold {threshold:.3f} nats, {cost:.1%} of the compute, WER {wer:.1%} (synthetic)"
    )

taken = chosen_exits("entropy", threshold, test.scores)
plt.bar(np.arange(1, EXITS + 1), np.bincount(taken, minlength=EXITS) / UTTERANCES)
plt.xlabel("exit taken")
plt.ylabel("share of the utterances")
plt.show()

# %% [markdown]
# ## How much of the gap is closed
#
# At equal compute: the fixed exits (straight lines between them) above, the oracle below, the rule in between.

# %%
shares = np.linspace(0.3, 0.9, 7)
above = np.interp(shares, *np.array(fixed).T)
below = np.interp(shares, *oracle[np.argsort(oracle[:, 0])].T)
rule = np.interp(shares, curve.cost, curve.wer)
for share, a, b, r in zip(shares, above, below, rule, strict=True):
    print(
        f"{share:.0%}: fixed {a:.1%}, entropy {r:.1%}, oracle {b:.1%}: {(a - r) / (a - b):.0%} of the gap"
    )
assert (below <= rule + 1e-9).all()

# %% [markdown]
# With a model: `python -m experiments.splitformer_librispeech` draws these curves from real scores for every rule.
