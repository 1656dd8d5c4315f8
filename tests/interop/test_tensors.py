"""Copying an encoder, and the message about tensors that do not fit."""

import numpy as np
import pytest
from flax import nnx

from edgespeech.errors import InputError
from edgespeech.interop.tensors import copy_but_head, named_params, require_tensors
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
