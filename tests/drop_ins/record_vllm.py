"""Records what our vLLM adapter touches of a vLLM release, from its wheel's sources, without installing it.

    python -m tests.drop_ins.record_vllm vllm-0.24.0-cp38-abi3-manylinux_2_28_x86_64.whl

writes tests/drop_ins/vllm_interface/MAJOR.MINOR.json, and differences.md anew from all files there: what each release
changes against the one that the adapter was written for. Names, defaults and annotations are kept, and of code what
says how a cache lies and what a backend is asked. vllm_touched.py says what is looked for.
"""
from __future__ import annotations

import ast
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

from tests.drop_ins.vllm_touched import ANY, band_of, touched

FOLDER = Path(__file__).parent / "vllm_interface"
WRITTEN_FOR = "0.24"
# Functions whose results are recorded too: the axes of a cache, and their order in memory.
WITH_RESULTS = ("get_kv_cache_shape", "get_kv_cache_stride_order")
# Functions of which is recorded how they take K and V from a cache.
WITH_READS = ("forward", "do_kv_cache_update")
# Functions of which is recorded which methods of their own class they ask.
WITH_ASKED = ("validate_configuration",)


class Sources:
    """Modules of a wheel, parsed as they are asked for."""

    def __init__(self, wheel: zipfile.ZipFile) -> None:
        self._wheel, self._names, self._trees = wheel, set(wheel.namelist()), {}

    def find(self, module: str, name: str) -> ast.stmt | None:
        """What defines a name of a module, wherever the module imports it from; None where it has none."""
        for node in self._tree(module):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
                return node
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and ast.unparse(_target(node)) == name:
                return node
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self.find(node.module, alias.name)
        return None

    def _tree(self, module: str) -> list[ast.stmt]:
        if module not in self._trees:
            stem = module.replace(".", "/")
            path = next((path for path in (f"{stem}.py", f"{stem}/__init__.py") if path in self._names), None)
            self._trees[module] = [] if path is None else ast.parse(self._wheel.read(path)).body
        return self._trees[module]


def _target(node: ast.Assign | ast.AnnAssign) -> ast.expr:
    return node.targets[0] if isinstance(node, ast.Assign) else node.target


def _text(node: ast.AST | None) -> str | None:
    return None if node is None else ast.unparse(node)


def signature(function: ast.FunctionDef) -> dict[str, Any]:
    """Decorators, parameters (kind, name, annotation, default) and what is returned."""
    given = function.args
    plain = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(plain) - len(given.defaults)) + list(map(_text, given.defaults))
    found = [["plain", arg.arg, _text(arg.annotation), default] for arg, default in zip(plain, defaults)]
    found += [["variable", given.vararg.arg, _text(given.vararg.annotation), None]] if given.vararg else []
    found += [["keyword", arg.arg, _text(arg.annotation), _text(default)]
              for arg, default in zip(given.kwonlyargs, given.kw_defaults)]
    found += [["keywords", given.kwarg.arg, _text(given.kwarg.annotation), None]] if given.kwarg else []
    names = sorted(text for text in map(_text, function.decorator_list)
                   if text in ("staticmethod", "classmethod", "property"))
    told_of: dict[str, Any] = {"decorators": names, "parameters": found, "returns": _text(function.returns)}
    more = {"results": results(function) if function.name in WITH_RESULTS else [],
            "reads": reads(function) if function.name in WITH_READS else [],
            "asks": asks(function) if function.name in WITH_ASKED else []}
    return told_of | {name: found for name, found in more.items() if found}


def reads(function: ast.FunctionDef) -> list[str]:
    """By what expressions the function takes two arrays from kv_cache, each once."""
    pairs = [node for node in ast.walk(function) if isinstance(node, ast.Assign)
             and isinstance(node.targets[0], ast.Tuple) and len(node.targets[0].elts) == 2]
    found = [ast.unparse(node.value) for node in sorted(pairs, key=lambda node: node.lineno)
             if any(isinstance(one, ast.Name) and one.id == "kv_cache" for one in ast.walk(node.value))]
    return [*dict.fromkeys(found)]


def asks(function: ast.FunctionDef) -> list[str]:
    """The class's own methods that it calls."""
    return sorted({node.func.attr for node in ast.walk(function) if isinstance(node, ast.Call)
                   and isinstance(node.func, ast.Attribute) and _text(node.func.value) == "cls"})


def results(function: ast.FunctionDef) -> list[str]:
    """What the function returns, in its order: a name that it returns stands for all that it may have been set to."""
    given = [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value is not None]
    named = {value.id for value in given if isinstance(value, ast.Name)}
    given += [node.value for node in ast.walk(function) if isinstance(node, (ast.Assign, ast.AnnAssign))
              and isinstance(_target(node), ast.Name) and _target(node).id in named and node.value is not None]
    return [ast.unparse(value) for value in sorted(given, key=lambda value: value.lineno)
            if not isinstance(value, ast.Name)]


def members(node: ast.ClassDef, wanted: tuple[str, ...]) -> dict[str, Any]:
    """The touched members of a class, in their order: {name: signature, [annotation, default] or "set"}."""
    found: dict[str, Any] = {}
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name in wanted:
            found[item.name] = signature(item)
        elif isinstance(item, (ast.Assign, ast.AnnAssign)) and isinstance(_target(item), ast.Name):
            if wanted[:1] == ANY or _target(item).id in wanted:
                annotation = item.annotation if isinstance(item, ast.AnnAssign) else None
                found[_target(item).id] = [_text(annotation), _text(item.value)]
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store) and _text(inner.value) == "self":
            if inner.attr in wanted:
                found.setdefault(inner.attr, "set")
    return found


def record(wheel: Path) -> dict[str, Any]:
    """The interface of the release in a wheel: {"release", "modules": {module: {name: ..., None where it is gone}}}."""
    release = wheel.name.split("-")[1]
    with zipfile.ZipFile(wheel) as archive:
        sources = Sources(archive)
        modules: dict[str, dict[str, Any]] = {}
        for module, names in touched(band_of(release)).items():
            modules[module] = {}
            for name, wanted in names.items():
                node = sources.find(module, name)
                if isinstance(node, ast.ClassDef):
                    entry: Any = {"bases": list(map(_text, node.bases)),
                                  "dataclass": any("dataclass" in _text(one) for one in node.decorator_list),
                                  "members": members(node, wanted)}
                elif isinstance(node, ast.FunctionDef):
                    entry = signature(node)
                else:
                    entry = None if node is None else _text(node.value)
                modules[module][name] = entry
    return {"release": release, "modules": modules}


def missing(interface: dict[str, Any]) -> list[str]:
    """What is touched and is not there."""
    gone = []
    for module, names in touched(band_of(interface["release"])).items():
        for name, wanted in names.items():
            entry = interface["modules"][module][name]
            if entry is None:
                gone.append(f"{module}.{name}")
            else:
                gone += [f"{module}.{name}.{member}" for member in wanted
                         if member not in ANY and member not in entry["members"]]
    return gone


def flatten(interface: dict[str, Any]) -> dict[str, str]:
    """{dotted name: what it is}, of everything that is recorded and there."""
    found = {}
    for module, names in interface["modules"].items():
        for name, entry in names.items():
            if isinstance(entry, dict) and "members" in entry:
                found[f"{module}.{name}"] = f"class of {', '.join(entry['bases']) or 'object'}"
                found |= {f"{module}.{name}.{member}": told(what) for member, what in entry["members"].items()}
            elif entry is not None:
                found[f"{module}.{name}"] = told(entry)
    return found


def told(what: Any) -> str:
    """A member in words of Python."""
    if isinstance(what, dict):
        stars = {"variable": "*", "keywords": "**"}
        taken = ", ".join(stars.get(kind, "") + name + ("" if default is None else f"={default}")
                          for kind, name, _, default in what["parameters"])
        more = {"results": " -> {}", "reads": " takes {}", "asks": " asks {}"}
        return f"({taken})" + "".join(text.format(" or ".join(what[key])) for key, text in more.items() if key in what)
    if isinstance(what, list):
        annotation, default = what
        return ("" if annotation is None else f": {annotation}") + ("" if default is None else f" = {default}")
    return str(what)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, in the old one, in the new one) of what differs; "-" where it is not."""
    before, after = flatten(old), flatten(new)
    return [(name, before.get(name, "-"), after.get(name, "-")) for name in sorted({*before, *after})
            if before.get(name) != after.get(name)]


def _cell(text: str) -> str:
    escaped = text.replace("|", "\\|")
    return text if text == "-" else f"`{escaped}`"


def write_table(folder: Path = FOLDER) -> str:
    """differences.md of all interfaces recorded in a folder."""
    recorded = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    lines = ["# What vLLM's releases change of what our adapter touches", "",
             f"Against {recorded[WRITTEN_FOR]['release']}, which it was written for. Made by "
             "`python -m tests.drop_ins.record_vllm`.", ""]
    for band, interface in recorded.items():
        if band != WRITTEN_FOR:
            lines += [f"## {interface['release']}", "", f"| name | {WRITTEN_FOR} | {band} |", "| --- | --- | --- |"]
            lines += ["| " + " | ".join((name, *(_cell(text) for text in texts))) + " |"
                      for name, *texts in differences(recorded[WRITTEN_FOR], interface)]
            lines.append("")
    return "\n".join(lines)


def main() -> None:
    for wheel in map(Path, sys.argv[1:]):
        interface = record(wheel)
        band = band_of(interface["release"])
        (FOLDER / f"{band}.json").write_text(json.dumps(interface, indent=1) + "\n")
        print(f"{band}: {len(flatten(interface))} names; not there: {', '.join(missing(interface)) or 'none'}")
    (FOLDER / "differences.md").write_text(write_table())


if __name__ == "__main__":
    main()
