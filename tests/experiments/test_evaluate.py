"""Scoring a checkpoint of Hugging Face, in a process of its own: the flags are those of another program."""

import json
import subprocess
import sys

import jiwer
import pytest

from tests.golden.hf_checkpoint import write
from tests.support.programs import write_tones
from tests.support.tiny import ROOT


@pytest.fixture
def start(tmp_path):
    """Starts the program on tones."""
    data = write_tones(tmp_path / "data")
    (tmp_path / "hf").mkdir()
    write(tmp_path / "hf")

    def start(*arguments):
        command = [sys.executable, "-m", "experiments.evaluate", f"--data_dir={data}"]
        command += [f"--cache_dir={tmp_path / 'cache'}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    return start


def test_hugging_face_checkpoint(start, tmp_path):
    done = start(f"--checkpoint={tmp_path / 'hf'}", "--padding=upstream", "--quiet")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "hf" / "evaluations"
    facts = json.loads((folder / "folder_test.json").read_text())
    assert facts["padding"] == "upstream"
    assert facts["about"]["source"] == facts["checkpoint"] == str(tmp_path / "hf")
    text = (folder / "folder_test.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert len(lines) == facts["data"]["utterances"] == 4
    wer = jiwer.wer([x["reference"] for x in lines], [x["hypothesis"] for x in lines])
    assert facts["score"]["wer"] == pytest.approx(wer)
    assert f"test: WER {wer:.2%}" in done.stdout


def test_results_of_what_is_no_folder_need_one(start, tmp_path):
    done = start(f"--checkpoint={tmp_path / 'hf' / 'model.safetensors'}")
    assert done.returncode == 2
    assert "is not a folder to write to: name one for the results, --output=DIR" in done.stderr
    assert "Traceback" not in done.stderr


def test_beam_search_with_a_language_model(tmp_path):
    """Runs of one process: a search, and what is refused."""
    data = write_tones(tmp_path / "data")
    (tmp_path / "hf").mkdir()
    write(tmp_path / "hf")
    (tmp_path / "lm.arpa").write_text("\\data\\\nngram 1=1\n\\1-grams:\n-1 <unk>\n\\end\\\n")
    common = [f"--data_dir={data}", f"--checkpoint={tmp_path / 'hf'}"]
    common += [f"--cache_dir={tmp_path / 'cache'}", "--quiet"]
    language_model = f"--lm={tmp_path / 'lm.arpa'}"
    runs = [
        ["--beam=3", language_model, "--lm_weight=0.25"],
        [language_model],
        ["--beam=3", "--lm=nowhere.arpa"],
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.run_programs", "experiments.evaluate"],
        input=json.dumps([{"arguments": common + run, "stop_at": None} for run in runs]),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    fused, no_beam, no_file = json.loads(done.stdout)
    assert fused["status"] == 0, fused["stderr"]
    results = tmp_path / "hf" / "evaluations" / "folder_test_beam3_lm0.25"
    facts = json.loads(results.with_name(results.name + ".json").read_text())
    assert facts["search"] == {
        "beam": 3,
        "lm": str(tmp_path / "lm.arpa"),
        "lm_weight": 0.25,
        "word_bonus": 0.0,
        "hot_words": [],
        "hot_bonus": 4.0,
    }
    text = results.with_name(results.name + ".jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    wer = jiwer.wer([x["reference"] for x in lines], [x["hypothesis"] for x in lines])
    assert facts["score"]["wer"] == pytest.approx(wer)
    assert no_beam["status"] == no_file["status"] == 2
    assert "are for a beam search: add --beam=16" in no_beam["stderr"]
    assert "nowhere.arpa: unreadable language model" in no_file["stderr"]
