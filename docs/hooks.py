"""MkDocs hook: the pages and drawings that are made from the code at every build, so that none of them drifts.

The command reference comes from the typer app, the drawings from the schedules themselves, the rooms from the
packages' docstrings; measured tables, tutorial, CONTRIBUTING and CHANGELOG are the repository's own files.
"""
from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
import drawings  # noqa: E402

WIDE = "---\nhide:\n  - toc\n---\n"  # pages of wide tables have no table of contents beside them


def on_files(files: Files, config: Any) -> Files:
    """Adds the generated pages and drawings to those of docs/."""
    results = sorted((ROOT / "examples/results").glob("*.md"))
    for name, content in {
        **{f"measured/{page.name}": WIDE + page.read_text() for page in results},
        "tutorial.md": (ROOT / "examples/tutorial_what_if.md").read_text(),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(),
        "reference/commands.md": commands_page(),
        "rooms.md": rooms_page(),
        "pictures/spans.svg": drawings.spans(),
        "pictures/launch.svg": drawings.launch(),
        "pictures/schedules.svg": drawings.schedules(),
    }.items():
        files.append(File.generated(config, name, content=content))
    return files


def commands_page() -> str:
    """Every subcommand with its help and its options, as the app states them."""
    import typer

    from pkvsim.cli import app

    command = typer.main.get_command(app)
    pages = ["# Commands\n", "`pkvsim COMMAND --help` prints the same. All commands run without a GPU.\n"]
    for name, sub in command.commands.items():
        text, _, examples = (sub.help or "").partition("Examples:")
        pages += [f"## `pkvsim {name}`\n", _paragraphs(text.replace("\b", ""))]
        arguments = [_argument(param) for param in sub.params if param.param_type_name == "argument"]
        if arguments:
            pages += ["| argument | what it is |\n|---|---|\n" + "\n".join(arguments) + "\n"]
        options = [_option(param) for param in sub.params if param.param_type_name == "option"]
        if options:
            pages += ["| option | default | what it is |\n|---|---|---|\n" + "\n".join(options) + "\n"]
        lines = [line.strip() for line in examples.replace("\b", "").splitlines() if line.strip()]
        if lines:
            pages += ["```sh\n" + "\n".join(lines) + "\n```\n"]
    return "\n".join(pages)


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.strip().split("\n\n")) + "\n"


def _cell(text: object) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _argument(param: Any) -> str:
    return f"| `{param.metavar or param.name.upper()}` | {_cell(getattr(param, 'help', '') or '')} |"


def _option(param: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*param.opts, *param.secondary_opts))
    default = param.default
    if getattr(param, "is_flag", False):
        shown = "on" if default else "off"
    elif param.required:
        shown = "required"
    elif default in (None, (), []) or callable(default):
        shown = ""
    else:
        shown = f"`{_cell(default)}`"
    return f"| {names} | {shown} | {_cell(param.help or '')} |"


def rooms_page() -> str:
    """The reading guides: the docstring of every package, in the order of the arrows."""
    pages = [
        "# Rooms\n",
        "Folders show the architecture: a room may import those that stand above it here, and `make lint` checks it. "
        "What follows is the reading guide that opens each package.\n",
    ]
    for package, rooms in ROOMS.items():
        pages += [f"## `{package}`\n", _docstring(ROOT / package / "__init__.py")]
        for room in rooms:
            pages += [f"### `{package}.{room}`\n", _docstring(ROOT / package / room / "__init__.py")]
            place = ROOT / package / room
            modules = {source.stem: source for source in place.glob("*.py") if source.stem[:2] != "__"}
            modules |= {guide.parent.relative_to(place).as_posix().replace("/", "."): guide
                        for guide in place.glob("*/**/__init__.py")}  # fmt: skip
            lines = [f"| `{name}` | {_cell(_first_sentence(modules[name]))} |" for name in sorted(modules)]
            pages += ["\n".join(["| module or folder | what it holds |", "|---|---|", *lines, ""])]
    return "\n".join(pages)


ROOMS = {
    "pkvsim": ("compiled", "schedule", "reference", "selection", "memory", "traces", "models", "devices", "outside",
               "pricing", "timeline", "fitting", "policy", "serving", "studies", "reports", "commands"),
    "gpu": ("inputs", "kernels", "measure", "cache", "engine", "selection", "several", "routes", "drop_ins",
            "calibrate", "serve"),
    "cuda_src": (),
}


def _first_sentence(source: Path) -> str:
    """Of a module's docstring."""
    return re.split(r"(?<=\.)\s", " ".join(_docstring(source).split()) + " ", maxsplit=1)[0]


def _docstring(source: Path) -> str:
    return (ast.get_docstring(ast.parse(source.read_text())) or "") + "\n"
