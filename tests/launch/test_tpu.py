"""TPU VM slices against a stand-in gcloud, and what is sent to their hosts against bash."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from edgespeech.errors import InputError
from launch.tpu import __main__ as program
from launch.tpu.slice import Slice, pack_sources
from tests.support.tiny import ROOT
from tests.support.waiting import PATIENCE, wait_for

WHERE = ["--name=pod", "--zone=us-central1-a"]
COMMAND = ["--", "python", "-m", "experiments.x", "--text=it's", "--resume"]


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    """A stand-in that keeps its arguments, one to a line and a blank line at the end, and answers from files."""
    path = tmp_path / "bin" / "gcloud"
    path.parent.mkdir()
    path.write_text(
        f"""#!/bin/bash
printf '%s\\0' "$@" >> {tmp_path}/calls
printf '\\n' >> {tmp_path}/calls
case "$4 $*" in
  describe*) head -n 1 {tmp_path}/states; sed -i '1{{$!d}}' {tmp_path}/states ;;
  ssh*"cat edgespeech.status"*) cat {tmp_path}/status 2>/dev/null ;;
  ssh*tail*) echo 'the end' ;;
  create*quota*) echo 'ERROR: no quota' >&2; exit 1 ;;
esac
"""
    )
    path.chmod(0o755)
    (tmp_path / "states").write_text("READY\n")
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(program, "POLL_SECONDS", 0.01)
    return tmp_path


def calls(folder):
    """Arguments of every call, less the words that all share."""
    found = []
    for line in (folder / "calls").read_text().split("\0\n")[:-1]:
        arguments = line.split("\0")
        assert arguments[:3] == ["compute", "tpus", "tpu-vm"]
        assert arguments[-1] == "--quiet"
        assert "--zone=us-central1-a" in arguments
        found.append([a for a in arguments[3:] if a not in ("--quiet", "--zone=us-central1-a")])
    return found


def test_create_and_delete(gcloud):
    assert program.run(["create", *WHERE, "--accelerator=v5litepod-64", "--spot"]) == 0
    assert program.run(["create", *WHERE, "--accelerator=v6e-8", "--project=lab"]) == 0
    assert program.run(["create", *WHERE, "--accelerator=v7-8", "--image=mine"]) == 0
    assert program.run(["delete", *WHERE]) == 0
    assert calls(gcloud) == [
        *(
            ["create", "pod", f"--accelerator-type={kind}", f"--version={image}", *more]
            for kind, image, more in (
                ("v5litepod-64", "v2-alpha-tpuv5-lite", ["--spot"]),
                ("v6e-8", "v2-alpha-tpuv6e", ["--project=lab"]),
                ("v7-8", "mine", []),
            )
        ),
        ["delete", "pod"],
    ]


def test_run_sends_sources_installs_and_starts(gcloud, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert program.run(["run", *WHERE, "--setup=mount it", *COMMAND]) == 0
    copy, install, start = calls(gcloud)
    assert copy[0] == "scp"
    assert copy[1].endswith("/edgespeech.tar.gz")
    assert copy[2:] == ["pod:edgespeech.tar.gz", "--worker=all"]
    assert install[:3] == ["ssh", "pod", "--worker=all"]
    assert install[3].startswith("--command=mount it\nset -e\n")
    assert "-e 'edgespeech[tpu]'" in install[3]
    assert start[:3] == ["ssh", "pod", "--worker=all"]
    for text in (install[3], start[3]):
        script = text.removeprefix("--command=")
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_dry_run_prints_the_commands_and_runs_none(gcloud, capsys):
    for verb, more in (
        ("create", ["--accelerator=v4-32"]),
        ("run", COMMAND),
        ("watch", []),
        ("delete", []),
    ):
        assert program.run([verb, *WHERE, "--dry_run", *more]) == 0
    assert not (gcloud / "calls").exists()
    lines = capsys.readouterr().out
    starts = [line.split()[4] for line in lines.splitlines() if line.startswith("gcloud compute")]
    assert starts == ["create", "scp", "ssh", "ssh", "describe", "ssh", "ssh", "delete"]
    # Every printed line is a command as a shell takes it.
    assert subprocess.run(["bash", "-n"], input=lines, text=True, check=False).returncode == 0


def remote(tmp_path, command):
    """Runs what is sent to a host, in a folder that stands for its home."""
    home = tmp_path / "home"
    (home / "edgespeech").mkdir(parents=True, exist_ok=True)
    pod = Slice("pod", "z")
    sent = []
    object.__setattr__(pod, "_gcloud", lambda verb, *a, **_: sent.append((verb, *a)))
    os.chdir(ROOT)
    pod.start(command)
    script = sent[-1][-1].removeprefix("--command=")

    def host(text):
        done = subprocess.run(
            ["bash", "-c", text], cwd=home, capture_output=True, text=True, check=False, timeout=PATIENCE,
            env=os.environ | {"HOME": str(home)},
        )  # fmt: skip
        return done

    return home, pod, sent, host, host(script)


def wait_for_text(path):
    return wait_for(lambda: path.exists() and path.read_text(), lambda: f"{path} never came")


def test_the_host_runs_the_command_and_keeps_its_status(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    code = "import os, sys; print(os.getcwd(), sys.argv[1]); sys.exit(6)"
    home, _, _, _, started = remote(tmp_path, [sys.executable, "-c", code, "it's $HOME"])
    assert started.returncode == 0, started.stderr
    assert wait_for_text(home / "edgespeech.status") == "6\n"
    assert (home / "edgespeech.log").read_text() == f"{home}/edgespeech it's $HOME\n"


def test_the_host_refuses_a_second_job_and_stops_the_first(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    code = (
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n    pathlib.Path('saved').write_text('1')\n    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "pathlib.Path('ready').write_text('1')\n"
        "time.sleep(600)"
    )
    home, pod, sent, host, started = remote(tmp_path, [sys.executable, "-c", code])
    assert started.returncode == 0
    wait_for_text(home / "edgespeech" / "ready")
    again = host(sent[-1][-1].removeprefix("--command="))
    assert again.returncode == 1
    assert "a job is running already" in again.stderr
    pod.stop()
    assert host(sent[-1][-1].removeprefix("--command=")).returncode == 0
    wait_for_text(home / "edgespeech" / "saved")


def test_watch_waits_for_the_status(gcloud, capsys):
    (gcloud / "states").write_text("CREATING\nREADY\nREADY\n")
    (gcloud / "status").write_text("5\n")
    assert program.run(["watch", *WHERE, "--fetch=runs/x"]) == 5
    assert capsys.readouterr().out == "the end\n"
    assert [call[0] for call in calls(gcloud)] == ["describe", "describe", "ssh", "ssh", "scp"]
    assert calls(gcloud)[-1][1:] == ["--recurse", "pod:edgespeech/runs/x", "runs", "--worker=0"]


def test_watch_replaces_a_slice_that_was_taken_away(gcloud, monkeypatch):
    monkeypatch.chdir(ROOT)
    (gcloud / "states").write_text("PREEMPTED\nREADY\n")
    (gcloud / "status").write_text("0\n")
    again = ["--accelerator=v4-32", "--spot", *COMMAND]
    assert program.run(["watch", *WHERE, *again]) == 0
    verbs = [call[0] for call in calls(gcloud)]
    assert verbs == [
        *("describe", "delete", "create", "scp", "ssh", "ssh"),
        *("describe", "ssh", "ssh"),
    ]
    assert "--spot" in calls(gcloud)[2]


def test_watch_without_a_command_says_what_is_missing(gcloud):
    (gcloud / "states").write_text("PREEMPTED\n")
    with pytest.raises(InputError, match="slice pod is preempted: `watch` with --accelerator"):
        program.run(["watch", *WHERE])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create", *WHERE], "create: give --accelerator"),
        (["create", *WHERE, "--accelerator=v9-8"], "--accelerator=v9-8: a type that begins with"),
        (["create", *WHERE, "--accelerator=v4-8", "--project=quota"], "no quota"),
        (["run", *WHERE], "no command"),
        (["watch", *WHERE, "--accelerator=v4-8", "--", "x"], "lacks --resume"),
        (["delete", "--name=Pod", "--zone=z"], "--name=Pod"),
    ],
)
def test_bad_input(gcloud, arguments, message):
    with pytest.raises(InputError, match=message):
        program.run(arguments)


def test_sources_are_what_git_would_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "--quiet"], check=True)
    for name in ("kept.py", "new.py", "ignored.log", "gone.py"):
        (tmp_path / name).write_text(name)
    (tmp_path / ".gitignore").write_text("*.log\n*.gz\n")
    subprocess.run(["git", "add", "kept.py", "gone.py"], check=True)
    (tmp_path / "gone.py").unlink()
    pack_sources(Path("out.tar.gz"))
    with tarfile.open("out.tar.gz") as tar:
        assert tar.getnames() == [".gitignore", "kept.py", "new.py"]
    monkeypatch.chdir("/")
    with pytest.raises(InputError, match="not a git repository"):
        pack_sources(tmp_path / "out.tar.gz")
