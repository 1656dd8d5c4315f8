"""What every report says of its run."""

import datetime
from typing import Any

from edgespeech.evaluation.machine import device, versions
from experiments import program, run


def run_facts(workdir: run.Workdir, seed: int) -> dict[str, Any]:
    """Command, date, seconds of every stage, versions, device, seed."""
    seconds = workdir.read_json("stages.json")
    return {
        "command": program.command_line(),
        "date": datetime.date.today().isoformat(),
        "stages": [{"name": name, "seconds": value} for name, value in seconds.items()],
        "versions": versions(),
        "device": device(),
        "seeds": {"seed": seed},
    }
