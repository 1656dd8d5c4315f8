"""The report: numbers as printed, schema errors, JSON that any parser reads."""

import copy
import importlib.metadata
import json
import math
import re

import numpy as np
import pytest

import edgespeech
from edgespeech.errors import InputError
from edgespeech.evaluation.machine import device, versions
from edgespeech.evaluation.report import write_report


@pytest.fixture
def report():
    return {
        "title": "LPA in a small wav2vec2",
        "command": "python -m experiments.lpa_librispeech --data=synthetic",
        "date": "2026-01-02",
        "data": {
            "kind": "synthetic",
            "description": "Words of sine tones in noise.",
            "train": {"utterances": 2000, "hours": 1.234, "speakers": 20},
            "dev": {"utterances": 100, "hours": 0.1, "speakers": 4},
            "test": {"utterances": 100, "hours": 0.105, "speakers": 4},
            "skipped": {"too long": 3, "empty": 0},
            "padding_waste": 0.0712,
        },
        "teacher": {
            "wer": 0.03374,
            "ci": [0.03, 0.038],
            "cer": 0.011,
            "parameters": 1234567,
            "steps": 5000,
            "config": {"layers": 4, "dtype": np.dtype("float32")},
        },
        "sweep": [
            {"layer": 1, "mse": 0.00123456, "relative_mse": 0.0123, "variance": 0.1},
            {"layer": 2, "mse": 0.5, "relative_mse": math.nan, "variance": 0.0},
        ],
        "order": [1, 2],
        "hybrids": [
            {
                "replaced": 1,
                "layers": [1],
                "wer": np.float32(0.05),
                "ci": (0.045, 0.055),
                "cer": 0.02,
                "parameters": np.int64(1200000),
                "delta_vs_teacher": {"difference": 0.01626, "ci": [-0.001, 0.0325]},
            },
        ],
        "controls": [
            {
                "name": "local path | no pulses",
                "replaced": 2,
                "layers": [1, 2],
                "wer": 1.07,
                "ci": [1.0, 1.1],
                "cer": 0.9,
                "parameters": 1100000,
            },
        ],
        "stages": [{"name": "teacher", "seconds": 3725.0}, {"name": "sweep", "seconds": 42.25}],
        "versions": {"jax": "0.10.2"},
        "device": {"platform": "cpu", "kind": "cpu", "count": 1, "cpu": "Some CPU", "cores": 2},
        "seeds": {"teacher": 0},
        "notes": ["One note."],
    }


def table_rows(text, caption):
    """Cells of the table below a caption, header first."""
    block = text.split(f"*{caption}")[1].split("\n\n")[1]
    rows = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in block.splitlines()]
    return [row for row in rows if set(row) != {"---"}]


def test_text(tmp_path, report):
    write_report(tmp_path, report)
    text = (tmp_path / "report.md").read_text()
    lines = text.splitlines()
    assert lines[0] == "# Report of a conversion experiment: LPA in a small wav2vec2"
    assert lines[2].startswith("**Synthetic data: Words of sine tones in noise.**")
    assert "WER **3.37 %**, 95 % CI [3.00 %, 3.80 %], CER 1.10 %, 1,234,567 parameters" in text
    assert "python -m experiments.lpa_librispeech --data=synthetic" in text

    header, teacher, hybrid = table_rows(text, "WER for every number of replaced layers")
    assert dict(zip(header, hybrid, strict=False)) == {
        "replaced": "1",
        "layers": "1",
        "WER": "5.00 %",
        "95 % CI": "[4.50 %, 5.50 %]",
        "CER": "2.00 %",
        "parameters": "1,200,000",
        "WER - teacher": "+1.63",
        "95 % CI of the difference": "[-0.10, +3.25]",
    }
    assert teacher[:3] == ["0", "none (teacher)", "3.37 %"]
    (_, control) = table_rows(text, "Controls on the same test set")
    name = "local path \\| no pulses"
    assert control == [
        name,
        "2",
        "1, 2",
        "107.00 %",
        "[100.00 %, 110.00 %]",
        "90.00 %",
        "1,100,000",
    ]
    sweep = table_rows(text, "Each layer replaced on its own")
    assert sweep[1:] == [["1", "0.001235", "0.0123", "0.1"], ["2", "0.5", "n/a", "0"]]
    assert "Order of replacement: 1, 2." in text
    splits = table_rows(text, "Splits")
    assert splits[1:] == [
        ["train", "2,000", "1.23", "20"],
        ["dev", "100", "0.10", "4"],
        ["test", "100", "0.10", "4"],
    ]
    assert "Skipped: too long 3, empty 0. Padding: 7.12 % of the frames." in text
    stages = table_rows(text, "Time per stage")
    assert stages[1:] == [["teacher", "1 h 02 min"], ["sweep", "42.2 s"], ["all", "1 h 02 min"]]
    assert "- Device: 1 x cpu (cpu), 2 cores of Some CPU" in text
    assert "- Versions: jax 0.10.2" in text
    assert '- Seeds: {"teacher": 0}' in text
    assert "- One note." in text


def with_further_split(report):
    """The same with a second test split."""
    rates = {"wer": 0.08, "ci": [0.07, 0.09], "cer": 0.03}
    delta = {"delta_vs_teacher": {"difference": 0.02, "ci": [0.01, 0.03]}}
    report = copy.deepcopy(report)
    report["data"]["test"]["name"] = "test-clean"
    report["data"]["splits"] = {"test-other": {"utterances": 50, "hours": 0.5, "speakers": 3}}
    report["teacher"]["splits"] = {"test-other": rates}
    report["hybrids"][0]["splits"] = {"test-other": {**rates, "wer": 0.1, **delta}}
    report["controls"][0]["splits"] = {"test-other": {**rates, "wer": 1.2}}
    return report


def test_further_test_splits_are_columns(tmp_path, report):
    report = with_further_split(report)
    write_report(tmp_path, report)
    text = (tmp_path / "report.md").read_text()
    assert "What names no split is of test-clean; further ones: test-other." in text
    header, teacher, hybrid = table_rows(text, "WER for every number of replaced layers")
    assert header[6:8] == ["WER, test-other", "95 % CI, test-other"]
    assert (teacher[2], teacher[6]) == ("3.37 %", "8.00 %")
    assert (hybrid[2], hybrid[6:8]) == ("5.00 %", ["10.00 %", "[7.00 %, 9.00 %]"])
    assert hybrid[8] == "+1.63"  # the difference stays the first split's
    header, control = table_rows(text, "Controls on the same test set")
    assert control[header.index("WER, test-other")] == "120.00 %"
    splits = table_rows(text, "Splits")
    assert [row[0] for row in splits[3:]] == ["test (test-clean)", "test (test-other)"]
    assert splits[-1][1:] == ["50", "0.50", "3"]
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["hybrids"][0]["wer"] == pytest.approx(0.05)
    assert written["hybrids"][0]["splits"] == report["hybrids"][0]["splits"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["teacher", "splits"], None, r"\['teacher'\] has the further test splits none: give .*other"),
        (["data", "splits"], None, r"\['teacher'\] has the further test splits test-other: .* none"),
        (["hybrids", 0, "splits"], {}, r"\['hybrids'\] has the further test splits none"),
        (["controls", 0, "splits", "test-other", "ci"], None, r"\['test-other'\] lacks 'ci'"),
        (["hybrids", 0, "splits", "test-other", "delta_vs_teacher"], None, "lacks 'delta_vs_teacher'"),
        (["data", "splits", "test-other", "hours"], "1", r"\['hours'\] is '1'"),
        (["data", "test", "name"], 3, r"\['name'\] is 3: give a value of type str"),
    ],
)  # fmt: skip
def test_bad_further_splits(tmp_path, report, path, value, message):
    with pytest.raises(InputError, match=message):
        write_report(tmp_path, edited(with_further_split(report), path, value))


def test_synthetic_is_said_in_every_caption_and_only_then(tmp_path, report):
    write_report(tmp_path, report)
    captions = re.findall(r"^\*([^*].*)\*", (tmp_path / "report.md").read_text(), re.MULTILINE)
    assert len(captions) == 5
    assert all("synthetic" in caption for caption in captions)

    report["data"]["kind"] = "LibriSpeech"
    report["command"] = "python -m experiments.lpa_librispeech"
    write_report(tmp_path, report)
    text = (tmp_path / "report.md").read_text()
    assert "ynthetic" not in text
    assert "Data: LibriSpeech." in text


def test_json(tmp_path, report):
    write_report(tmp_path, report | {"extra": {"kept": True}})

    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    written = json.loads((tmp_path / "report.json").read_text(), parse_constant=no_constant)
    assert written["sweep"][1]["relative_mse"] is None
    assert written["hybrids"][0]["wer"] == pytest.approx(0.05)
    assert written["hybrids"][0]["ci"] == [0.045, 0.055]
    assert written["hybrids"][0]["parameters"] == 1200000
    assert written["teacher"]["config"] == {"layers": 4, "dtype": "float32"}
    assert written["extra"] == {"kept": True}
    assert written["data"] == report["data"]


def test_images_are_linked_relatively(tmp_path, report):
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "wer_curve.png").touch()
    (tmp_path / "plots" / "sweep.png").touch()
    write_report(tmp_path, report)
    links = re.findall(r"^!\[(.*)\]\((.*)\)$", (tmp_path / "report.md").read_text(), re.MULTILINE)
    assert links == [
        ("sweep (synthetic data)", "plots/sweep.png"),
        ("wer curve (synthetic data)", "plots/wer_curve.png"),
    ]


def test_empty_lists(tmp_path, report):
    empty = {"sweep": [], "order": [], "hybrids": [], "controls": [], "stages": [], "notes": []}
    write_report(tmp_path, report | empty)
    text = (tmp_path / "report.md").read_text()
    assert "*Controls on the same test set (synthetic data)*: none." in text
    assert "Order of replacement: none." in text


def edited(report, path, value):
    """Copy with one value replaced, or removed when the value is None."""
    report = copy.deepcopy(report)
    part = report
    for key in path[:-1]:
        part = part[key]
    if value is None:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return report


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["title"], None, r"report lacks 'title'"),
        (["data", "dev", "hours"], None, r"report\['data'\]\['dev'\] lacks 'hours'"),
        (["hybrids", 0, "delta_vs_teacher", "ci"], None, r"\['hybrids'\]\[0\].* lacks 'ci'"),
        (["teacher", "ci"], [0.1], r"\['ci'\] has 1 items: give 2"),
        (["teacher", "wer"], "3.4%", r"\['wer'\] is '3.4%': give a value of type Real"),
        (["teacher", "steps"], 1.5, r"\['steps'\] is 1.5: give a value of type Integral"),
        (["teacher", "steps"], True, r"\['steps'\] is True: give a value of type Integral"),
        (["notes"], "text", r"\['notes'\] is 'text': give a value of type Sequence"),
        (["order"], [0, 1], r"\['order'\] has layer 0: number layers from 1"),
        (["controls", 0, "layers"], [3, 0], r"\['controls'\] has layer 0"),
        (["sweep", 0, "layer"], 0, r"\['sweep'\] has layer 0"),
    ],
)
def test_bad_report(tmp_path, report, path, value, message):
    with pytest.raises(InputError, match=message):
        write_report(tmp_path, edited(report, path, value))
    assert not (tmp_path / "report.json").exists()


def test_versions():
    found = versions()
    assert found["numpy"] == np.__version__
    assert re.fullmatch(r"3\.\d+\.\d+.*", found["python"])
    assert found["edgespeech"] == edgespeech.__version__
    assert {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint"} <= found.keys()


def test_version_of_a_package_that_is_absent(monkeypatch):
    def version(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert versions()["flax"] == "not installed"


def test_device(tmp_path, report):
    jax = pytest.importorskip("jax")
    found = device()
    assert found["platform"] == jax.default_backend()
    assert found["count"] == jax.device_count()
    assert found["cores"] >= 1
    assert found["cpu"]
    write_report(tmp_path, report | {"device": found, "versions": versions()})
