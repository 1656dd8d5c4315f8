"""The documentation: links and paths lead somewhere, code runs, every number in it is asserted, the site is whole."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from flax import nnx

import edgespeech
from edgespeech.nn import SelfAttention

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("*.md"))]
WITH_CODE = [*sorted((DOCS / "howto").glob("*.md")), ROOT / "README.md"]
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
FOLDERS = ("edgespeech", "experiments", "launch", "tests", "docs", "tools")
NOT_RUN = "<!-- not run -->"


def name(path):
    return str(path.relative_to(ROOT))


def load(path):
    """The module in a file that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def snippets(text):
    """Python blocks, each after so many empty lines that a traceback names the line of the page."""
    for found in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if not text[: found.start()].rstrip().endswith(NOT_RUN):
            yield "\n" * text.count("\n", 0, found.start(1)) + found[1]


class Layer(nnx.Module):
    def __init__(self):
        self.mixer = SelfAttention(4, 2, rngs=nnx.Rngs(0))


class Model(nnx.Module):
    """What the README calls `model`."""

    def __init__(self):
        self.layers = nnx.List([Layer()])


# ------------------------------------------------------------------------------- links and paths


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_to_files(page):
    text = FENCED.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith(("#", "mailto:")):
            assert (page.parent / target.partition("#")[0]).exists(), f"{name(page)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_to_sections_lead_to_headings(page):
    text = FENCED.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]*#[^)\s]+)\)", text):
        file, _, section = target.partition("#")
        other = page.parent / file if file else page
        if "://" not in target and other.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", other.read_text(), re.MULTILINE)
            plain = [re.sub(r"[^\w\s-]", "", title).strip().lower() for title in titles]
            assert section in [re.sub(r"[\s]+", "-", title) for title in plain], target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_and_programs_exist(page):
    text = page.read_text()
    paths = [
        path.rstrip("/")
        for path in re.findall(r"`([\w.-]+(?:/[\w.-]+)+/?)`", FENCED.sub("", text))
        if path.split("/")[0] in FOLDERS
    ]
    paths += re.findall(r"python (docs/[\w/]+\.py)", text)
    for path in paths:
        assert (ROOT / path).exists(), f"{name(page)} names {path}"
    for module in re.findall(r"python -m ((?:edgespeech|experiments|launch)[\w.]*)", text):
        file = ROOT / module.rstrip(".").replace(".", "/")
        exists = file.with_suffix(".py").exists() or (file / "__main__.py").exists()
        assert exists, f"{name(page)} names the program {module}"


# ---------------------------------------------------------------------------------------- code


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_code_runs(page):
    found = list(snippets(page.read_text()))
    session = {"__name__": "page", "model": Model()}
    for snippet in found:
        exec(compile(snippet, page, "exec"), session)
    assert found, "a how-to page shows what it says"
    if page.name != "README.md":
        assert any("assert" in snippet for snippet in found)


NOTEBOOKS = DOCS / "notebooks"
RUN_NOTEBOOKS = """
import json, sys
for path in sys.argv[1:]:
    cells = json.load(open(path))["cells"]
    code = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    exec(compile("\\n".join(code), path, "exec"), {"__name__": path})
    print("ran", path)
"""


def test_notebooks_are_made_from_their_sources():
    maker = load(NOTEBOOKS / "make_notebooks.py")
    sources = sorted(set(NOTEBOOKS.glob("*.py")) - {NOTEBOOKS / "make_notebooks.py"})
    assert [p.with_suffix(".ipynb") for p in sources] == sorted(NOTEBOOKS.glob("*.ipynb"))
    for source in sources:
        text = maker.notebook(source.read_text())
        assert source.with_suffix(".ipynb").read_text() == text, (
            f"run {NOTEBOOKS}/make_notebooks.py"
        )
        cells = json.loads(text)["cells"]
        kinds = [cell["cell_type"] for cell in cells]
        assert kinds[0] == "markdown"
        assert "code" in kinds
        assert "ynthetic" in cells[0]["source"]
        assert all(cell["outputs"] == [] for cell in cells if cell["cell_type"] == "code")


def test_cells_of_a_notebook():
    maker = load(NOTEBOOKS / "make_notebooks.py")
    text = '"""Not shown."""\n\n# %% [markdown]\n# # A title\n#\n# Text.\n\n# %%\na = 1  # one\n\n# two\n'
    assert maker.cells(text) == [
        ("markdown", "# A title\n\nText."),
        ("code", "a = 1  # one\n\n# two"),
    ]


def test_notebooks_run():
    paths = [str(path) for path in sorted(NOTEBOOKS.glob("*.ipynb"))]
    sizes = {"NOTEBOOK_STEPS": "5", "NOTEBOOK_UTTERANCES": "200", "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, "-c", RUN_NOTEBOOKS, *paths],
        cwd=ROOT,
        env=os.environ | sizes | {"PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ran ") == len(paths) == 3


# ---------------------------------------------------------------------------------------- site


def site():
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def pages_of(nav):
    for entry in nav if isinstance(nav, list) else nav.values():
        yield from [entry] if isinstance(entry, str) else pages_of(entry)


def test_navigation_names_every_page_of_the_guides_once_and_no_other():
    named = list(pages_of(site()["nav"]))
    assert len(named) == len(set(named))
    for page in named:
        assert (DOCS / page).exists(), page
    ours = [p for folder in ("mechanisms", "howto", "reference") for p in (DOCS / folder).iterdir()]
    assert {str(p.relative_to(DOCS)) for p in ours if p.suffix == ".md"} <= set(named)


def test_scripts_of_the_site_exist():
    for file in [*site()["extra_javascript"], *site()["hooks"]]:
        assert "://" in file or (DOCS / file).exists() or (ROOT / file).exists(), file


def test_every_package_has_its_reference():
    packages = {path.parent.name for path in (ROOT / "edgespeech").glob("*/__init__.py")}
    packages -= {"commands", "demo"}  # programs: what they do is their documentation
    pages = {path.stem for path in (DOCS / "reference").glob("*.md")} - {"core"}
    assert packages == pages
    for package in packages:
        assert f"::: edgespeech.{package}.*" in (DOCS / "reference" / f"{package}.md").read_text()


def rendered(markdown, src_uri="mechanisms/lpa.md"):
    hooks = load(DOCS / "site_hooks.py")
    page = SimpleNamespace(file=SimpleNamespace(src_uri=src_uri))
    return hooks.on_page_markdown(markdown, page=page, config={"docs_dir": str(DOCS)}, files=None)


@pytest.mark.parametrize(
    ("link", "becomes"),
    [
        ("[a](../../edgespeech/ops/pulse.py)", "[a](../reference/ops.md#edgespeech.ops.pulse)"),
        ("[a](../../edgespeech/linen.py)", "[a](../reference/core.md#edgespeech.linen)"),
        ("[`a`](../../experiments/latency.py)", "`a`"),
        ("[a](../../edgespeech/nn/__init__.py)", "a"),
        ("[a](sepformer.md)", "[a](sepformer.md)"),
        ("[a](https://x.org/a.py)", "[a](https://x.org/a.py)"),
        ("![a](../pictures/slot.png)", "![a](../pictures/slot.png)"),
    ],
)
def test_links_out_of_the_site(link, becomes):
    assert rendered(link) == becomes


def test_reference_lists_every_module():
    text = rendered("# ops\n\n::: edgespeech.ops.*\n", "reference/ops.md")
    names = re.findall(r"^::: edgespeech\.ops\.(\w+)$", text, re.MULTILINE)
    files = (ROOT / "edgespeech/ops").glob("*.py")
    assert names == sorted(file.stem for file in files if file.stem != "__init__")


def test_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "rectangle_gates" in (tmp_path / "reference" / "ops" / "index.html").read_text()


# ------------------------------------------------------------------------------------ pictures


def test_pictures_are_those_of_the_script_each_on_a_page_and_small():
    made = set(
        re.findall(r"^def (\w+)\(\) -> Figure:", (DOCS / "make_pictures.py").read_text(), re.M)
    )
    files = list((DOCS / "pictures").iterdir())
    assert {file.name for file in files} == {f"{picture}.png" for picture in made}
    assert sum(file.stat().st_size for file in files) < 600_000
    shown = "".join(page.read_text() for page in PAGES)
    for picture in made:
        assert f"pictures/{picture}.png)" in shown, picture


# ----------------------------------------------------------------------------- files of the root


def test_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == edgespeech.__version__
    assert citation["authors"] == [{"name": "The edgespeech authors"}]
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= reference.keys()


def test_changelog_has_this_version_and_known_headings():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in text
    assert edgespeech.__version__ in text
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= kinds
