"""Makes the notebooks from plain Python beside this file: `# %%` begins a cell of code, `# %% [markdown]` one of text.

    python docs/notebooks/make_notebooks.py

Outputs stay empty: they are made where a notebook is run.
"""

import json
import re
from pathlib import Path

FOLDER = Path(__file__).parent
CELL = re.compile(r"^# %%( \[markdown\])?\n", re.MULTILINE)


def cells(text: str) -> list[tuple[str, str]]:
    """Kind and source of every cell; a cell of text loses its comment signs."""
    _, *parts = CELL.split(text)
    found = []
    for marker, source in zip(parts[::2], parts[1::2], strict=True):
        kind = "markdown" if marker else "code"
        source = source.strip("\n")
        found.append((kind, re.sub(r"^# ?", "", source, flags=re.MULTILINE) if marker else source))
    return found


def notebook(text: str) -> str:
    """The file of a notebook, format 4.5."""
    made = []
    for number, (kind, source) in enumerate(cells(text)):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": source}
        made.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {
        "cells": made,
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for source in sorted(FOLDER.glob("*.py")):
        if source.name != Path(__file__).name:
            source.with_suffix(".ipynb").write_text(notebook(source.read_text()))
