"""Draws the pictures of the documentation into docs/pictures: no training, no data, the same bytes on every run.

    python docs/make_pictures.py [NAME ...]

Curves and masks come from the kernels themselves, so that a picture shows what the code computes; diagrams are drawn
by hand. Signals and scores are made up for the picture and mean nothing.
"""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from PIL import Image

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from edgespeech.conversion.distil import DistilConfig, windows
from edgespeech.nn.chunk_attention import Chunks, chunk_mask
from edgespeech.nn.dual_path import chunk_count
from edgespeech.nn.lpa import GATE_TAU, RECTANGLE_TAU
from edgespeech.ops import accumulate, attention, norm, pulse

FOLDER = Path(__file__).parent / "pictures"
BLUE, ORANGE, GREEN, RED, GREY = "#2f6db5", "#e08a1e", "#3b9a5f", "#c2453d", "#8a8f98"
PALE = {BLUE: "#dbe7f5", ORANGE: "#fbe7cd", GREEN: "#d9efe1", RED: "#f6dcda", GREY: "#eceef1"}
STYLE: dict[Any, Any] = {
    "figure.dpi": 140,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "legend.frameon": False,
    "svg.hashsalt": "edgespeech",
}


# ------------------------------------------------------------------------------------- diagrams


def canvas(width: float, height: float) -> tuple[Figure, plt.Axes]:
    """An empty drawing whose units are tenths of an inch."""
    figure, ax = plt.subplots(figsize=(width, height), layout="constrained")
    ax.set(xlim=(0, 10 * width), ylim=(0, 10 * height))
    ax.axis("off")
    return figure, ax


def box(ax, x, y, w, h, text, color=GREY, size=9.5) -> None:
    """A rounded box with its lower left corner at (x, y)."""
    style = {"boxstyle": "round,pad=0,rounding_size=0.8", "lw": 1.2}
    ax.add_patch(FancyBboxPatch((x, y), w, h, ec=color, fc=PALE[color], **style))
    ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size)


def arrow(ax, start, end, color="black") -> None:
    """A straight arrow."""
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.1})


def line(ax, *points, color="black") -> None:
    """Straight pieces without a head."""
    ax.plot(*zip(*points, strict=True), color=color, lw=1.1)


def slot() -> Figure:
    """The mixer slot of a layer and what fits into it."""
    figure, ax = canvas(8, 3)
    box(ax, 2, 3, 30, 23, "")
    ax.text(17, 23.2, "a layer", ha="center", color=GREY)
    box(ax, 6, 13.5, 22, 7, "layer.mixer", BLUE, 12)
    box(ax, 6, 5, 22, 5, "feed-forward, norms")
    arrow(ax, (17, 13.5), (17, 10.3))
    names = (
        ("attention", "O(n²)", GREY),
        ("LPA", "O(n)", ORANGE),
        ("sliding window", "O(n · window)", GREY),
        ("SummaryMixing, mean only, local only", "O(n)", GREY),
        ("nothing", "0", GREY),
    )
    for row, (name, cost, color) in enumerate(names):
        y = 23.2 - 4.7 * row
        box(ax, 45, y, 33, 3.7, f"{name}   {cost}", color)
        line(ax, (45, y + 1.85), (36, 17), color=color)
    arrow(ax, (36, 17), (28.2, 17), ORANGE)
    return figure


def splitformer() -> Figure:
    """Exits and parallel branches."""
    figure, ax = canvas(8.8, 3.3)
    box(ax, 0.5, 12.5, 9, 6, "mel,\n÷ 4", GREY)
    for m in range(6):
        x = 13 + 12 * m
        box(ax, x, 12.5, 7.4, 6, "2 Conformer\nlayers", BLUE, 7.4)
        arrow(ax, (x - 3.4, 15.5), (x - 0.1, 15.5))
        arrow(ax, (x + 8.9, 15.5), (x + 8.9, 22))
        box(ax, x + 4.2, 22.2, 9.4, 4.2, f"head {m + 1}", ORANGE)
        ax.text(x + 8.9, 28.3, f"exit {m + 1}", ha="center", fontsize=9)
        if m in (0, 5):
            line(ax, (x - 1.8, 15.5), (x - 1.8, 6.5))
            arrow(ax, (x - 1.8, 6.5), (x - 0.5, 6.5))
            box(ax, x - 0.4, 3.6, 8.2, 6, "every 2nd,\n1 layer,\nrepeat", GREEN, 7.2)
            line(ax, (x + 7.8, 6.5), (x + 8.9, 6.5))
            arrow(ax, (x + 8.9, 6.5), (x + 8.9, 14.4))
            ax.text(x + 9.6, 10.8, "+", fontsize=12)
        line(ax, (x + 7.4, 15.5), (x + 8.9, 15.5))
    return figure


def moonshine() -> Figure:
    """Moonshine: convolutions, encoder with slots, decoder with a cache."""
    figure, ax = canvas(8.4, 2.9)
    box(ax, 0.5, 15, 9, 6, "audio\n16 kHz")
    box(ax, 13, 15, 14, 6, "3 convolutions\n1 frame / 384 samples", GREY, 7.6)
    box(ax, 30.5, 12.5, 21, 11, "")
    ax.text(41, 21.6, "8 encoder layers", ha="center", fontsize=9)
    box(ax, 32, 14, 8.4, 5.6, "mixer", BLUE)
    box(ax, 42, 14, 8.2, 5.6, "FFN")
    arrow(ax, (40.5, 16.8), (41.9, 16.8))
    box(ax, 55.5, 12.5, 28, 11, "")
    ax.text(69.5, 21.6, "8 decoder layers", ha="center", fontsize=9)
    for x, name in ((57, "causal\nattention"), (65.8, "cross-\nattention"), (74.6, "gated\nFFN")):
        box(ax, x, 14, 7.6, 5.6, name, GREY, 8)
    for start, end in ((9.6, 12.9), (27.1, 30.4), (51.6, 55.4)):
        arrow(ax, (start, 18), (end, 18))
    box(ax, 57, 3, 16.4, 5, "cache: keys, values", GREEN, 8.5)
    arrow(ax, (60.8, 8.2), (60.8, 13.8), GREEN)
    arrow(ax, (69.6, 8.2), (69.6, 13.8), GREEN)
    arrow(ax, (79, 12.3), (79, 6.6))
    ax.text(79, 4.9, "next token", ha="center", fontsize=9)
    ax.text(41, 8.5, "LPA replaces attention\nin these slots", ha="center", va="top", color=BLUE)
    arrow(ax, (36.2, 9), (36.2, 13.8), BLUE)
    return figure


# ------------------------------------------------------------------------------------------ LPA


def toy_gates(tau_at: float, hard, n: int = 60) -> dict[str, np.ndarray]:
    """One gate of each kind over n frames, at a position in the temperature curriculum."""
    mask, lengths, i = jnp.ones((1, n), bool), jnp.array([n]), np.arange(n)
    rectangle_tau, tau = (a * (b / a) ** tau_at for a, b in (RECTANGLE_TAU, GATE_TAU))
    wave = 1.6 * np.sin(2 * np.pi * i / 23) + 1.2 * np.sin(2 * np.pi * i / 8 + 1) - 0.2
    series = jnp.zeros((1, 1, 16)).at[0, 0, 1:4].set(jnp.array([0.9, -0.8, -0.5]))

    def at(value):
        return jnp.full((1, 1), value)

    gates = {
        "rectangle": pulse.rectangle_gates(
            jnp.full((1, 1, 1), 22.0), jnp.full((1, 1, 1), 16.0), mask, rectangle_tau, hard
        ),
        "runs": pulse.run_gates(jnp.asarray(wave)[None, None, None], mask, tau, hard),
        "periodic": pulse.periodic_gates(at(15.0), at(0.2), at(0.4), mask, tau, hard),
        "positional": pulse.positional_gates(series, at(0.0), lengths, n, tau, hard),
    }
    return {name: np.asarray(gate, float).ravel() for name, gate in gates.items()}


def pulses() -> Figure:
    """Soft and hard gates of the four kinds."""
    figure, axes = plt.subplots(4, 1, figsize=(8, 5), sharex=True, layout="constrained")
    hard = toy_gates(1.0, True)
    for progress, color in ((0.0, "#f3c58b"), (0.5, ORANGE), (1.0, "#7a4300")):
        for ax, (name, gate) in zip(axes, toy_gates(progress, 0.0).items(), strict=True):
            ax.plot(gate, color=color, lw=1.6, label=f"soft, progress {progress:g}")
            ax.set(ylim=(-0.05, 1.1), yticks=(0, 1), ylabel=name)
    for ax, gate in zip(axes, hard.values(), strict=True):
        ax.bar(np.arange(60), gate, width=1, color=PALE[BLUE], zorder=0, label="hard: 0 or 1")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    axes[-1].set(xlabel="frame", xlim=(-0.5, 59.5))
    return figure


def accumulation() -> Figure:
    """What a pulse gathers, and what it gives back."""
    n = 24
    values = np.random.default_rng(3).uniform(0.5, 6, n)
    v = jnp.asarray(values)[None, None, :, None]
    mask = jnp.ones((1, n), bool)
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 2.9), sharey=True, layout="constrained")

    rectangle = pulse.rectangle_gates(
        jnp.full((1, 1, 1), 10.0), jnp.full((1, 1, 1), 11.0), mask, 1.0, True
    )
    mean = accumulate.pulse_average(rectangle, v)
    alone = np.asarray(accumulate.broadcast(rectangle, mean, jnp.ones((1, 1)))).ravel()
    logit = np.where(np.isin(np.arange(n), (0, 7, 8, 15, 16, 17)), -1.0, 1.0)
    runs = pulse.run_gates(jnp.asarray(logit)[None, None, None], mask, 1.0, True)
    whole = np.asarray(accumulate.run_average(runs, v)).ravel()
    so_far = np.asarray(accumulate.run_average(runs, v, causal=True)).ravel()

    for ax, gate in ((axes[0], rectangle), (axes[1], runs)):
        is_open = np.asarray(gate).ravel()
        ax.bar(np.arange(n), values, width=0.75, color=np.where(is_open, "#9fc0e6", "#e3e5e9"))
        ax.set(xlabel="frame")
    for ax, y, color, label in (
        (axes[0], alone, ORANGE, "mean inside, given to every open frame"),
        (axes[1], whole, ORANGE, "mean of the run"),
        (axes[1], so_far, GREEN, "causal: mean of the run so far"),
    ):
        ax.step(np.arange(n), np.where(y > 0, y, np.nan), where="mid", color=color, lw=2.2)
        ax.plot([], [], color=color, lw=2.2, label=label)
    for ax, title in zip(axes, ("one pulse: a rectangle", "runs of open gates"), strict=True):
        ax.set_title(title, loc="left")
        ax.legend(loc="upper right", fontsize=8.5)
    axes[0].set(ylabel="value", ylim=(0, 8.5))
    return figure


def conversion() -> Figure:
    """The schedule of progressive replacement."""
    config, order, layers = DistilConfig(), (3, 5, 0, 4), 6
    steps = jnp.arange(len(order) * config.steps_per_layer)
    state = jax.vmap(lambda step: windows(order, layers, step, config))(steps)
    phase = np.sum([np.asarray(part, int) for part in state], axis=0).T
    colors = [PALE[GREY], "#fbd9a8", ORANGE, BLUE]
    figure, ax = plt.subplots(figsize=(8, 2.7), layout="constrained")
    ax.imshow(
        phase, aspect="auto", cmap=ListedColormap(colors), vmin=0, vmax=3, interpolation="nearest"
    )
    names = ("attention", "(a) LPA learns", "(b) and FFN, norms", "(c) and hard gates")
    for color, name in zip(colors, names, strict=True):
        ax.bar([0], [0], color=[color], label=name)
    ax.set(
        yticks=range(layers),
        yticklabels=range(1, layers + 1),
        ylabel="layer",
        xlabel="training step",
    )
    figure.legend(loc="outside upper center", ncols=4)
    return figure


def mixers() -> Figure:
    """Which frames reach which under each mixer."""
    n = 48
    i, rng = np.arange(n), np.random.default_rng(1)
    q, k = rng.normal(size=(2, n, 4))
    logits = q @ k.T / 2
    full = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    near = np.abs(i[:, None] - i) <= 6
    band = full * near / (full * near).sum(1, keepdims=True)
    gates = np.stack(list(toy_gates(1.0, True, n).values()))
    run = np.cumsum(gates[1] == 0)
    same_run = (run[:, None] == run) & (gates[1][:, None] * gates[1] > 0)
    pulse_matrices = [np.outer(g, g) / g.sum() for g in gates[[0, 2, 3]]]
    lpa = sum([*pulse_matrices, same_run / np.maximum(same_run.sum(1, keepdims=True), 1)])
    panels = {
        "attention": full,
        "sliding window": band,
        "LPA, four pulses": lpa,
        "mean only": np.full((n, n), 1 / n),
    }
    figure, axes = plt.subplots(1, 4, figsize=(8.4, 2.4), layout="constrained")
    for ax, (name, matrix) in zip(axes, panels.items(), strict=True):
        ax.imshow(matrix**0.5, cmap="Blues", vmin=0, vmax=0.55, interpolation="nearest")
        ax.set(title=name, xticks=(), yticks=(), xlabel="reads frame")
    axes[0].set_ylabel("frame")
    return figure


def attention_blocks() -> Figure:
    """Blocks of the logit matrix, and the memory they take."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3), layout="constrained")
    left.set(xlim=(-1.2, 4.3), ylim=(3.9, -1.1))
    left.axis("off")
    for row in range(3):
        for column in range(4):
            busy, done = (row, column) == (1, 2), row < 1 or (row == 1 and column < 2)
            color = ORANGE if busy else PALE[BLUE] if done else PALE[GREY]
            left.add_patch(Rectangle((column, row), 0.94, 0.94, fc=color, ec="white"))
    arrow(left, (0.1, 1.47), (2.0, 1.47), BLUE)
    left.text(0.98, 1.3, "(M, T, Y)", ha="center", fontsize=9)
    left.text(2, -0.35, "blocks of keys", ha="center")
    left.text(-0.35, 1.5, "blocks of queries", va="center", rotation=90)
    left.text(2, 3.5, "only the orange block is in memory", ha="center", color=ORANGE)
    n = np.geomspace(64, 32_000, 80)
    block = np.minimum(n, attention.QUERY_BLOCK) * np.minimum(n, attention.KEY_BLOCK)
    right.loglog(n, 4 * n * n / 2**20, color=GREY, lw=2, label="the whole matrix")
    right.loglog(n, 4 * block / 2**20, color=ORANGE, lw=2, label="one block")
    right.set(xlabel="frames", ylabel="MB", title="float32 logits of one head")
    right.legend()
    return figure


# ----------------------------------------------------------------------------------------- others


def early_exit() -> Figure:
    """Rows that are computed when utterances leave one by one."""
    taken, exits = np.array([1, 3, 1, 2, 6, 1, 2, 4]), 6
    rows = np.arange(len(taken))
    cells = np.zeros((len(taken), exits))
    for m in range(1, exits + 1):
        survivors = rows[taken >= m]
        size = 2 ** int(np.ceil(np.log2(len(survivors))))
        cells[: len(survivors), m - 1] = 1
        cells[len(survivors) : size, m - 1] = 2
    figure, ax = plt.subplots(figsize=(7, 3.1), layout="constrained")
    ax.imshow(
        cells, cmap=ListedColormap(["white", "#9fc0e6", "#e3e5e9"]), vmin=0, vmax=2, aspect="auto"
    )
    for m in range(1, exits + 1):
        for place, row in enumerate(rows[taken >= m]):
            leaves = taken[row] == m
            ax.text(
                m - 1,
                place,
                "abcdefgh"[row] + (" leaves" if leaves else ""),
                ha="center",
                va="center",
                fontsize=8.5,
                color=RED if leaves else "black",
            )
    ax.set(
        xticks=range(exits),
        xticklabels=[f"segment {m}" for m in range(1, exits + 1)],
        yticks=rows,
        ylabel="row of the batch",
        title=f"{int((cells > 0).sum())} of {cells.size} rows computed; grey rows are filler",
    )
    ax.tick_params(length=0)
    return figure


def chunks() -> Figure:
    """The chunk mask, what it lets through in depth, and a window's look-ahead beside it."""
    n, depth = 32, 3
    i = jnp.arange(n)
    mask = np.asarray(chunk_mask(i, i, Chunks(4, 1)), int)
    distance = np.arange(n) - np.arange(n)[:, None]
    window = ((distance >= -4) & (distance <= 2)).astype(int)
    panels = {
        "chunks of 4, left 1": mask,
        "after 3 such layers": np.linalg.matrix_power(mask, depth),
        "3 layers of a window\nwith 2 frames ahead": np.linalg.matrix_power(window, depth),
    }
    figure, axes = plt.subplots(1, 3, figsize=(8, 3.7), layout="constrained")
    for ax, (name, seen) in zip(axes, panels.items(), strict=True):
        future = distance > 0
        picture = np.where(seen > 0, np.where(future, 2, 1), 0)
        ax.imshow(
            picture,
            cmap=ListedColormap(["#f4f5f7", "#9fc0e6", ORANGE]),
            vmin=0,
            vmax=2,
            interpolation="nearest",
        )
        for edge in np.arange(-0.5, n, 4):
            ax.axhline(edge, color="white", lw=0.7)
            ax.axvline(edge, color="white", lw=0.7)
        ahead = int(np.where(seen > 0, distance, 0).max())
        ax.set(title=f"{name}\n{ahead} frames ahead at most", xticks=(), yticks=(), xlabel="sees")
    axes[0].set_ylabel("frame")
    return figure


def pre_normalizer() -> Figure:
    """Where squares overflow in float16, and where they do not."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.1), layout="constrained")
    n = np.arange(64, 2500)
    c = np.array([norm.range_constant(int(k), 2, jnp.float16) for k in n])
    left.loglog(n, (n / 2.0) ** 2, color=GREY, lw=2, label="divided by MAD")
    left.loglog(n, (n / (2 * c)) ** 2, color=BLUE, lw=2, label="divided by c · MAD")
    left.axhline(65504, color=RED, ls="--", lw=1.2)
    left.text(70, 8.0e4, "largest float16 number", color=RED, fontsize=9)
    left.set(xlabel="channels n", ylabel="largest z² of any row", xticks=(64, 256, 512, 2048))
    left.set(xticklabels=("64", "256", "512", "2048"), ylim=(5e2, 4e6))
    left.minorticks_off()
    left.legend(loc="lower right")

    row = np.random.default_rng(0).normal(size=512)
    scales = np.geomspace(1, 1.5e4, 40)
    errors: dict[str, list[float]] = {"naive float16": [], "lp_normalize": []}
    for scale in scales:
        x = (row * scale).astype(np.float16)
        exact = x.astype(float) - x.astype(float).mean()
        exact /= np.sqrt((exact**2).mean() + 1e-5)
        with np.errstate(all="ignore"):
            d = x - x.mean(dtype=np.float16)
            naive = d / np.sqrt((d * d).mean(dtype=np.float16) + np.float16(1e-5))
        ours = norm.lp_normalize(jnp.asarray(x), 2, 1e-5)
        for name, y in (("naive float16", naive), ("lp_normalize", np.asarray(ours))):
            errors[name].append(float(np.abs(np.nan_to_num(y.astype(float)) - exact).max()))
    for (name, error), color in zip(errors.items(), (GREY, BLUE), strict=True):
        right.loglog(scales, error, color=color, lw=2, label=name)
    right.set(xlabel="scale of a normal row, n = 512", ylabel="largest error of the output")
    right.legend(loc="center right")
    return figure


def dual_path() -> Figure:
    """Half-overlapping chunks, and the two paths over them."""
    n, k = 40, 16
    half, count = k // 2, chunk_count(n, k)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(8.4, 3), width_ratios=(1.5, 1), layout="constrained"
    )
    left.axvspan(0, n, color=PALE[BLUE], lw=0)
    for s in range(count):
        start = (s - 1) * half
        left.barh(s, k, left=start, height=0.6, color=ORANGE if s % 2 else "#f3c58b")
    left.axvline(0, color=BLUE)
    left.axvline(n, color=BLUE)
    left.text(n / 2, -1.05, f"{n} frames", ha="center", va="center", color=BLUE)
    left.set(xlabel="frame", ylabel="chunk s", yticks=range(count), ylim=(count - 0.4, -1.6))
    left.set_title(f"chunks of k = {k}: every frame lies in two", loc="left")
    right.set(xlim=(-1.6, 8.3), ylim=(count + 0.4, -1.7))
    right.axis("off")
    for s in range(count):
        for i in range(8):
            color = ORANGE if s == 2 else GREEN if i == 5 else PALE[GREY]
            right.add_patch(Rectangle((i, s), 0.86, 0.86, fc=color))
    right.text(3.5, -0.5, "position within the chunk", ha="center")
    right.text(-0.9, count / 2, "chunk", rotation=90, va="center")
    right.text(0, count + 0.3, "intra: one chunk", color=ORANGE, va="center")
    right.text(8, count + 0.3, "inter: one position", color=GREEN, ha="right", va="center")
    return figure


PICTURES: tuple[Callable[[], Figure], ...] = (
    slot,
    pulses,
    accumulation,
    conversion,
    mixers,
    attention_blocks,
    splitformer,
    early_exit,
    chunks,
    pre_normalizer,
    dual_path,
    moonshine,
)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG of 64 colours: a third of the size, and no difference to the eye."""
    with io.BytesIO() as raw:
        figure.savefig(raw, metadata={"Software": None})
        image = Image.open(raw).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    image.save(path, optimize=True)


def main(names: list[str]) -> None:
    """Draws the pictures of these names, or all."""
    FOLDER.mkdir(exist_ok=True)
    with plt.rc_context(STYLE):
        for draw in PICTURES:
            if not names or draw.__name__ in names:
                figure = draw()
                save(figure, FOLDER / f"{draw.__name__}.png")
                plt.close(figure)


if __name__ == "__main__":
    main(sys.argv[1:])
