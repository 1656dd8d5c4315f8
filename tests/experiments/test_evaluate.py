"""Scoring a checkpoint of Hugging Face, in a process of its own: the flags are those of another program."""

import json
import subprocess
import sys

import jax.numpy as jnp
import jiwer
import numpy as np
import pytest

from edgespeech.data.folder import FolderCorpus
from edgespeech.data.tokenizer import CharTokenizer, ctc_collapse
from edgespeech.inference.exit_budget import exit_compute
from edgespeech.inference.exit_policy import ExitPolicy, save_policy
from edgespeech.interop.pretrained import save_pretrained
from edgespeech.models.wav2vec2_exits import Wav2Vec2Exits
from tests.golden.hf_checkpoint import write
from tests.support.apart import run_apart
from tests.support.programs import write_tones
from tests.support.tiny import ROOT, tiny_model
from tests.support.tiny_exits import exit_model


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
    outcomes = run_apart("experiments.evaluate", [common + run for run in runs])
    fused, no_beam, no_file = outcomes
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


def test_exits_and_budgets(tmp_path):
    """Runs of one process: a share of the compute, the saved rule, a wav2vec2's layers, and what is refused."""
    data = write_tones(tmp_path / "data")
    model = exit_model(scale=0.5, vocab_size=CharTokenizer().vocab_size)
    save_pretrained(tmp_path / "exits", model, CharTokenizer(), {})
    save_policy(tmp_path / "exits", ExitPolicy("entropy", np.inf))
    encoder = tiny_model(num_layers=3)
    save_pretrained(tmp_path / "encoder", encoder, CharTokenizer(), {})
    # Between the second and the last exit, and between the first and the last.
    budget, shallow = (
        sum(costs[-2:]) / 2 / costs[-1]
        for costs in (
            exit_compute(exits, 10.0) for exits in (model, Wav2Vec2Exits(encoder, (1, 3)))
        )
    )
    common = [f"--data_dir={data}", f"--cache_dir={tmp_path / 'cache'}", "--quiet"]
    runs = [
        [f"--checkpoint={tmp_path / 'exits'}", f"--budget={budget}"],
        [f"--checkpoint={tmp_path / 'exits'}", "--early_exit"],
        [f"--checkpoint={tmp_path / 'encoder'}", "--exits=1,3", f"--budget={shallow}"],
        [f"--checkpoint={tmp_path / 'encoder'}", "--budget=0.5"],
        [f"--checkpoint={tmp_path / 'encoder'}", "--exits=1", "--early_exit"],
        [f"--checkpoint={tmp_path / 'exits'}", "--budget=0.01"],
    ]
    outcomes = run_apart("experiments.evaluate", [common + run for run in runs])
    assert [outcome["status"] for outcome in outcomes] == [0, 0, 0, 2, 2, 2]
    for outcome, message in zip(
        outcomes[3:],
        ("without exits: give a Splitformer, or --exits", "exit_policy.json is missing", "costs"),
        strict=True,
    ):
        assert message in outcome["stderr"]
    corpus = FolderCorpus(data, "test", cache_dir=tmp_path / "cache")
    cases = (
        ("exits", "_exit2", model, 1),
        ("exits", "_entropy_exit3", model, 0),
        ("encoder", "_exit1", Wav2Vec2Exits(encoder, (1, 3)), 0),
    )
    for folder, name, exits, taken in cases:
        path = tmp_path / folder / "evaluations" / f"folder_test{name}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for row, line in enumerate(lines):
            audio = corpus.audio(row)
            output = exits(jnp.asarray(audio[None]), jnp.asarray([len(audio)]))
            tokens = ctc_collapse(np.asarray(jnp.argmax(output.exit_logits[taken][0], -1)))
            assert line["hypothesis"] == CharTokenizer().decode(tokens)
