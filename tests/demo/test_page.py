"""The demo's page in a headless browser: upload, recording, picture, exits, errors; skipped where there is none."""

import base64
import contextlib
import re
import shutil

import numpy as np
import pytest

from edgespeech.data.tokenizer import CharTokenizer
from edgespeech.demo.listen import Listener
from tests.demo.serving import CLIP, NEVER, hybrid, hybrid_with_exits, serving, wav

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
PATIENCE = 300_000  # ms, for a machine that does other things, too
# CSS pixels, as in picture.js.
SPECTROGRAM, TITLE, ROW = 200, 22, 11
COLOURS = {
    "aperiodic": (0x00, 0x72, 0xB2),
    "runs": (0xD5, 0x5E, 0x00),
    "periodic": (0x00, 0x9E, 0x73),
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Playwright's Chromium or the system's, whose microphone hears the clip."""
    heard = wav(tmp_path_factory.mktemp("heard") / "microphone.wav", np.tile(CLIP, 3))
    arguments = [
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={heard}",
        "--no-sandbox",
    ]
    with contextlib.ExitStack() as stack:
        chromium = stack.enter_context(sync_api.sync_playwright()).chromium
        for path in (None, shutil.which("chromium"), shutil.which("google-chrome")):
            with contextlib.suppress(sync_api.Error):
                launched = chromium.launch(executable_path=path, args=arguments, timeout=PATIENCE)
                stack.callback(launched.close)
                yield launched
                return
        pytest.skip("no Chromium: python -m playwright install chromium, or the system's package")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return wav(tmp_path_factory.mktemp("clip") / "clip.wav", CLIP)


@pytest.fixture(scope="module")
def listeners():
    tokenizer = CharTokenizer()
    return {
        "hybrid": Listener(hybrid(), tokenizer),
        "exits": Listener(hybrid_with_exits(), tokenizer, NEVER),
    }


@pytest.fixture
def opened(browser, listeners, request):
    """The page of a model, what it has asked for, and what went wrong in it."""
    listen = listeners[request.param]
    with serving(listen, {"name": request.param, **listen.about()}) as server:
        page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="light")
        page.set_default_timeout(PATIENCE)
        asked, wrong = [], []
        page.on("request", lambda one: asked.append(one.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        url = f"http://127.0.0.1:{server.server_port}/"
        page.goto(url)
        expect(page.locator("#model")).to_contain_text("parameters")
        yield page, listen
        assert wrong == []
        assert all(one.startswith((url, "data:", "blob:")) for one in asked)
        page.close()


def upload(page, path):
    page.set_input_files("#file", path)
    expect(page.locator("#status")).to_contain_text("heard in", timeout=PATIENCE)


def pixels(page, xs, y):
    """RGB of points of the canvas in one row, CSS pixels."""
    script = """([xs, y]) => {
      const context = document.querySelector("#picture").getContext("2d");
      return xs.map((x) => [...context.getImageData(x, y, 1, 1).data.slice(0, 3)]);
    }"""
    return [tuple(colour) for colour in page.evaluate(script, [xs, y])]


def assert_pulses_are_drawn(page, layer, seconds, head):
    """The middle of every frame of every pulse has the kind's colour where it is open, and only there."""
    width = page.evaluate("document.querySelector('#picture').clientWidth")
    middles = (np.arange(layer["frames"]) + 0.5) * layer["frame_seconds"]
    xs = [int(x) for x in middles / seconds * width if x < width]
    y, seen = SPECTROGRAM, set()
    for kind in layer["kinds"]:
        y += TITLE
        bits = np.unpackbits(np.frombuffer(base64.b64decode(kind["bits"]), np.uint8))
        gates = bits[: layer["heads"] * kind["pulses"] * layer["frames"]]
        gates = gates.reshape(layer["heads"], kind["pulses"], layer["frames"])[head]
        for gate in gates:
            found = [colour == COLOURS[kind["kind"]] for colour in pixels(page, xs, y + 3)]
            assert found == gate[: len(xs)].astype(bool).tolist()
            seen.update(found)
            y += ROW
    assert seen == {True, False}


@pytest.mark.parametrize("opened", ["hybrid"], indirect=True)
def test_upload_picture_and_layers(opened, clip):
    page, listen = opened
    facts = listen(clip.read_bytes())
    upload(page, clip)
    expect(page.locator("#text")).to_have_text(facts["text"])
    words = page.locator("#words button").all_inner_texts()
    assert [word.split()[0] for word in words] == [word["word"] for word in facts["words"]]
    names = [layer["name"] for layer in facts["layers"]]
    assert page.locator("#layer option").all_inner_texts() == names
    assert len(names) == 2
    pictures = set()
    for index in range(2):
        page.select_option("#layer", str(index))
        for head in range(2):
            page.select_option("#head", str(head))
            assert_pulses_are_drawn(page, facts["layers"][index], facts["seconds"], head)
            pictures.add(page.evaluate("document.querySelector('#picture').toDataURL()"))
    assert len(pictures) == 4
    label = page.locator("#picture").get_attribute("aria-label")
    assert names[1] in label
    assert facts["text"] in label
    # The spectrogram has more than one shade, and nothing is wider than a phone.
    assert len(set(pixels(page, list(range(0, 300, 20)), 150))) > 3
    root = "document.documentElement"
    assert page.evaluate(f"{root}.scrollWidth - {root}.clientWidth") <= 0


@pytest.mark.parametrize("opened", ["exits"], indirect=True)
def test_thresholds_choose_the_exit(opened, clip):
    page, listen = opened
    rows = listen(clip.read_bytes())["exits"]["rows"]
    upload(page, clip)
    expect(page.locator("#taken")).to_contain_text("Exit 3 of 3 is taken: 100.0 %")
    expect(page.locator("#text")).to_have_text(rows[2]["text"] or "(nothing was heard)")
    page.fill("#threshold", "1000")
    share = f"{100 * rows[0]['share']:.1f} %"
    expect(page.locator("#taken")).to_contain_text(f"Exit 1 of 3 is taken: {share}")
    expect(page.locator("#text")).to_have_text(rows[0]["text"] or "(nothing was heard)")
    expect(page.locator("tr[aria-current] th")).to_have_text("1")
    assert rows[0]["text"] != rows[2]["text"]


@pytest.mark.parametrize("opened", ["hybrid"], indirect=True)
def test_recording(opened):
    page, _ = opened
    page.click("#record")
    expect(page.locator("#record")).to_contain_text(re.compile(r"Stop \([1-9]"), timeout=PATIENCE)
    page.click("#record")
    expect(page.locator("#status")).to_contain_text("the recording: ", timeout=PATIENCE)
    assert float(page.locator("#status").inner_text().split()[2]) >= 0.8
    assert page.locator("#record").inner_text() == "Record"
    assert page.locator("#error").inner_text() == ""


@pytest.mark.parametrize("opened", ["hybrid"], indirect=True)
def test_bad_files_have_a_message_and_the_page_goes_on(opened, clip, tmp_path):
    page, _ = opened
    (tmp_path / "bad.wav").write_bytes(b"RIFF nothing")
    page.set_input_files("#file", tmp_path / "bad.wav")
    expect(page.locator("#error")).to_contain_text("unreadable audio", timeout=PATIENCE)
    assert page.locator("#result").is_hidden()
    upload(page, clip)
    expect(page.locator("#error")).to_have_text("")
