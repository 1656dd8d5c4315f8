"""Models as the latency program sees them: built with random weights, compiled ahead, whole and in parts."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from edgespeech.evaluation.latency import Prepare
from edgespeech.inference.compiling import inference_options
from edgespeech.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from edgespeech.nn.attention import SelfAttention
from edgespeech.nn.kept_gates import keep_gates
from edgespeech.nn.lpa import LPA, harden
from edgespeech.nn.lpa_config import LPAConfig
from edgespeech.nn.token_mixer_controls import Removed
from edgespeech.nn.transformer import EncoderLayer
from edgespeech.ops.mask import mask_from_lengths, zero_padding
from edgespeech.types import SAMPLE_RATE, Array, Audio, Frames, Lengths, Logits

# `run(part, function, module, *arrays)` returns `function(module, *arrays)`.
RunPart: TypeAlias = Callable[..., Any]


class TimedModel(Protocol):
    """What the latency program asks of a model; picklable, and without arrays until `build`."""

    @property
    def config(self) -> Any:
        """By which peers are found."""
        ...

    @property
    def num_layers(self) -> int:
        """Mixers that can be replaced."""
        ...

    @property
    def sample_rate(self) -> int:
        """Hz of the audio."""
        ...

    def num_frames(self, num_samples: int) -> int:
        """Output frames for so many samples."""
        ...

    def build(self, replaced: Sequence[int]) -> Any:
        """The model with random weights and hard LPA in these layers, counted from 0."""
        ...

    def keep_gates(self, model: Any, num_samples: int) -> None:
        """Computes what hard LPA keeps for audio of so many samples, in place: see `nn.kept_gates`."""
        ...

    def forward(self, model: Any, audio: Audio, lengths: Lengths) -> Array:
        """What is timed."""
        ...

    def run_parts(self, model: Any, audio: Audio, lengths: Lengths, run: RunPart) -> Array:
        """The same result as `forward`, every step through `run`. The replaceable steps are named `mixers`."""
        ...


@dataclasses.dataclass(frozen=True)
class TimedWav2Vec2:
    """`Wav2Vec2` as a `TimedModel`; weights are random, N(0, 0.02^2), which changes no time: all operations are dense.

    Attributes:
        config: sizes of the model.
        lpa: of the replaced layers.
    """

    config: Wav2Vec2Config
    lpa: LPAConfig = dataclasses.field(default_factory=LPAConfig)

    @property
    def num_layers(self) -> int:
        """Encoder layers."""
        return self.config.num_layers

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return SAMPLE_RATE

    def num_frames(self, num_samples: int) -> int:
        """Encoder frames."""
        return self.config.num_frames(num_samples)

    def build(self, replaced: Sequence[int]) -> Wav2Vec2:
        """The hybrid with hard LPA in these layers, counted from 0; for none, attention everywhere."""

        def make() -> Wav2Vec2:
            model = Wav2Vec2(self.config, rngs=nnx.Rngs(0))
            for i in replaced:
                attention = cast(SelfAttention, model.layers[i].mixer)
                lpa = LPA.from_attention(attention, self.lpa, rngs=nnx.Rngs(i))
                model.layers[i].mixer = lpa
            if replaced:
                harden(model)
            return model

        return random_weights(make)

    def keep_gates(self, model: Wav2Vec2, num_samples: int) -> None:
        """The gates of every LPA that do not see the input."""
        n = self.num_frames(num_samples)
        keep_gates(model, jnp.full(1, n), n)

    def forward(self, model: Wav2Vec2, audio: Audio, lengths: Lengths) -> Logits:
        """Logits `[1 n v]`."""
        return model(audio, lengths).logits

    def run_parts(self, model: Wav2Vec2, audio: Audio, lengths: Lengths, run: RunPart) -> Logits:
        """front_end, projection_positions, then mixers and ffn for every layer, head; norms count with ffn."""
        norm = () if self.config.norm_first else (model.norm,)
        head = (model.norm, model.head) if self.config.norm_first else (model.head,)
        x, lengths = run("front_end", apply, model.front_end, audio, lengths)
        entry = (model.projection_norm, model.projection, model.positions, *norm)
        x = run("projection_positions", _project, entry, x, lengths)
        for layer in model.layers:
            h = run("ffn", apply, layer.mixer_norm, x) if layer.norm_first else x
            y = run("mixers", apply, layer.mixer, h, lengths)
            x = run("ffn", after_mixer, without_mixer(layer), x, y, lengths)
        return run("head", _chain, head, x)


def random_weights(make: Callable[[], Any]) -> Any:
    """The module that `make` makes, with weights N(0, 0.02^2)."""
    # Shapes by tracing, values by NumPy: JAX compiles an initialiser for every shape, in every child process anew
    # (three layers of width 16: 6 s of CPU time against 0.5 s, jax 0.10.2).
    graphdef, state = nnx.split(nnx.eval_shape(make))
    random = np.random.default_rng(0)
    weights = jax.tree.map(
        lambda leaf: jnp.asarray(0.02 * random.standard_normal(leaf.shape), leaf.dtype), state
    )
    return nnx.merge(graphdef, weights)


def apply(module: Any, *arrays: Array) -> Any:
    """A module as a part of its own."""
    return module(*arrays)


def _chain(modules: tuple, x: Frames) -> Frames:
    for module in modules:
        x = module(x)
    return x


def _project(modules: tuple, x: Frames, lengths: Lengths) -> Frames:
    """From the front end's channels to the first layer's input, as in `Wav2Vec2`."""
    projection_norm, projection, positions, *norm = modules
    x = zero_padding(projection(projection_norm(x)), mask_from_lengths(lengths, x.shape[1]))
    return _chain(tuple(norm), x + positions(x, lengths))


def without_mixer(layer: EncoderLayer) -> EncoderLayer:
    """A copy that is alike for all layers, whatever their mixers are."""
    copy = nnx.merge(*nnx.split(layer))
    copy.mixer = Removed()
    return copy


def after_mixer(layer: EncoderLayer, x: Frames, y: Frames, lengths: Lengths) -> Frames:
    """The layer on x where the mixer's output is known to be y: residuals, norms and FFN remain."""
    layer.mixer = lambda *_: y
    return layer(x, lengths)


# ----------------------------------------------------------------------------------------- compiling


def compile_ahead(
    function: Callable[..., Any], module: Any, *arrays: Array
) -> tuple[Callable[..., Any], list[Array]]:
    """Compiles `function(module, *arrays)` for the shapes given: the executable, and its first argument.

    That argument is the list of the module's arrays: flattening a module takes longer than starting the program.
    """
    graphdef, state = nnx.split(module)
    leaves, structure = jax.tree.flatten(state)

    def run(leaves, *arrays):
        return function(nnx.merge(graphdef, jax.tree.unflatten(structure, leaves)), *arrays)

    return jax.jit(run, compiler_options=inference_options()).lower(
        leaves, *arrays
    ).compile(), leaves


def prepare_forward(timed: TimedModel, model: Any, audio: np.ndarray) -> functools.partial:
    """The compiled forward pass on audio `[1 t]`, as a call: what depends on the length alone is computed before."""
    timed.keep_gates(model, audio.shape[1])
    arrays = _arrays(audio)
    executable, leaves = compile_ahead(timed.forward, model, *arrays)
    return functools.partial(executable, leaves, *arrays)


def load_model(timed: TimedModel, replaced: Sequence[int]) -> Prepare:
    """`build` and `prepare_forward`: with its arguments bound, a load."""
    return functools.partial(prepare_forward, timed, timed.build(replaced))


def prepare_parts(
    timed: TimedModel, model: Any, audio: np.ndarray, calls: dict[Hashable, functools.partial]
) -> list[tuple[str, Hashable]]:
    """Compiles every distinct part of the model on its own, with the input that it has inside the model.

    Parts are alike when function, structure and shapes are: twelve equal layers are compiled and timed once.

    Args:
        timed: how the model falls into parts.
        model: from `timed.build`.
        audio: `[1 t]`.
        calls: parts by key; those not there yet are added.

    Returns:
        Name and key of every part that the model runs, in order, with repetitions.
    """
    uses: list[tuple[str, Hashable]] = []

    def run(part: str, function: Callable[..., Any], module: Any, *arrays: Array) -> Any:
        graphdef, state = nnx.split(module)
        key = (function, graphdef, tuple((array.shape, array.dtype) for array in arrays))
        if key not in calls:
            executable, leaves = compile_ahead(function, module, *arrays)
            calls[key] = functools.partial(executable, leaves, *arrays)
        uses.append((part, key))
        return calls[key].func(jax.tree.leaves(state), *arrays)

    timed.keep_gates(model, audio.shape[1])
    timed.run_parts(model, *_arrays(audio), run)
    return uses


def _arrays(audio: np.ndarray) -> tuple[Audio, Lengths]:
    return jnp.asarray(audio), jnp.asarray([audio.shape[1]])
