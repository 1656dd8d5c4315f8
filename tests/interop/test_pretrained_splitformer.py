"""Models with exits as folders: bit for bit there and back, running statistics included."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.errors import InputError
from edgespeech.interop.pretrained import load_pretrained, save_pretrained
from edgespeech.interop.tensors import named_variables
from tests.support.tiny_exits import exit_model


@pytest.fixture
def folder(tmp_path):
    save_pretrained(tmp_path / "model", exit_model(), CharTokenizer(), {"steps": 3})
    return tmp_path / "model"


def test_round_trip_is_exact_with_running_statistics(folder):
    model = exit_model()
    found, tokenizer, about = load_pretrained(folder)
    assert found.config == model.config
    assert about == {"steps": 3}
    assert tokenizer.decode([3, 4]) == "AB"
    wanted, got = named_variables(model), named_variables(found)
    assert wanted.keys() == got.keys()
    assert "blocks.0.layers.0.conv.middle_norm.running_mean" in got
    for name, variable in wanted.items():
        np.testing.assert_array_equal(got[name][...], variable[...], err_msg=name)


def test_tensors_that_do_not_fit_are_named(folder):
    path = folder / "weights.safetensors"
    tensors = load_file(path)
    tensors["blocks.0.branch.layer.norm.scale"] = np.full(8, np.nan, np.float32)
    del tensors["heads.1.output.bias"]
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"norm.scale holds values.*heads.1.output.bias is miss"):
        load_pretrained(folder)
