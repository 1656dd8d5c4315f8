"""Show what a saved model is made of: layers, mixers, pulses, exits, parameters, multiplications."""

import argparse
from typing import Any

from edgespeech.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", help="folder of a saved model, or a checkpoint of Hugging Face")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="of audio to count MACs for (default: 10)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints the description."""
    from edgespeech.interop.open_model import open_model

    if not 0.1 <= arguments.seconds <= 3600:
        raise InputError(f"--seconds is {arguments.seconds:g}: give 0.1 to 3600")
    model, tokenizer, about = open_model(arguments.model)
    print("\n".join(describe(model, tokenizer, about, arguments.seconds)))
    return 0


def describe(model: Any, tokenizer: Any, about: dict[str, Any], seconds: float) -> list[str]:
    """A model in lines of text.

    Args:
        model: of any family.
        tokenizer: its tokenizer, or None.
        about: what was saved with it.
        seconds: of audio to count MACs for.
    """
    import jax
    import jax.numpy as jnp

    from edgespeech.conversion.layers import mixer_layers
    from edgespeech.evaluation.macs import count_macs
    from edgespeech.models.moonshine import Moonshine
    from edgespeech.models.sepformer import SepFormer
    from edgespeech.models.splitformer import Splitformer
    from edgespeech.models.wav2vec2 import count_parameters
    from edgespeech.models.wav2vec2_exits import Wav2Vec2Exits
    from edgespeech.types import SAMPLE_RATE

    config = model.config
    rate = config.sample_rate if isinstance(model, SepFormer) else SAMPLE_RATE
    samples = round(seconds * rate)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    encoder_alone = isinstance(model, Moonshine)
    macs = count_macs(
        model.encode if encoder_alone else model,
        jax.ShapeDtypeStruct((1, samples), jnp.float32),
        lengths,
    )
    lines = [
        f"{type(model).__name__}, {count_parameters(model):,} parameters",
        f"{macs.total() / 1e9:.3f} G MACs for {seconds:g} s of audio"
        + (", encoder alone" if encoder_alone else ""),
    ]
    if tokenizer is not None:
        lines.append(f"vocabulary of {config.vocab_size}, {type(tokenizer).__name__}")
        lines.append(f"frames of {config.frame_seconds * 1000:g} ms")

    rows: list[tuple[str, ...]] = [
        ("layer", "mixer", "parameters", "M MACs", "of the mixer", "pulses of a head")
    ]
    for path, layer in mixer_layers(model).items():
        counts = ["", ""]
        if tokenizer is not None:  # a SepFormer's layers run over chunks
            n = int(config.num_frames(samples))
            # The branch of a Splitformer runs at half the rate.
            x = jax.ShapeDtypeStruct(
                (1, -(-n // 2) if "branch" in path else n, config.width), jnp.float32
            )
            counts = [
                f"{count_macs(part, x, lengths).total() / 1e6:.1f}" for part in (layer, layer.mixer)
            ]
        name = ".".join(map(str, path))
        mixer = type(layer.mixer).__name__
        rows.append((name, mixer, f"{count_parameters(layer):,}", *counts, pulses(layer.mixer)))
    lines += ["", *_table(rows)]

    if isinstance(model, Splitformer | Wav2Vec2Exits):
        from edgespeech.models.exit_macs import exit_macs

        exits: list[tuple[str, ...]] = [("exit", "G MACs up to it")]
        for number, count in enumerate(exit_macs(config, samples), 1):
            exits.append((str(number), f"{count / 1e9:.3f}"))
        lines += ["", *_table(exits)]
    return lines + [""] * bool(about) + [f"{key}: {value}" for key, value in about.items()]


def pulses(mixer: Any) -> str:
    """How many pulses of each kind a head of an LPA has; nothing for another mixer."""
    from edgespeech.nn.lpa import LPA

    if not isinstance(mixer, LPA):
        return ""
    config = mixer.config
    kinds = ("aperiodic", "runs", "periodic", "positional", "mean")
    parts = [f"{getattr(config, kind)} {kind}" for kind in kinds if getattr(config, kind)]
    if config.local:
        parts.append(f"local path of {config.local_kernel_size} frames")
    return ", ".join(parts)


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
