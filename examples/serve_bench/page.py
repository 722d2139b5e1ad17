"""The page of results: what bench_serve's JSON documents say, between two marks of a Markdown file, whose other words
stay.

A document is told by its keys: "cells" of decode steps, "transformers_us", "nano_vllm" (of
tests/support/run_nano_vllm.py), "lost_pages" of a soak, "predictions", "runs" of traces, or "runs" of bench_vllm. What
none has is said not to be measured.
"""
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.tables import Table

from serve_bench.predictions import BOUNDS, STEP_BOUND, off

BEGIN, END = "<!-- measured: written by examples/bench_serve.py --page -->", "<!-- measured: end -->"
HEAD = "# Serving a model, on one GPU\n\n"
WANTED_OVER_LIMIT, WANTED_GAP = 1.15, 0.05
NEAR_CONTEXT = 1.45  # most that vLLM's contexts may be longer than those of a cell it stands beside
PRODUCTS = {"streamed": "our products of few rows", "torch": "PyTorch's products"}

Document = dict[str, Any]


def write(page: Path, documents: list[Path]) -> None:
    """Writes what they say into the page. ValueError naming a file that is none of bench_serve's."""
    found = [read(path) for path in documents]
    text = page.read_text(encoding="utf-8") if page.exists() else f"{HEAD}{BEGIN}\n{END}\n"
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"page: expected {page} to have one line {BEGIN!r} and one {END!r} after it")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{measured(found)}\n{END}{after}", encoding="utf-8")


def read(path: Path) -> Document:
    """A document. ValueError where there is none, or of something else."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"page: expected a JSON document of bench_serve, got {path}: {error}") from None
    if not isinstance(document, dict) or not any(has(document) for _, has, _ in SECTIONS):
        raise ValueError(f"page: expected a JSON document of bench_serve, got {path}")
    return document


def measured(found: list[Document]) -> str:
    """The part between the marks."""
    parts, missing = [], []
    for name, has, tables in SECTIONS:
        chosen = [document for document in found if has(document)]
        if chosen:
            parts += [f"## {name[0].upper()}{name[1:]}\n"]
            parts += [table.markdown() for table in tables(chosen, found)]
        elif name != LOADS or not any("predictions" in document for document in found):  # which are of such loads
            missing.append(name)
    if missing:
        parts.append(f"Not measured yet: {', '.join(missing)}.\n")
    return "\n".join(parts)


def source(document: Document) -> str:
    """What it was measured on and with, when and by which command."""
    about = document.get("environment", {})
    about = {**document, **about}
    versions = [f"{name} {about[key]}" for key, name in (
        ("driver", "driver"), ("torch", "PyTorch"), ("cupy", "CuPy"), ("flashinfer", "FlashInfer"), ("vllm", "vLLM"),
        ("transformers", "Transformers"), ("nano_vllm_commit", "nano-vllm")) if about.get(key)]
    sources = [f"kernel sources {about['source_hash'][:8]}"] if about.get("source_hash") else []
    note = f" {document['note']}" if document.get("note") else ""
    date = about.get("date", "date not kept")[:16].replace("T", " ")
    return (f"`{about.get('command', 'command not kept')}`, {about.get('gpu', 'GPU not kept')}, "
            f"{', '.join([*versions, *sources])}, {date}{' UTC' if ':' in date else ''}.{note}")


def cell_tables(chosen: list[Document], _: list[Document]) -> Iterator[Table]:
    columns = ("rows x tokens", "step, ms", "limit, ms", f"x limit (at most {WANTED_OVER_LIMIT})", "GPU idle, us",
               f"of a step (at most {WANTED_GAP:.0%})", "tokens/s")
    for document in chosen:
        rows = []
        for cell in document["cells"]:
            gap, share = cell.get("gap_us"), cell.get("gap_share")
            rows.append((cell_name(cell["rows"], cell["context"]), f"{cell['step_us'] / 1e3:.3f}",
                         f"{cell['limit_us'] / 1e3:.3f}", f"{cell['over_limit']:.3f}",
                         "-" if gap is None else f"{gap:.1f}", "-" if share is None else f"{share:.2%}",
                         f"{cell['rows'] / cell['step_us'] * 1e6:,.0f}"))
        products = PRODUCTS[document.get("products", "streamed")]
        title = f"{document['model']}, {document['dtype']}, {products}"
        limit = f"The limit is weights and KV at {document['gb_per_s']:,.0f} GB/s. " if document.get("gb_per_s") else ""
        yield Table(title, columns, tuple(rows), limit + source(document))


def cell_name(rows: int, context: int) -> str:
    return f"{rows} x {context // 1024}K" if context % 1024 == 0 else f"{rows} x {context:,}"


def peer_tables(chosen: list[Document], found: list[Document]) -> Iterator[Table]:
    """Steps of a cell by whoever has measured it."""
    ours: dict[tuple[int, int], float] = {}
    for document in found:
        for cell in document.get("cells", ()):
            key = cell["rows"], cell["context"]
            ours[key] = min(ours.get(key, cell["step_us"]), cell["step_us"])
    transformers = {tuple(map(int, cell.split("x"))): us for document in chosen
                    for cell, us in document.get("transformers_us", {}).items()}
    shapes = [shape for document in chosen if of_vllm(document) for run in document["runs"]
              if run["backend"] != "CUSTOM" and run.get("kv_cache_dtype", "auto") == "auto" for shape in run["shapes"]]
    rows = []
    for key in sorted(ours.keys() | transformers.keys()):
        near = [shape for shape in shapes if shape["rows"] == key[0] and shape.get("mean_context")
                and 1 <= shape["mean_context"] / key[1] <= NEAR_CONTEXT]
        best = min(near, key=lambda shape: shape["median_ms"], default=None)
        times = [ours.get(key), transformers.get(key)]  # type: ignore[call-overload]
        if times[1] is None and best is None:
            continue
        rows.append((cell_name(*key), *("-" if us is None else f"{us / 1e3:.3f}" for us in times),
                     "-" if best is None else f"{best['median_ms']:.3f}",
                     "-" if best is None else f"{best['mean_context']:,.0f}"))
    if rows:
        yield Table("Decode steps, ms", ("rows x tokens", "gpu.serve", "Transformers", "vLLM, its own kernels",
                                         "vLLM's tokens a row"), tuple(rows), sources(
            [document for document in chosen if "nano_vllm" not in document]))
    nano = [document for document in chosen if "nano_vllm" in document]
    if nano:
        columns = "rows", "new tokens each", "nano-vllm on our kernels, tokens/s", "gpu.serve, tokens/s", \
            "rows equal", "near ties", "wrong"
        made = [document["nano_vllm"] for document in nano]
        yield Table("nano-vllm with our flash_attn", columns, tuple(
            (f"{one['rows']}", f"{one['new_tokens']}", f"{one['tokens_per_s']:,.0f}",
             "-" if one.get("ours_tokens_per_s") is None else f"{one['ours_tokens_per_s']:,.0f}",
             f"{one['same_rows']}", f"{one['near_ties']}", f"{one['wrong']}") for one in made), sources(nano))


def of_vllm(document: Document) -> bool:
    return any("backend" in run for run in document.get("runs", ()))


def sources(documents: list[Document]) -> str:
    return " ".join(source(document) for document in documents)


def soak_tables(chosen: list[Document], _: list[Document]) -> Iterator[Table]:
    columns = ("model", "requests", "served", "refused", "cancelled", "pages lost", "memory grew by (host, GPU), MiB",
               "tokens", "s", "sound")
    ends = "served", "refused", "cancelled"
    rows = [(one.get("model", "not kept"), _came(one), *(f"{one['ended'].get(status, 0):,}" for status in ends),
             f"{one['lost_pages']}", ", ".join(f"{count / 2**20:.1f}" for count in one["growth_bytes"] or ()) or "-",
             f"{one['tokens']:,}", f"{one['seconds']:.0f}", "yes" if one["sound"] else "NO") for one in chosen]
    yield Table("Bursts beyond memory, cancellations, overlong prompts", columns, tuple(rows), sources(chosen))


def _came(soak: Document) -> str:
    """How many requests came, and where it was cut short of how many."""
    return f"{soak['requests']:,}" + (f" of {soak['asked']:,}, cut short" if soak.get("cut_short") else "")


def prediction_tables(chosen: list[Document], _: list[Document]) -> Iterator[Table]:
    columns = "load", "", "measured", "predicted", "off", "at most"
    for document in chosen:
        rows: list[tuple[str, ...]] = []
        for one in document["predictions"]:
            rows += [(one["name"], *cells, f"{BOUNDS[name]:.0%}") for name, cells in figures(one["figures"])]
            rows += [(one["name"], f"steps, {error['kind']}: {error['steps']:,}", "", f"bias {error['bias']:+.1%}",
                      f"{error['mean']:.1%}", f"{STEP_BOUND:.0%}" if error["kind"] == "all" else "")
                     for error in one["steps"]]
        within = "All are within their bounds." if document.get("within") else "Not all are within their bounds."
        yield Table(f"{document['model']}, {document['dtype']}", columns, tuple(rows), f"{within} {source(document)}")


def run_tables(chosen: list[Document], _: list[Document]) -> Iterator[Table]:
    columns = "run", "", "measured", "predicted", "off"
    for document in chosen:
        rows: list[tuple[str, ...]] = []
        for one in document["runs"]:
            rows += [(one["name"], *cells) for _, cells in figures(one["figures"])]
            if one.get("gap_share") is not None:
                rows.append((one["name"], "GPU idle in decode", f"{one['gap_share']:.1%}", "", ""))
        yield Table(f"{document['model']}, {document['dtype']}", columns, tuple(rows), source(document))


def figures(pairs: dict[str, list[float | None]]) -> Iterator[tuple[str, tuple[str, str, str, str]]]:
    """A figure's name, and how it is written: with its unit, measured, predicted, how far off."""
    for name, (measured_, predicted) in pairs.items():
        scale, form = (1.0, ",.0f") if name == "tokens/s" else (1e3, ",.2f")
        apart = off((measured_, predicted))
        shown = ["-" if value is None else f"{value * scale:{form}}" for value in (measured_, predicted)]
        label = name if name == "tokens/s" else f"{name}, ms"
        yield name, (label, shown[0], shown[1], "-" if apart is None else f"{apart:+.1%}")


LOADS = "traces and closed loops"
SECTIONS = (
    ("decode steps against the memory's limit", lambda document: "cells" in document, cell_tables),
    ("other engines", lambda document: "transformers_us" in document or "nano_vllm" in document or of_vllm(document),
     peer_tables),
    ("predictions", lambda document: "predictions" in document, prediction_tables),
    (LOADS, lambda document: "runs" in document and not of_vllm(document), run_tables),
    ("a soak", lambda document: "lost_pages" in document, soak_tables),
)  # fmt: skip
