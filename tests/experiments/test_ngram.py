"""The program that makes a language model, in a process of its own: its flags are those of another program."""

import gzip
import math
import re
import subprocess
import sys

import pytest

from edgespeech.data.folder import FolderCorpus
from edgespeech.inference.kneser_ney import estimate_ngrams
from edgespeech.inference.language_model import perplexity, read_arpa
from tests.support.programs import write_tones
from tests.support.tiny import ROOT


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tones(tmp_path_factory.mktemp("ngram") / "data")


def start(*arguments):
    command = [sys.executable, "-m", "experiments.ngram", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_transcripts_and_text(data, tmp_path):
    lines = ["the cat sat", "on  the mat", ""]
    (tmp_path / "more.txt").write_text("\n".join(lines))
    with gzip.open(tmp_path / "rest.gz", "wt") as file:
        file.write("A third line\n")
    output = tmp_path / "lm.arpa.gz"
    done = start(
        f"--data_dir={data}",
        "--split=train",
        "--heldout=dev",
        "--order=2",
        f"--text={tmp_path / 'more.txt'},{tmp_path / 'rest.gz'}",
        f"--output={output}",
    )
    assert done.returncode == 0, done.stderr
    train = [u.text for u in FolderCorpus(data, "train").utterances]
    expected = estimate_ngrams([*train, "THE CAT SAT", "ON THE MAT", "A THIRD LINE"], 2)
    model = read_arpa(output)
    assert model.entries.keys() == expected.entries.keys()
    assert model.log_prob("CAT", ("THE",)) == pytest.approx(expected.log_prob("CAT", ("THE",)))
    fit = perplexity(expected, [u.text for u in FolderCorpus(data, "dev").utterances])
    printed = re.search(r"dev: perplexity ([\d.]+) a word", done.stdout)
    assert math.isclose(float(printed[1]), fit.perplexity, abs_tol=0.06)
    assert f"of {fit.words} words" in done.stdout


def test_text_alone(tmp_path):
    (tmp_path / "a.txt").write_text("one two\ntwo one\n")
    done = start(f"--text={tmp_path / 'a.txt'}", f"--output={tmp_path / 'x.arpa'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("x.arpa: 5 1-grams, 6 2-grams, 4 3-grams\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text=missing.txt"], "missing.txt"),
        (["--text=BINARY"], "give UTF-8 text"),
        (["--text=BINARY", "--heldout=dev"], "--heldout=dev is a split of --data: give that too"),
        ([], "needs a folder and none was given"),
        (["--order=0", "--text=BINARY"], "order"),
    ],
)
def test_bad_input(arguments, message, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    given = [a.replace("BINARY", str(tmp_path / "binary")) for a in arguments]
    done = start(*given, f"--output={tmp_path / 'x.arpa'}")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x.arpa").exists()
