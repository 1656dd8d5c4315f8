"""Runs a program several times in one process, so that its compilations are shared.

    python -m tests.support.run_programs MODULE     reads a JSON list of runs, writes a JSON list of outcomes

A run is {"arguments": [...], "stop_at": step or null}: the batch of that step is a Ctrl-C. An outcome is
{"status": exit status, "stdout": text, "stderr": text}. It is a process of its own: two programs may define one flag.
"""

import contextlib
import importlib
import io
import json
import sys

from absl import flags
from absl.testing import flagsaver

from edgespeech.data.batching import BatchSource
from experiments import program


def run(module, arguments: list[str], stop_at: int | None) -> dict:
    """One run of the program."""
    whole = BatchSource.batch

    def batch(source, step):
        if step == stop_at:
            raise KeyboardInterrupt
        return whole(source, step)

    sys.argv = [module.__name__, *arguments]
    out, err, status = io.StringIO(), io.StringIO(), 0
    BatchSource.batch = batch
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            flagsaver.flagsaver(),
        ):
            flags.FLAGS.unparse_flags()
            program.main(module.experiment)
    except SystemExit as stop:
        status = stop.code or 0
    finally:
        BatchSource.batch = whole
    return {"status": status, "stdout": out.getvalue(), "stderr": err.getvalue()}


def main() -> None:
    module = importlib.import_module(sys.argv[1])
    flags.FLAGS.mark_as_parsed()
    outcomes = [run(module, r["arguments"], r["stop_at"]) for r in json.load(sys.stdin)]
    json.dump(outcomes, sys.stdout)


if __name__ == "__main__":
    main()
