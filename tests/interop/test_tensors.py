"""Copying an encoder, and the message about tensors that do not fit."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.interop.tensors import copy_but_head, named_params, require_tensors, sketch
from tests.support.modules import randomize


class Model(nnx.Module):
    def __init__(self, d, vocab):
        self.layer = nnx.Linear(d, d, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(d, vocab, rngs=nnx.Rngs(1))


def test_copy_takes_all_but_the_head():
    source, model = randomize(Model(3, 5)), Model(3, 7)
    head = np.array(model.head.kernel[...])
    copy_but_head(model, source, "runs/other/teacher")
    np.testing.assert_array_equal(model.layer.kernel[...], source.layer.kernel[...])
    np.testing.assert_array_equal(model.layer.bias[...], source.layer.bias[...])
    np.testing.assert_array_equal(model.head.kernel[...], head)


def test_copy_into_other_sizes_names_the_tensors():
    with pytest.raises(InputError) as error:
        copy_but_head(Model(4, 5), Model(3, 5), "runs/other/teacher")
    for part in (
        "runs/other/teacher",
        "layer.kernel has shape [3, 3] instead of [4, 4]",
        "--model",
    ):
        assert part in str(error.value)
    assert "head" not in str(error.value)


def test_message_names_every_kind_of_fault_and_at_most_eight():
    wanted = {name: (2,) for name in "abc"}
    found = {"a": np.zeros(3), "b": np.array([1.0, np.inf]), "d": np.zeros(2)}
    with pytest.raises(InputError) as error:
        require_tensors(wanted, found, misfit="m", fix="f")
    assert str(error.value) == (
        "m: a has shape [3] instead of [2]; b holds values that are not finite; c is missing; "
        "d is not part of the model; f"
    )
    with pytest.raises(InputError, match="x7 is missing and 4 more; f"):
        require_tensors({f"x{i:x}": () for i in range(12)}, {}, misfit="m", fix="f")
    require_tensors({"a": (2,)}, {"a": np.zeros(2)}, misfit="m", fix="f")  # fits: no error


def test_names_are_paths():
    assert sorted(named_params(Model(2, 3))) == [
        "head.bias",
        "head.kernel",
        "layer.bias",
        "layer.kernel",
    ]


def test_a_sketch_has_the_shapes_and_draws_no_keys():
    drawn = []

    def make():
        rngs = nnx.Rngs(0)
        model = Model(3, 5)
        drawn.append((rngs.params(), rngs.params()))
        return model

    weights = {name: np.zeros(param.shape) for name, param in named_params(Model(3, 5)).items()}
    model = sketch(make, Path("model.json"), {"width": 3}, weights)
    found = {name: (param.shape, param.dtype) for name, param in named_params(model).items()}
    assert found == {name: (value.shape, np.float32) for name, value in weights.items()}
    one, other = map(jax.random.key_data, drawn[0])
    np.testing.assert_array_equal(one, other)
    rngs = nnx.Rngs(0)  # behind it, keys are drawn as ever
    np.testing.assert_array_equal(
        jax.random.key_data(rngs.params()), jax.random.key_data(nnx.Rngs(0).params())
    )
    assert rngs.params() != nnx.Rngs(0).params()


def test_keys_are_drawn_again_after_a_sketch_that_failed():
    def make():
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        sketch(make, Path("model.json"), {}, {})
    rngs = nnx.Rngs(0)
    assert rngs.params() != rngs.params()
