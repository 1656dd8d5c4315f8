"""The downloader against a server on this machine: whole, cut, stubborn, wrong and hostile."""

import hashlib
import importlib.util
import io
import os
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from edgespeech.data import download as module
from edgespeech.data.download import Split, download, main
from edgespeech.errors import InputError

NAME = "dev-clean"
FLAC = os.urandom(60_000)  # does not compress, like audio


def make_archive(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for path, content in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


GOOD = make_archive(
    {
        "LibriSpeech/SPEAKERS.TXT": b"84 | F | dev-clean\n",
        f"LibriSpeech/{NAME}/84/121123/84-121123-0000.flac": FLAC,
        f"LibriSpeech/{NAME}/84/121123/84-121123.trans.txt": b"84-121123-0000 GO\n",
    }
)


class Server(ThreadingHTTPServer):
    """Serves one body; `cuts` are the sizes after which the next responses break off."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.cuts, self.status, self.ranges = GOOD, [], 200, True
        self.requests = []  # (path, Range header)
        self.url = f"http://127.0.0.1:{self.server_port}/resources"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, header = self.server, self.headers.get("Range")
        assert isinstance(server, Server)
        server.requests.append((self.path, header))
        if server.status != 200:
            self.send_error(server.status)
            return
        start = int(header.removeprefix("bytes=").rstrip("-")) if header and server.ranges else 0
        if start >= len(server.body):
            self.send_error(416)
            return
        body = server.body[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    # A proxy of the environment must not come between the test and its server.
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        serve(server, GOOD, monkeypatch)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join(timeout=10)


def serve(server, body, monkeypatch):
    """Serve a body and publish its checksum."""
    server.body = body
    published = Split(12, "sha256", hashlib.sha256(body).hexdigest())
    monkeypatch.setitem(module.SPLITS, NAME, published)


def check_split(data_dir):
    folder = data_dir / "LibriSpeech" / NAME / "84" / "121123"
    assert (folder / "84-121123-0000.flac").read_bytes() == FLAC
    assert (folder / "84-121123.trans.txt").read_text() == "84-121123-0000 GO\n"
    assert (data_dir / "LibriSpeech" / "SPEAKERS.TXT").read_text() == "84 | F | dev-clean\n"
    assert sorted(p.name for p in data_dir.iterdir()) == ["LibriSpeech"]  # nothing left over


def test_whole(server, tmp_path):
    data_dir = tmp_path / "a" / "b"
    assert download(NAME, data_dir, base_url=server.url) == data_dir / "LibriSpeech" / NAME
    check_split(data_dir)
    assert server.requests == [("/resources/12/dev-clean.tar.gz", None)]


def test_there_already(server, tmp_path):
    download(NAME, tmp_path, base_url=server.url)
    download(NAME, tmp_path, base_url=server.url)
    assert len(server.requests) == 1


def test_cut_connection_is_resumed(server, tmp_path):
    server.cuts = [10_000, 5_000, 0]
    download(NAME, tmp_path, base_url=server.url)
    check_split(tmp_path)
    ranges = [header for _, header in server.requests]
    assert ranges == [None, "bytes=10000-", "bytes=15000-", "bytes=15000-"]


def test_killed_run_is_resumed(server, tmp_path):
    (tmp_path / f"{NAME}.tar.gz.part").write_bytes(GOOD[:20_000])
    leftover = tmp_path / f".unpack-{NAME}" / "LibriSpeech" / NAME
    leftover.mkdir(parents=True)
    (leftover / "stale").touch()
    download(NAME, tmp_path, base_url=server.url)
    check_split(tmp_path)
    assert [header for _, header in server.requests] == ["bytes=20000-"]
    assert not (tmp_path / "LibriSpeech" / NAME / "stale").exists()


def test_whole_part_is_only_verified(server, tmp_path):
    (tmp_path / f"{NAME}.tar.gz.part").write_bytes(GOOD)
    download(NAME, tmp_path, base_url=server.url)
    check_split(tmp_path)


def test_server_without_ranges_starts_again(server, tmp_path):
    server.ranges = False
    server.cuts = [10_000]
    download(NAME, tmp_path, base_url=server.url)
    check_split(tmp_path)
    assert [header for _, header in server.requests] == [None, "bytes=10000-"]


def test_connection_that_never_progresses(server, tmp_path):
    server.cuts = [100] + [0] * 100
    with pytest.raises(InputError, match=r"cut off after 100 of .*it goes on from 100 bytes"):
        download(NAME, tmp_path, base_url=server.url)
    assert len(server.requests) == 5
    assert (tmp_path / f"{NAME}.tar.gz.part").read_bytes() == GOOD[:100]


def test_archive_given_by_hand(server, tmp_path):
    (tmp_path / f"{NAME}.tar.gz").write_bytes(GOOD)
    download(NAME, tmp_path, base_url=server.url, keep_archive=True)
    assert server.requests == []
    assert (tmp_path / f"{NAME}.tar.gz").read_bytes() == GOOD
    (tmp_path / f"{NAME}.tar.gz").unlink()
    check_split(tmp_path)


def test_wrong_checksum(server, tmp_path):
    server.body = GOOD[:-1] + bytes([GOOD[-1] ^ 1])
    with pytest.raises(InputError, match=r"published is .*run the same command again"):
        download(NAME, tmp_path, base_url=server.url)
    assert [p.name for p in tmp_path.iterdir()] == [f"{NAME}.tar.gz.rejected"]
    # The next run starts anew.
    server.body = GOOD
    (tmp_path / f"{NAME}.tar.gz.rejected").unlink()
    download(NAME, tmp_path, base_url=server.url)
    check_split(tmp_path)
    assert server.requests[-1][1] is None


def test_md5(server, tmp_path, monkeypatch):
    monkeypatch.setitem(module.SPLITS, NAME, Split(31, "md5", hashlib.md5(GOOD).hexdigest()))
    download(NAME, tmp_path, base_url=server.url + "/")
    check_split(tmp_path)
    assert server.requests[0][0] == "/resources/31/dev-clean.tar.gz"


@pytest.mark.parametrize("path", ["../../outside.txt", "LibriSpeech/../../../outside.txt"])
def test_path_traversal(server, tmp_path, monkeypatch, path):
    serve(server, make_archive({f"LibriSpeech/{NAME}/x": b"x", path: b"bad"}), monkeypatch)
    data_dir = tmp_path / "data"
    with pytest.raises(InputError, match=r"cannot unpack .* outside the destination"):
        download(NAME, data_dir, base_url=server.url)
    assert sorted(p.name for p in data_dir.iterdir()) == [f"{NAME}.tar.gz"]
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_archive_of_something_else(server, tmp_path, monkeypatch):
    serve(server, make_archive({"LibriSpeech/test-clean/x": b"x"}), monkeypatch)
    with pytest.raises(InputError, match="holds no LibriSpeech/dev-clean"):
        download(NAME, tmp_path, base_url=server.url)
    assert not (tmp_path / "LibriSpeech").exists()


def test_not_an_archive(server, tmp_path, monkeypatch):
    serve(server, b"<html>hello</html>", monkeypatch)
    with pytest.raises(InputError, match="cannot unpack"):
        download(NAME, tmp_path, base_url=server.url)


def test_missing_file_and_broken_server(server, tmp_path):
    server.status = 404
    with pytest.raises(InputError, match="404 Not Found; check --base_url"):
        download(NAME, tmp_path, base_url=server.url)
    assert len(server.requests) == 1
    server.status = 503
    with pytest.raises(InputError, match="503 Service Unavailable; check the network"):
        download(NAME, tmp_path, base_url=server.url)
    assert len(server.requests) == 1 + 4


def test_no_network(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match="Connection refused; check the network or give a mirror"):
        download(NAME, tmp_path, base_url=server.url)


def test_disk_space(server, tmp_path, monkeypatch):
    (tmp_path / f"{NAME}.tar.gz.part").write_bytes(GOOD[:20_000])
    needed = len(GOOD) - 20_000 + 1.1 * len(GOOD)
    usage = type(module.shutil.disk_usage(tmp_path))
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage(0, 0, int(needed) - 1))
    with pytest.raises(InputError, match=r"GB free and the split needs 0\.0 GB"):
        download(NAME, tmp_path, base_url=server.url)
    assert (tmp_path / f"{NAME}.tar.gz.part").stat().st_size == 20_000
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage(0, 0, int(needed) + 1))
    download(NAME, tmp_path, base_url=server.url)
    check_split(tmp_path)


def test_command_line(server, tmp_path, capsys):
    main([NAME, f"--data_dir={tmp_path}", f"--base_url={server.url}"])
    check_split(tmp_path)
    out = capsys.readouterr().out.splitlines()
    assert out == [
        f"{NAME}: {tmp_path / 'LibriSpeech' / NAME}",
        f"Use them with --data_dir={tmp_path}",
    ]


def test_command_line_errors(server, tmp_path, capsys):
    # Unknown names are refused before anything is fetched.
    with pytest.raises(SystemExit) as stop:
        main([NAME, "dev-celan", f"--data_dir={tmp_path}", f"--base_url={server.url}"])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "unknown split 'dev-celan': choose from dev-clean, dev-other, test-clean" in message
    assert server.requests == []
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        main([NAME, f"--data_dir={tmp_path / 'file'}", f"--base_url={server.url}"])
    assert stop.value.code == 2
    assert "file" in capsys.readouterr().err


def test_published_checksums_match_tensorflow_datasets():
    tfds = importlib.util.find_spec("tensorflow_datasets")
    if tfds is None or tfds.origin is None:
        pytest.skip("tensorflow_datasets is not installed")
    table = os.path.join(os.path.dirname(tfds.origin), "datasets/librispeech/checksums.tsv")
    with open(table) as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    published = {os.path.basename(url).removesuffix(".tar.gz"): sha for url, _, sha, *_ in rows}
    ours = {name: split.checksum for name, split in module.SPLITS.items() if split.resource == 12}
    assert ours.items() <= published.items()
    assert len(ours) == 7
