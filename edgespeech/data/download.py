"""Download LibriSpeech splits from OpenSLR.

    python -m edgespeech.data.download dev-clean test-other --data_dir=data

puts each split at DATA_DIR/LibriSpeech/SPLIT. Interrupted at any point, the same command goes on
where it stopped; a split that is there is not fetched again. Corpus: Panayotov et al.,
"LibriSpeech: an ASR corpus based on public domain audio books", ICASSP 2015, CC BY 4.0.
"""

import argparse
import hashlib
import http.client
import os
import shutil
import ssl
import sys
import tarfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from tqdm import tqdm

from edgespeech.errors import InputError

BASE_URL = "https://www.openslr.org/resources"
_CORPUS = "LibriSpeech"  # the folder in every archive
_CHUNK = 2**20
_TIMEOUT = 60  # seconds without a byte
_ATTEMPTS = 4  # in a row without progress
# Not every OSError: a full disk or a folder without write permission is not worth a retry.
_CONNECTION_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)
_BYTES: dict[str, Any] = {"unit": "B", "unit_scale": True, "disable": None}  # no bar in log files
_UNPACKED = 1.1  # unpacked / archive, rounded up: FLAC does not compress further


class Split(NamedTuple):
    """One archive: the number of its OpenSLR resource and its published checksum."""

    resource: int
    algorithm: str
    checksum: str


SPLITS = {
    "dev-clean": Split(
        12, "sha256", "76f87d090650617fca0cac8f88b9416e0ebf80350acb97b343a85fa903728ab3"
    ),
    "dev-other": Split(
        12, "sha256", "12661c48e8c3fe1de2c1caa4c3e135193bfb1811584f11f569dd12645aa84365"
    ),
    "test-clean": Split(
        12, "sha256", "39fde525e59672dc6d1551919b1478f724438a95aa55f874b576be21967e6c23"
    ),
    "test-other": Split(
        12, "sha256", "d09c181bba5cf717b3dee7d4d592af11a3ee3a09e08ae025c5506f6ebe961c29"
    ),
    "train-clean-100": Split(
        12, "sha256", "d4ddd1d5a6ab303066f14971d768ee43278a5f2a0aa43dc716b0e64ecbbbf6e2"
    ),
    "train-clean-360": Split(
        12, "sha256", "146a56496217e96c14334a160df97fffedd6e0a04e66b9c5af0d40be3c792ecf"
    ),
    "train-other-500": Split(
        12, "sha256", "ddb22f27f96ec163645d53215559df6aa36515f26e01dd70798188350adcb6d2"
    ),
    # Mini LibriSpeech, for trying things out.
    "dev-clean-2": Split(31, "md5", "6d7ab67ac6a1d2c993d050e16d61080d"),
    "train-clean-5": Split(31, "md5", "5df7d4e78065366204ca6845bb08f490"),
}


def download(
    name: str, data_dir: str | Path, *, base_url: str = BASE_URL, keep_archive: bool = False
) -> Path:
    """Fetch, verify and unpack one split; return `data_dir/LibriSpeech/NAME`.

    The archive arrives at `data_dir/NAME.tar.gz.part` (which a later call resumes) and becomes
    `data_dir/NAME.tar.gz` when whole; an archive already there is used. It is unpacked beside its
    place and moved there in one step, so a split that exists is complete.

    Raises:
        InputError: unknown split, no connection, too little disk space, wrong checksum, or an
            archive that is damaged, unsafe, or without the split.
    """
    _require_known([name])
    data_dir = Path(data_dir).expanduser()
    target = data_dir / _CORPUS / name
    if target.exists():
        return target
    data_dir.mkdir(parents=True, exist_ok=True)
    archive = data_dir / f"{name}.tar.gz"
    split = SPLITS[name]
    if not archive.exists():
        _fetch(f"{base_url.rstrip('/')}/{split.resource}/{archive.name}", archive)
    _verify(archive, split)
    _unpack(archive, target)
    if not keep_archive:
        archive.unlink()
    return target


def _require_known(names: list[str]) -> None:
    if unknown := [name for name in names if name not in SPLITS]:
        raise InputError(f"unknown split {unknown[0]!r}: choose from {', '.join(SPLITS)}")


def _fetch(url: str, archive: Path) -> None:
    """Download to archive.part, going on from what is there, and rename it when it is whole."""
    part = archive.with_name(archive.name + ".part")
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _fetch_once(url, part)
            break
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise InputError(
                    f"{url}: the server answers {error.code} {error.reason}; check --base_url"
                ) from None
            reason = f"{error.code} {error.reason}"
        except _CONNECTION_ERRORS as error:
            reason = str(getattr(error, "reason", error))
        after = part.stat().st_size if part.exists() else 0
        failures = 0 if after > before else failures + 1
        if failures == _ATTEMPTS:
            raise InputError(
                f"cannot download {url}: {reason}; check the network or give a mirror with "
                f"--base_url, then run the same command again: it goes on from {after:,} bytes"
            )
        delay = 2**failures - 1
        tqdm.write(f"{archive.name}: {reason}; trying again in {delay} s", file=sys.stderr)
        time.sleep(delay)
    os.replace(part, archive)


def _fetch_once(url: str, part: Path) -> None:
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            # Nothing is left to send: the part is whole, or (its checksum tells) not this file.
            return
        raise
    with response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            start = 0  # a server without ranges sends the file from its beginning
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        if total is not None:
            _require_space(part.parent, total - start + _UNPACKED * total)
        with (
            part.open("ab" if start else "wb") as file,
            tqdm(total=total, initial=start, desc=part.stem, **_BYTES) as bar,
        ):
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
            received = file.tell()
    if total is not None and received < total:
        raise http.client.HTTPException(f"cut off after {received:,} of {total:,} bytes")


def _require_space(folder: Path, needed: float) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder} has {free / 1e9:.1f} GB free and the split needs {needed / 1e9:.1f} GB "
            "(archive and unpacked files): free some, or give another --data_dir"
        )


def _verify(archive: Path, split: Split) -> None:
    digest = hashlib.new(split.algorithm)
    size = archive.stat().st_size
    with (
        archive.open("rb") as file,
        tqdm(total=size, desc=f"verify {archive.name}", **_BYTES) as bar,
    ):
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    if digest.hexdigest() != split.checksum:
        # Moved aside, so that the next run neither trusts it nor resumes it.
        rejected = archive.with_name(archive.name + ".rejected")
        os.replace(archive, rejected)
        raise InputError(
            f"{archive.name} ({size:,} bytes) has {split.algorithm} {digest.hexdigest()}, "
            f"published is {split.checksum}: it is damaged or not the file of OpenSLR. It is now "
            f"{rejected}; run the same command again to fetch it anew, from another --base_url if "
            "this repeats"
        )


def _unpack(archive: Path, target: Path) -> None:
    if not hasattr(tarfile, "data_filter"):
        raise InputError(
            f"Python {sys.version.split()[0]} cannot unpack safely: use 3.11.4 or newer"
        )
    scratch = target.parent.parent / f".unpack-{target.name}"
    shutil.rmtree(scratch, ignore_errors=True)  # of a killed run
    size = archive.stat().st_size
    try:
        with (
            archive.open("rb") as raw,
            tqdm.wrapattr(
                raw, "read", total=size, desc=f"unpack {archive.name}", disable=None
            ) as file,
            tarfile.open(fileobj=cast(IO[bytes], file), mode="r|gz") as tar,
        ):
            # The filter refuses members that would land outside, links and devices included.
            tar.extractall(scratch, filter="data")
        unpacked = scratch / _CORPUS
        if not (unpacked / target.name).is_dir():
            raise InputError(
                f"{archive} holds no {_CORPUS}/{target.name}: remove it and run the same command "
                "again to fetch it anew"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        # SPEAKERS.TXT and its like come with every archive.
        for path in unpacked.glob("*.TXT"):
            os.replace(path, target.parent / path.name)
        os.replace(unpacked / target.name, target)
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"cannot unpack {archive}: {error}; remove it and fetch it anew") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exit with 2 and the message alone when the input cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m edgespeech.data.download",
        description="Download LibriSpeech splits, verify them and unpack them to "
        "DATA_DIR/LibriSpeech/SPLIT. Interrupted, the same command goes on where it stopped.",
        epilog=f"Splits: {', '.join(SPLITS)}. dev-clean-2 and train-clean-5 are Mini LibriSpeech.",
    )
    parser.add_argument("splits", nargs="+", metavar="SPLIT", help="splits to download, see below")
    parser.add_argument("--data_dir", default="data", help="where to put them (default: data)")
    parser.add_argument(
        "--base_url", default=BASE_URL, help=f"OpenSLR or a mirror of it (default: {BASE_URL})"
    )
    parser.add_argument(
        "--keep_archive", action="store_true", help="keep DATA_DIR/SPLIT.tar.gz after unpacking"
    )
    flags = parser.parse_args(arguments)
    try:
        _require_known(flags.splits)
        for name in flags.splits:
            path = download(
                name, flags.data_dir, base_url=flags.base_url, keep_archive=flags.keep_archive
            )
            print(f"{name}: {path}")
    except (InputError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"Use them with --data_dir={flags.data_dir}")


if __name__ == "__main__":
    main()
