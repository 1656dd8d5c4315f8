"""Flags from configuration classes: each has its help, its type and its place in the configuration."""

import dataclasses
from typing import Literal

import pytest
from absl import flags

from edgespeech.conversion.distil import DistilConfig
from edgespeech.data.batching import BatchConfig
from edgespeech.data.synthetic import SyntheticConfig
from edgespeech.errors import InputError
from edgespeech.models.wav2vec2 import Wav2Vec2Config
from edgespeech.nn.lpa import LPAConfig
from edgespeech.ops.features import SpecAugmentConfig
from edgespeech.training.state import OptimizerConfig
from experiments import flags as config_flags
from experiments.flags import attribute_docs, define_config, int_list, read_config

CONFIGS = (
    BatchConfig,
    DistilConfig,
    LPAConfig,
    OptimizerConfig,
    SpecAugmentConfig,
    SyntheticConfig,
    Wav2Vec2Config,
)


@dataclasses.dataclass(frozen=True)
class Inner:
    """An inner configuration.

    Attributes:
        depth: how deep,
            in metres.
    """

    depth: float = 1.5


@dataclasses.dataclass(frozen=True)
class Outer:
    """A configuration with a field of every type.

    Attributes:
        count: how many.
        rate: per second, in [0, 1].
        name: of it.
        on: whether it is.
        kind: one of two.
        factors: some numbers.
        hidden: set by the program.
        inner: nested.

    Raises:
        ValueError: the rate is out of range.
    """

    count: int = 3
    rate: float = 0.5
    name: str = "x"
    on: bool = False
    kind: Literal["a", "b"] = "a"
    factors: tuple[float, ...] = (1.0, 2.0)
    hidden: int = 7
    inner: Inner = Inner()

    def __post_init__(self):
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate is {self.rate}: it must be in [0, 1]")


@dataclasses.dataclass(frozen=True)
class Odd:
    """A configuration with a field that no flag can hold.

    Attributes:
        table: of values.
    """

    table: dict = dataclasses.field(default_factory=dict)


@pytest.fixture
def values(monkeypatch):
    """Flags of their own, with a function that parses a command line and reads the configuration."""
    mine = flags.FlagValues()
    monkeypatch.setattr(config_flags, "FLAGS", mine)
    for kind in ("enum", "bool", "integer", "float", "string", "list"):
        define = getattr(flags, f"DEFINE_{kind}")

        def into_mine(*args, define=define):
            return define(*args, flag_values=mine)

        monkeypatch.setattr(config_flags.flags, f"DEFINE_{kind}", into_mine)
    define_config("outer", Outer(), skip=("hidden",))
    config_flags.flags.DEFINE_list("layers", ["2"], "Layers.")
    return mine


def read(values, *arguments, default=None):
    values(["program", *arguments])
    return read_config("outer", default or Outer())


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_of_every_configuration_is_described(config):
    docs = attribute_docs(config)
    names = {field.name for field in dataclasses.fields(config)}
    assert docs.keys() == names
    assert all(len(text) > 5 and "  " not in text for text in docs.values())


def test_every_flag_of_the_program_has_help():
    from experiments import lpa_librispeech

    own = flags.FLAGS.get_key_flags_for_module(lpa_librispeech.__name__)
    assert not [flag.name for flag in own if not flag.help]
    names = {flag.name for flag in own}
    for prefix, config, skipped in (
        ("model", Wav2Vec2Config, {"vocab_size", "spec_augment"}),
        ("model.spec_augment", SpecAugmentConfig, set()),
        ("lpa", LPAConfig, set()),
        ("distil", DistilConfig, set()),
        ("optimizer", OptimizerConfig, set()),
        ("batch", BatchConfig, {"shuffle", "seed", "batch_multiple"}),
        ("synthetic", SyntheticConfig, {"seed"}),
    ):
        for field in dataclasses.fields(config):
            assert (f"{prefix}.{field.name}" in names) == (field.name not in skipped), field.name
            if field.name not in skipped:
                text = flags.FLAGS[f"{prefix}.{field.name}"].help
                assert attribute_docs(config)[field.name] in text
                assert "(default: " in text
    assert {"workdir", "resume", "quiet", "seed", "cache_dir", "teacher"} <= names


def test_help_is_the_docstring_with_the_default(values):
    assert values["outer.rate"].help == "per second, in [0, 1]. (default: 0.5)"
    assert values["outer.inner.depth"].help == "how deep, in metres. (default: 1.5)"
    assert values["outer.factors"].help == "some numbers. (default: 1.0,2.0)"
    assert "outer.hidden" not in values
    assert "outer.inner" not in values


def test_nothing_given_is_the_default(values):
    default = Outer(count=9, inner=Inner(4.0), hidden=1)
    assert read(values, default=default) == default


def test_values_are_parsed_by_type(values):
    found = read(
        values,
        "--outer.count=5",
        "--outer.rate=0.25",
        "--outer.name=y z",
        "--outer.on",
        "--outer.kind=b",
        "--outer.factors=0.9,1",
        "--outer.inner.depth=2",
    )
    assert found == Outer(5, 0.25, "y z", True, "b", (0.9, 1.0), 7, Inner(2.0))
    assert isinstance(found.factors[1], float)
    assert isinstance(found.inner.depth, float)


def test_false_zero_and_empty_are_values(values):
    default = Outer(on=True, rate=0.5, factors=(3.0,))
    found = read(values, "--noouter.on", "--outer.rate=0", "--outer.factors=", default=default)
    assert (found.on, found.rate, found.factors) == (False, 0.0, ())


def test_out_of_range_names_the_flag(values):
    with pytest.raises(InputError, match=r"--outer\.\*: rate is 1\.5: it must be in \[0, 1\]"):
        read(values, "--outer.rate=1.5")


def test_not_a_number_in_a_list(values):
    with pytest.raises(InputError, match=r"--outer\.factors holds 'fast': give float values"):
        read(values, "--outer.factors=1,fast")


@pytest.mark.parametrize(
    "argument", ["--outer.count=1.5", "--outer.kind=c", "--outer.on=maybe", "--outer.depth=1"]
)
def test_refused_by_the_parser(values, argument):
    with pytest.raises(flags.Error, match="outer"):
        values(["program", argument])


def test_int_list(values):
    values(["program", "--layers=5,2,5,11"])
    assert int_list("layers", 1, 12) == (2, 5, 11)
    with pytest.raises(InputError, match="--layers holds 11: give values from 1 to 10"):
        int_list("layers", 1, 10)
    with pytest.raises(InputError, match="--layers holds 2: give values from 3 to 12"):
        int_list("layers", 3, 12)
    values["layers"].value = ["2", "x"]
    with pytest.raises(InputError, match="--layers holds 'x': give int values"):
        int_list("layers", 1, 12)


def test_a_field_of_another_type():
    with pytest.raises(TypeError, match=r"--odd\.table: no flag for a field of type .*dict"):
        define_config("odd", Odd())
