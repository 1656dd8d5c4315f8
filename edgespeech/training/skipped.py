"""Which utterances were in the steps that were skipped because a number was not finite."""

import json
import sys
from pathlib import Path

from edgespeech.data.batching import BatchSource
from edgespeech.data.corpus import write_atomically


class SkippedSteps:
    """Keeps `workdir/skipped/STAGE.jsonl`: a row `{"step", "utterances"}` for every skipped step.

    Args:
        workdir: folder of the run.
        stage: name of the stage.
        source: batches by step, with the rows of all processes.
        first: step that this run begins with; what an earlier one wrote of it and later ones is dropped.
        quiet: nothing on the terminal.
    """

    def __init__(self, workdir: Path, stage: str, source: BatchSource, first: int, quiet: bool):
        self.path = workdir / "skipped" / f"{stage}.jsonl"
        self._stage, self._source, self._quiet = stage, source, quiet
        self._rows = [row for row in self._read() if row["step"] < first]

    def _read(self) -> list[dict]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [json.loads(line) for line in lines]

    def add(self, step: int) -> None:
        """Writes down a skipped step and says so."""
        # Read a second time: it is rare, and this process has seen its own rows alone.
        index = self._source.batch(step).index
        ids = [self._source.corpus.utterances[int(row)].id for row in index if row >= 0]
        self._rows.append({"step": step, "utterances": ids})
        text = "".join(json.dumps(row) + "\n" for row in self._rows)
        write_atomically(self.path, lambda file: file.write(text.encode()))
        if not self._quiet:
            print(
                f"step {step} of {self._stage} was not finite and changed nothing; its utterances: "
                f"{' '.join(ids)}",
                file=sys.stderr,
                flush=True,
            )
