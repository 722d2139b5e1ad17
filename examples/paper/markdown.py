"""Renders what reproduce_paper measured as Markdown, beside the paper's own RTX 3060 figures."""
from __future__ import annotations

import json
from pathlib import Path

from bench.tables import Table, us
from paper.serving import counters_table, serving_table
from serving.report import DEFAULT, FLASHINFER, groups, routes_table

PAPER_FILE = Path(__file__).with_name("paper_rtx3060.json")
PAPER_KERNELS = {
    "persistentkv": "split",
    "flashinfer 0.2.5 cuda-core": "flashinfer_cuda_core",
    "flashinfer 0.2.5 tensor-core": DEFAULT,
}
OURS = ("split", "workqueue", "balanced")


def paper_figures() -> dict:
    """The paper's serving and single-call figures, with their source."""
    return json.loads(PAPER_FILE.read_text(encoding="utf-8"))


def _best(times: dict[str, float], names: tuple[str, ...]) -> str | None:
    return min((name for name in names if name in times), key=times.__getitem__, default=None)


def isolated_table(cells: list[dict], paper: dict) -> Table:
    """One row of paged KV: every engine here, and the paper's systems."""
    theirs = {
        (k["seq_len"], PAPER_KERNELS.get(k["kernel"], k["kernel"])): k["time_ms"] * 1e3
        for k in paper["kernels"]
        if k["measurement"].startswith("isolated")
    }
    rows = []
    for cell in cells:
        rows.append(
            (
                f"{cell['tokens']}",
                "streaming limit",
                us(cell["limit_us"]),
                f"{cell['kv_bytes'] / cell['limit_us'] / 1e3:.0f}",
                "-",
            )
        )
        named = [*cell["us"], *(name for tokens, name in theirs if tokens == cell["tokens"] and name not in cell["us"])]
        for name in named:
            time_us = cell["us"].get(name)
            speed = "-" if time_us is None else f"{cell['kv_bytes'] / time_us / 1e3:.0f}"
            rows.append((f"{cell['tokens']}", name, us(time_us), speed, us(theirs.get((cell["tokens"], name)))))
    stream = next(k["kernel"] for k in paper["kernels"] if k["measurement"].startswith("stream"))
    return Table(
        "Isolated calls, one row",
        ("tokens", "engine", "here us", "here GB/s", "RTX 3060 us"),
        tuple(rows),
        "Kernel time in a CUDA graph, cold L2, pages scattered. The paper's streaming read reached "
        f"{stream.removeprefix('bandwidth ')}; its PersistentKV calls do not state their split count.",
    )


def splits_table(cells: list[dict], paper: dict) -> Table:
    theirs = {k["splits"]: k["time_ms"] * 1e3 for k in paper["kernels"] if k["measurement"].startswith("split sweep")}
    rows = tuple(
        (
            f"{cell['splits']}",
            us(cell["us"].get("split")),
            us(cell["us"].get("workqueue")),
            us(theirs.get(cell["splits"])),
        )
        for cell in cells
    )
    return Table(
        "Split counts, 1 x 8192 tokens",
        ("splits", "split, here us", "workqueue, here us", "RTX 3060 us"),
        rows,
        "The paper's sweep is on contiguous KV.",
    )


def engines_table(title: str, keys: tuple[str, ...], cells: list[dict], note: str) -> Table:
    """Kernel time of every engine over cells that `keys` name, and how much faster the best of ours is."""
    names = list(dict.fromkeys(name for cell in cells for name in cell["us"]))
    rows = []
    for cell in cells:
        ours, best = _best(cell["us"], OURS), _best(cell["us"], FLASHINFER)
        over = [
            cell["us"][name] / cell["us"][ours] if name and name in cell["us"] else None for name in (DEFAULT, best)
        ]
        rows.append(
            (
                *(str(cell[key]) for key in keys),
                *(us(cell["us"].get(name)) for name in names),
                *("-" if value is None else f"{value:.2f}" for value in over),
            )
        )
    return Table(title, (*keys, *names, "best of ours x FlashInfer default", "x FlashInfer best"), tuple(rows), note)


def render(document: dict) -> str:
    """The whole page, from whatever has been measured so far."""
    paper, about = paper_figures(), document["environment"]
    lines = [
        f"# The paper's evaluation on one {about['gpu']}",
        "",
        f"Driver {about['driver']}, CUDA {about['cuda']}, PyTorch {about['torch']}, CuPy {about['cupy']}, FlashInfer "
        f"{about['flashinfer']}; {about['date']}; `{about['command']}`.",
        "",
        f"RTX 3060 columns: {paper['source']}.",
        "",
    ]
    tables: list[Table] = []
    if document.get("isolated"):
        tables.append(isolated_table(document["isolated"], paper))
    serving = groups(document.get("serving", []))
    tables += [serving_table(group, paper) for group in serving]
    if serving:
        tables += [routes_table(serving), counters_table(serving, paper)]
    if document.get("splits"):
        tables.append(splits_table(document["splits"], paper))
    if document.get("ragged"):
        tables.append(
            engines_table(
                "Raggedness: 8 rows of 16K tokens on average",
                ("spread",),
                document["ragged"],
                "spread: longest over shortest row, lengths in geometric steps. Kernel us, cold L2.",
            )
        )
    if document.get("groups"):
        tables.append(
            engines_table(
                "Group sizes",
                ("group", "case"),
                document["groups"],
                "32 query heads, 32 / group KV heads. Kernel us, cold L2.",
            )
        )
    left_out = {
        name: why
        for record in document.get("serving", [])
        for name, why in {**record["left_out"], **record["wrong"]}.items()
    }
    text = "\n".join(lines) + "\n" + "\n".join(table.markdown(level=2) for table in tables)
    return text + (f"\nLeft out: {'; '.join(f'{name}: {why}' for name, why in left_out.items())}\n" if left_out else "")
