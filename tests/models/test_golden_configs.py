"""Every preset as checked-in text: a changed default shows in review.

After an intended change: EDGESPEECH_UPDATE_GOLDEN=1 python -m pytest tests/models/test_golden_configs.py
"""

import dataclasses
import difflib
import os
from pathlib import Path

import pytest

from edgespeech.models.edge_conformer_config import EdgeConformerConfig
from edgespeech.models.moonshine import MoonshineConfig
from edgespeech.models.moonshine_ctc import MoonshineCTCConfig
from edgespeech.models.sepformer import SepFormerConfig
from edgespeech.models.splitformer import SplitformerConfig
from edgespeech.models.wav2vec2 import Wav2Vec2Config
from edgespeech.nn.lpa_config import LPAConfig

GOLDEN = Path(__file__).parent.parent / "golden"
UPDATE = os.environ.get("EDGESPEECH_UPDATE_GOLDEN") == "1"


def presets(config_class):
    """Names of the class methods that make a configuration."""
    return [
        name
        for name, value in vars(config_class).items()
        if isinstance(value, classmethod) and not name.startswith("_")
    ]


CONFIGS = (
    EdgeConformerConfig,
    LPAConfig,
    MoonshineConfig,
    MoonshineCTCConfig,
    SepFormerConfig,
    SplitformerConfig,
    Wav2Vec2Config,
)
CASES = [(c, name) for c in CONFIGS for name in presets(c)]


def golden_path(config_class, preset):
    return GOLDEN / f"{config_class.__name__}.{preset}.txt"


def dump(config, prefix=""):
    """One line a field, `name = value`, nested ones as `outer.inner`."""
    lines = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            lines += dump(value, f"{prefix}{field.name}.")
        else:
            lines.append(f"{prefix}{field.name} = {value!r}\n")
    return lines


@pytest.mark.parametrize(("config_class", "preset"), CASES)
def test_preset_is_as_checked_in(config_class, preset):
    lines = dump(getattr(config_class, preset)())
    path = golden_path(config_class, preset)
    if UPDATE:
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(lines))
    want = path.read_text().splitlines(keepends=True) if path.exists() else []
    diff = "".join(difflib.unified_diff(want, lines, path.name, "now"))
    assert not diff, f"{diff}\nIf this is meant, run with EDGESPEECH_UPDATE_GOLDEN=1"


def test_every_golden_file_has_its_preset():
    names = {golden_path(*case).name for case in CASES}
    assert len(names) == 25
    assert {path.name for path in GOLDEN.glob("*.txt")} == names
