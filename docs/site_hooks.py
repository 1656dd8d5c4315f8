"""What MkDocs does with our pages that plain Markdown does not need.

- `::: edgespeech.ops.*` in a page of the reference becomes one `:::` for each module of the package.
- A link out of docs/, such as `../../edgespeech/ops/pulse.py`, works where the repository is browsed. In the site it
  leads to the module's reference, and is plain code where there is none.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")
ALL_MODULES = re.compile(r"^::: ([\w.]+)\.\*$", re.MULTILINE)


def modules_of(package: str) -> list[str]:
    """Its modules in the order of their names."""
    folder = ROOT / package.replace(".", "/")
    return [f"{package}.{path.stem}" for path in sorted(folder.glob("[!_]*.py"))]


def on_page_markdown(markdown: str, *, page, config, files) -> str:
    """Called by MkDocs for every page, before it is rendered."""
    markdown = ALL_MODULES.sub(
        lambda found: "\n\n".join(f"::: {name}" for name in modules_of(found[1])), markdown
    )
    folder = (Path(config["docs_dir"]) / page.file.src_uri).parent

    def link(found: re.Match[str]) -> str:
        text, target = found.groups()
        path = (folder / target.partition("#")[0]).resolve()
        if "://" in target or not path.is_relative_to(ROOT) or path.is_relative_to(ROOT / "docs"):
            return found[0]
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] != "edgespeech" or path.suffix != ".py" or parts[-1].startswith("_"):
            return text
        home = parts[1] if len(parts) > 2 else "core"
        up = "../" * page.file.src_uri.count("/")
        return f"[{text}]({up}reference/{home}.md#{'.'.join(parts)})"

    return LINK.sub(link, markdown)
