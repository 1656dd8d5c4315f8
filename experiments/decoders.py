"""How a recogniser is decoded: greedily, by a beam search, or left early; flags, and what they make."""

import math
from pathlib import Path
from typing import Any

from absl import flags
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.evaluation.beam_decoder import BeamDecoder, FusionDecoder
from edgespeech.evaluation.decode import Decoder, GreedyDecoder, Seq2SeqDecoder
from edgespeech.evaluation.exit_decoder import EarlyExitDecoder
from edgespeech.inference.exit_budget import exit_within_compute, exit_within_deadline
from edgespeech.inference.exit_policy import ExitPolicy, load_policy
from edgespeech.inference.fusion import FusionConfig
from edgespeech.inference.language_model import read_arpa
from edgespeech.interop.pretrained import AnyTokenizer
from edgespeech.models.moonshine import Moonshine
from edgespeech.models.splitformer import Splitformer
from edgespeech.models.wav2vec2 import Wav2Vec2
from edgespeech.models.wav2vec2_exits import Wav2Vec2Exits
from experiments.flags import int_list

FLAGS = flags.FLAGS

# --- beam search
flags.DEFINE_integer(
    "beam", 0, "Prefixes of a CTC beam search; 0 decodes greedily.", lower_bound=0, upper_bound=1024
)
flags.DEFINE_string(
    "lm",
    None,
    "ARPA file of a word language model for --beam, plain or .gz, spelled like the model's text.",
)
flags.DEFINE_float(
    "lm_weight", FusionConfig.lm_weight, "Weight of the language model's log probability."
)
flags.DEFINE_float("word_bonus", FusionConfig.word_bonus, "Nats a word, with --beam.")
flags.DEFINE_list("hot_words", [], "Words that are expected, with --beam.")
flags.DEFINE_float("hot_bonus", FusionConfig.hot_bonus, "Nats for each of --hot_words.")


# --- models with exits
flags.DEFINE_list(
    "exits",
    [],
    "Layers of a wav2vec2, from 1, after which it may be left, through its own head (a model trained with exits brings "
    "them).",
)
flags.DEFINE_bool(
    "early_exit", False, "Leave by the rule that was saved with the model, exit_policy.json."
)
flags.DEFINE_float(
    "budget", None, "Deepest exit: within this share of the compute of a whole pass.", 0.0, 1.0
)
flags.DEFINE_float(
    "deadline_ms",
    None,
    "Deepest exit: within so many milliseconds a second of audio on this machine, timed first.",
    lower_bound=0.0,
)


def make_exit_decoder(model: Any, tokenizer: AnyTokenizer) -> tuple[Decoder, nnx.State, str]:
    """The decoder of a model that is left early, the state it takes, and what it adds to the name of the results.

    Raises:
        InputError: the model has no exits, there is no saved policy, or no exit fits.
    """
    if FLAGS.beam:
        raise InputError("--beam and exits do not go together: leave one out")
    if FLAGS.exits:
        if not isinstance(model, Wav2Vec2):
            raise InputError(
                f"--exits is for a wav2vec2 and this one is a {type(model).__name__}: leave it out"
            )
        model = Wav2Vec2Exits(model, int_list("exits", 1, len(model.layers)))
    elif not isinstance(model, Splitformer | Wav2Vec2Exits):
        raise InputError(
            f"--checkpoint={FLAGS.checkpoint} is a {type(model).__name__} without exits: give a Splitformer, or "
            "--exits for a wav2vec2"
        )
    if FLAGS.early_exit:
        policy = load_policy(FLAGS.checkpoint)
    else:
        policy = ExitPolicy("max_probability", math.inf)
    deepest, name = len(model.blocks), f"_{policy.rule}" if FLAGS.early_exit else ""
    if FLAGS.budget is not None:
        deepest = min(deepest, exit_within_compute(model, FLAGS.budget))
    if FLAGS.deadline_ms is not None:
        deepest = min(deepest, exit_within_deadline(model, FLAGS.deadline_ms)[0])
    print(f"deepest exit: {deepest} of {len(model.blocks)}")
    graphdef, state = nnx.split(model)
    return EarlyExitDecoder(graphdef, tokenizer, policy, deepest), state, f"{name}_exit{deepest}"


def make_decoder(model: Any, tokenizer: AnyTokenizer) -> tuple[Decoder, nnx.State, str]:
    """The decoder that the flags ask for, the state it takes, and what it adds to the name of the results.

    Raises:
        InputError: flags of a beam search without --beam, a beam search of an encoder-decoder, or see `read_arpa`.
    """
    if FLAGS.exits or FLAGS.early_exit or FLAGS.budget is not None or FLAGS.deadline_ms is not None:
        return make_exit_decoder(model, tokenizer)
    graphdef, state = nnx.split(model)
    fused = bool(FLAGS.lm or FLAGS.hot_words or FLAGS.word_bonus)
    if fused and not FLAGS.beam:
        raise InputError("--lm, --hot_words and --word_bonus are for a beam search: add --beam=16")
    if isinstance(model, Moonshine):
        if FLAGS.beam:
            raise InputError(
                "--beam is for a model with a CTC head and this one is a Moonshine: leave it out"
            )
        return Seq2SeqDecoder(graphdef, tokenizer), state, ""
    if not FLAGS.beam:
        return GreedyDecoder(graphdef, tokenizer), state, ""
    if not fused:
        return BeamDecoder(graphdef, tokenizer, FLAGS.beam), state, f"_beam{FLAGS.beam}"
    config = FusionConfig(
        beam_width=FLAGS.beam,
        lm_weight=FLAGS.lm_weight,
        word_bonus=FLAGS.word_bonus,
        hot_words=tuple(FLAGS.hot_words),
        hot_bonus=FLAGS.hot_bonus,
    )
    name = f"_beam{FLAGS.beam}"
    if FLAGS.lm:
        name += f"_{Path(FLAGS.lm).name.split('.')[0]}{FLAGS.lm_weight:g}"
    if FLAGS.word_bonus:
        name += f"_bonus{FLAGS.word_bonus:g}"
    if FLAGS.hot_words:
        name += "_hot"
    language_model = read_arpa(FLAGS.lm) if FLAGS.lm else None
    return FusionDecoder(graphdef, tokenizer, config, language_model), state, name
