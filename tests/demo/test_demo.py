"""The demo against `transcribe`, the mixers' own gates and `EarlyExit`; and what a client can do wrong."""

import base64
import dataclasses
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from edgespeech.cli import main
from edgespeech.conversion.layers import mixer_layers
from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.demo import server as demo
from edgespeech.demo.listen import UNTUNED, Listener, exit_policy
from edgespeech.demo.server import DemoServer
from edgespeech.errors import InputError
from edgespeech.inference.early_exit import EarlyExit
from edgespeech.inference.exit_budget import exit_compute
from edgespeech.inference.exit_policy import ExitPolicy, save_policy
from edgespeech.inference.exit_predictor import FEATURES, ExitPredictor
from edgespeech.interop.pretrained import save_pretrained
from edgespeech.ops.features import log_mel
from tests.demo.serving import CLIP, NEVER, hybrid, hybrid_with_exits, serving, wav
from tests.support.signals import hearing_ctrl_c
from tests.support.tiny import ROOT
from tests.support.waiting import PATIENCE

RNG = np.random.default_rng(0)
PREDICTOR = ExitPredictor(0.1 * RNG.normal(size=(2, len(FEATURES))), RNG.normal(size=2))


def ask(server, method, path, body=None, headers=None):
    """Status and JSON of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=900)
    connection.request(method, path, body, headers or {})
    answer = connection.getresponse()
    facts = json.loads(answer.read())
    connection.close()
    return answer.status, facts


@pytest.fixture(scope="module")
def model():
    return hybrid()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "hybrid"
    save_pretrained(folder, model, CharTokenizer(), {})
    return folder


@pytest.fixture(scope="module")
def listener(model):
    return Listener(model, CharTokenizer())


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return wav(tmp_path_factory.mktemp("clip") / "clip.wav", CLIP)


# ----------------------------------------------------------------------------------------- what is heard


def test_upload_is_what_transcribe_writes(saved, listener, clip, capsys):
    assert main(["transcribe", str(clip), f"--model={saved}", "--format=json"]) == 0
    wanted = json.loads(capsys.readouterr().out)
    with serving(listener) as server:
        status, found = ask(server, "POST", "/transcribe", clip.read_bytes())
    assert status == 200
    assert len(wanted["words"]) >= 2
    for key in ("text", "seconds", "words"):
        assert found[key] == wanted[key]
    assert "exits" not in found


def recorded_inputs(model):
    """What each LPA gets when the model hears the clip alone, without padding, by the path of its layer."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state, audio, lengths):
        inputs, fresh = {}, nnx.merge(graphdef, state)
        for path, layer in mixer_layers(fresh).items():

            def call(x, lengths, path=path, mixer=layer.mixer):
                inputs[path] = (x, lengths)
                return mixer(x, lengths)

            object.__setattr__(layer, "mixer", call)
        fresh(audio, lengths)
        return inputs

    return run(state, CLIP[None], np.array([len(CLIP)]))


gates_of = nnx.jit(lambda mixer, x, lengths: mixer.gates(x, lengths))


@pytest.mark.parametrize(("make", "policy"), [(hybrid, None), (hybrid_with_exits, NEVER)])
def test_gates_are_the_mixers_own(make, policy, clip):
    """Bit for bit, of the clip without padding."""
    model = make()
    found = Listener(model, CharTokenizer(), policy)(clip.read_bytes())["layers"]
    inputs = recorded_inputs(model)
    layers = [row for row in mixer_layers(model).items() if hasattr(row[1].mixer, "gates")]
    assert len(found) == len(layers) >= 2
    for layer, (path, module) in zip(found, layers, strict=True):
        x, lengths = inputs[path]
        n = int(lengths[0])
        assert layer["name"].endswith(": " + ".".join(map(str, path)))
        assert (layer["frames"], layer["heads"]) == (n, 2)
        # A front end may leave out what does not fill a frame at either end.
        assert 0 <= len(CLIP) / 16_000 - n * layer["frame_seconds"] < 3 * 0.04 + 1e-6
        gates = gates_of(module.mixer, x, lengths)
        assert [kind["kind"] for kind in layer["kinds"]] == list(gates)
        for kind, gate in zip(layer["kinds"], gates.values(), strict=True):
            want = np.asarray(gate[0, :, :, :n])
            bits = np.unpackbits(np.frombuffer(base64.b64decode(kind["bits"]), np.uint8))
            assert kind["pulses"] == want.shape[1]
            np.testing.assert_array_equal(bits[: want.size].reshape(want.shape), want)


def test_spectrogram(listener, clip):
    found = listener(clip.read_bytes())["spectrogram"]
    mel = np.asarray(log_mel(jnp.asarray(CLIP)[None])[0])
    low, high = np.percentile(mel, [2, 99.8])
    shades = np.frombuffer(base64.b64decode(found["shades"]), np.uint8)
    assert (found["frames"], found["bins"], found["frame_seconds"]) == (*mel.shape, 0.01)
    want = 255 * np.clip((mel - low) / (high - low), 0, 1)
    np.testing.assert_allclose(shades.reshape(mel.shape), want, atol=1.01)


@pytest.mark.parametrize(
    "never",
    [NEVER, ExitPolicy("calibrated", np.inf, predictor=PREDICTOR)],
    ids=["entropy", "calibrated"],
)
def test_exits_are_those_of_early_exit(never, clip):
    """Text and score of every exit; the last is taken where no score reaches, the first by its own."""
    model, tokenizer = hybrid_with_exits(), CharTokenizer()
    listener = Listener(model, tokenizer, never)
    found = listener(clip.read_bytes())
    json.dumps(found, allow_nan=False)
    exits, rows = found["exits"], found["exits"]["rows"]
    assert (exits["rule"], exits["taken"], len(rows)) == (never.rule, 3, 3)
    assert (found["text"], found["words"]) == (rows[2]["text"], rows[2]["words"])
    early = EarlyExit(model, never)
    for number, row in enumerate(rows, 1):
        wanted = early(jnp.asarray(CLIP)[None], jnp.array([len(CLIP)]), number)
        assert wanted.exits[0] == number
        assert row["text"] == tokenizer.decode(wanted.tokens[0].tolist())
        assert row["score"] == pytest.approx(float(wanted.scores[0]), abs=1e-5)
    macs = exit_compute(model, 2.0)
    assert [row["share"] for row in rows] == pytest.approx([cost / macs[-1] for cost in macs])
    listener.policy = dataclasses.replace(never, threshold=rows[0]["score"])
    found = listener(clip.read_bytes())
    assert found["exits"]["taken"] == 1
    assert (found["text"], found["words"]) == (rows[0]["text"], rows[0]["words"])


def test_policies(tmp_path, model):
    exits = hybrid_with_exits()
    assert exit_policy(model, tmp_path) is None
    assert exit_policy(exits, tmp_path) is UNTUNED
    policy = ExitPolicy("entropy", 0.25)
    save_policy(tmp_path, policy)
    assert exit_policy(exits, tmp_path) == policy
    short = ExitPredictor(np.ones((1, len(FEATURES))), np.zeros(1))
    save_policy(tmp_path, ExitPolicy("calibrated", 0.5, predictor=short))
    with pytest.raises(InputError, match="predictor for 2 exits and a model of 3"):
        exit_policy(exits, tmp_path)


def test_clips_that_cannot_be_used(listener, tmp_path):
    for seconds, message in (
        (0.02, "has 20 ms: record at least 25 ms"),
        (30.1, "longer than 30 s"),
    ):
        path = wav(tmp_path / "clip.wav", np.zeros(round(seconds * 16_000)))
        with pytest.raises(InputError, match=message):
            listener(path.read_bytes())
    assert listener(wav(path, np.zeros(500)).read_bytes())["words"] == []


# -------------------------------------------------------------------------------------------- the server


def size_of(clip):
    return {"bytes": len(clip)}


def test_page_and_model():
    with serving(size_of, {"name": "m"}) as server:
        assert ask(server, "GET", "/model")[1] == {"name": "m", "most_bytes": demo.MOST_BYTES}
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
        for path, kind in (
            ("/", "text/html"),
            ("/page.css", "text/css"),
            ("/page.js", "text/java"),
        ):
            connection.request("GET", path + "?x=1")
            answer = connection.getresponse()
            text = answer.read().decode()
            assert answer.status == 200
            assert answer.headers["Content-Type"].startswith(kind)
            assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
            assert "http" not in text.replace("https and", "").replace("behind https", "")
        connection.close()


def test_the_server_goes_on(listener, clip, monkeypatch):
    """After every fault it answers the next request."""
    monkeypatch.setattr(demo, "MOST_BYTES", 200_000)
    faults = [
        ("POST", "/transcribe", b"RIFF nothing", 400, "the clip: unreadable audio"),
        ("POST", "/transcribe", b"", 400, "the clip: unreadable audio"),
        ("POST", "/transcribe", bytes(200_001), 413, "200001 bytes, the limit is"),
        ("POST", "/elsewhere", b"x", 404, "clips go to /transcribe"),
        ("GET", "/../server.py", None, 404, "there is no /../server.py here"),
        ("GET", "/transcribe", None, 404, "there is no /transcribe"),
    ]
    with serving(listener) as server:
        for method, path, body, wanted, message in faults:
            status, facts = ask(server, method, path, body)
            assert status == wanted
            assert message in facts["error"]
        assert ask(server, "POST", "/transcribe", clip.read_bytes())[0] == 200


@pytest.mark.parametrize(
    ("request_text", "status", "message"),
    [
        ("POST /transcribe HTTP/1.1\r\nHost: x\r\n\r\n", 411, "does not say how long"),
        ("POST /transcribe HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 411, "does not say how long"),
        ("POST /transcribe HTTP/1.1\r\nContent-Length: 9\r\n\r\nabc", 400, "ends after 3 of 9"),
    ],
)
def test_requests_that_are_none(request_text, status, message):
    with serving(size_of) as server, socket.create_connection(server.server_address) as client:
        client.sendall(request_text.encode())
        client.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: client.recv(4096), b"")).decode()
        assert answer.startswith(f"HTTP/1.1 {status} ")
        assert message in answer
        assert ask(server, "POST", "/transcribe", b"12345")[1]["bytes"] == 5


def test_a_fault_of_ours_is_shown_and_survived(capsys):
    def fails(clip):
        raise ZeroDivisionError("division")

    with serving(fails) as server:
        status, facts = ask(server, "POST", "/transcribe", b"x")
        assert (status, facts) == (500, {"error": "ZeroDivisionError: division"})
        server.listen = size_of
        assert ask(server, "POST", "/transcribe", b"x")[0] == 200
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_one_clip_at_a_time():
    """The page and further clips wait their turn; nobody enters the model twice."""
    inside, go_on, most = [], threading.Event(), []

    def slow(clip):
        inside.append(clip)
        most.append(len(inside))
        go_on.wait(PATIENCE)
        inside.remove(clip)
        return {}

    with serving(slow) as server:
        clips = [
            threading.Thread(target=ask, args=(server, "POST", "/transcribe", bytes([i])))
            for i in range(3)
        ]
        for thread in clips:
            thread.start()
        assert ask(server, "GET", "/model")[0] == 200
        go_on.set()
        for thread in clips:
            thread.join()
    assert most == [1, 1, 1]


def test_a_port_in_use_is_said_before_a_model_is_loaded(capsys):
    with DemoServer("127.0.0.1", 0) as server:
        arguments = ["demo", "--model=nowhere/at/all/x", f"--port={server.server_port}"]
        assert main(arguments) == 2
    assert f"cannot listen on 127.0.0.1 port {server.server_port}" in capsys.readouterr().err
    assert main(["demo", "--model=nowhere/at/all/x", "--port=99999"]) == 2
    assert "choose another --port" in capsys.readouterr().err


def test_ctrl_c_ends_it(saved, clip):
    command = [sys.executable, "-m", "edgespeech", "demo", f"--model={saved}", "--port=0"]
    process = subprocess.Popen(
        hearing_ctrl_c(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        url = process.stdout.readline().split()[0]
        connection = http.client.HTTPConnection(url.split("/")[2], timeout=PATIENCE)
        connection.request("POST", "/transcribe", b"no audio")
        assert connection.getresponse().status == 400
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "stopped" in out
    assert "Traceback" not in err
