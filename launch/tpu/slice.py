"""A TPU VM pod slice, driven through gcloud."""

import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgespeech.errors import InputError
from launch import job

FOLDER = "edgespeech"  # of the sources, on every host
LOG, STATUS = f"{FOLDER}.log", f"{FOLDER}.status"
LOCK, GROUP = f"{FOLDER}.lock", f"{FOLDER}.pid"  # held, and led, by the job
# Software of the hosts, by the start of the accelerator's type.
IMAGES = {
    "v5litepod-": "v2-alpha-tpuv5-lite",
    "v5p-": "v2-alpha-tpuv5",
    "v6e-": "v2-alpha-tpuv6e",
    "v4-": "tpu-ubuntu2204-base",
    "v3-": "tpu-ubuntu2204-base",
    "v2-": "tpu-ubuntu2204-base",
}
# The hosts' own Python is older than 3.11.
_INSTALL = f"""\
set -e
mkdir -p {FOLDER} && tar xzf {FOLDER}.tar.gz -C {FOLDER}
python3 -m pip install --quiet --user uv
[ -d venv ] || ~/.local/bin/uv venv --quiet --python 3.12 venv
~/.local/bin/uv pip install --quiet --python venv/bin/python -e '{FOLDER}[tpu]'"""


@dataclass(frozen=True)
class Slice:
    """A slice by its name.

    Attributes:
        name: of the slice.
        zone: where it is, such as `us-central2-b`.
        project: empty for gcloud's own setting.
        dry_run: print the commands instead of running them.
    """

    name: str
    zone: str
    project: str = ""
    dry_run: bool = False

    def __post_init__(self):
        if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", self.name):
            raise InputError(
                f"--name={self.name}: use lower-case letters, digits and '-', a letter first"
            )

    def _gcloud(
        self, verb: str, *arguments: str, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        where = [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else [])]
        command = ["gcloud", "compute", "tpus", "tpu-vm", verb, *arguments, *where, "--quiet"]
        if self.dry_run:
            print(shlex.join(command))
            return subprocess.CompletedProcess(command, 0, "", "")
        return job.call(command, check=check)

    def _on_all(self, command: str) -> None:
        self._gcloud("ssh", self.name, "--worker=all", f"--command={command}")

    def _on_first(self, command: str) -> subprocess.CompletedProcess[str]:
        return self._gcloud("ssh", self.name, "--worker=0", f"--command={command}", check=False)

    def create(self, accelerator: str, image: str = "", spot: bool = False) -> None:
        """Asks for the slice and waits until it is there.

        Args:
            accelerator: type and size, such as `v5litepod-64`.
            image: software of its hosts; empty for the one that suits the type.
            spot: cheaper, and may be taken away.

        Raises:
            InputError: an unknown type without an image, or what gcloud said.
        """
        if not image:
            start = next((s for s in IMAGES if accelerator.startswith(s)), None)
            if start is None:
                raise InputError(
                    f"--accelerator={accelerator}: a type that begins with {', '.join(IMAGES)}, or give --image"
                )
            image = IMAGES[start]
        self._gcloud(
            "create",
            self.name,
            f"--accelerator-type={accelerator}",
            f"--version={image}",
            *(["--spot"] if spot else []),
        )

    def start(self, command: Sequence[str], setup: str = "") -> None:
        """Copies the sources to every host, installs them, and starts the command there, detached.

        Args:
            command: runs in the sources' folder; `python` is that of the environment.
            setup: shell line that comes first on every host, such as one that mounts a bucket.

        Raises:
            InputError: the sources are not a git repository; a job runs already; or what gcloud said.
        """
        with tempfile.TemporaryDirectory() as folder:
            archive = Path(folder) / f"{FOLDER}.tar.gz"
            if not self.dry_run:
                pack_sources(archive)
            self._gcloud("scp", str(archive), f"{self.name}:{archive.name}", "--worker=all")
        self._on_all(f"{setup}\n{_INSTALL}" if setup else _INSTALL)
        # All that the job starts inherits the lock, so that a second job cannot start beside it.
        inner = (
            f"exec 9> {LOCK}; flock --nonblock 9 || exit 1; echo $$ > {GROUP}; rm -f {STATUS}; "
            f'export PATH="$HOME/venv/bin:$PATH"; cd {FOLDER}; '
            f"{shlex.join(command)}; echo $? > ../{STATUS}"
        )
        self._on_all(
            f"flock --nonblock {LOCK} true || {{ echo 'a job is running already' >&2; exit 1; }}; "
            f"setsid nohup bash -c {shlex.quote(inner)} > {LOG} 2>&1 < /dev/null &"
        )

    def state(self) -> str:
        """READY, CREATING, PREEMPTED, ... as gcloud names them; empty when there is no such slice."""
        done = self._gcloud("describe", self.name, "--format=value(state)", check=False)
        if done.returncode and "NOT_FOUND" not in done.stderr:
            return "UNKNOWN"  # no network, say: it is asked again
        return done.stdout.strip()

    def exit_status(self) -> int | None:
        """Exit status of the job on the first host, None while it runs."""
        text = self._on_first(f"cat {STATUS}").stdout.strip()
        return int(text) if text.isdigit() else None

    def log_tail(self, lines: int = 20) -> str:
        """End of the log of the first host."""
        return self._on_first(f"tail -n {lines} {LOG}").stdout

    def stop(self) -> None:
        """Tells the job on every host to save and end."""
        self._on_all(f"kill -TERM -- -$(cat {GROUP}) || true")

    def fetch(self, folder: str) -> None:
        """Copies a folder of the sources' folder from the first host to the same place here."""
        parent = Path(folder).parent
        parent.mkdir(parents=True, exist_ok=True)
        remote = f"{self.name}:{FOLDER}/{folder}"
        self._gcloud("scp", "--recurse", remote, str(parent), "--worker=0")

    def delete(self) -> None:
        """Gives the slice back."""
        self._gcloud("delete", self.name)


def pack_sources(archive: Path) -> None:
    """Writes what git tracks, and new files that it does not ignore, below the current folder.

    Raises:
        InputError: no git repository.
    """
    listed = job.call(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    ).stdout.split("\0")
    with tarfile.open(archive, "w:gz") as tar:
        for name in sorted(set(filter(None, listed))):
            if Path(name).exists():
                tar.add(name)
    print(f"sources: {archive.stat().st_size / 2**20:.1f} MiB", file=sys.stderr)
