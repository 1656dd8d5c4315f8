"""The snippets of docs/reuse.md run from top to bottom and assert the numbers that the page states."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "reuse.md"


def snippets(page):
    """Python blocks, each after so many empty lines that a traceback names the line of the page."""
    text = page.read_text()
    for found in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield "\n" * text.count("\n", 0, found.start(1)) + found[1]


def test_snippets_run():
    session = {"__name__": "reuse"}
    found = list(snippets(PAGE))
    assert len(found) == 7
    for snippet in found:
        assert "assert" in snippet
        exec(compile(snippet, PAGE, "exec"), session)
