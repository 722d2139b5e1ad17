"""Readers of published tables of measured step times, each recognised by its header."""
from __future__ import annotations

import csv
from pathlib import Path

from pkvsim.fitting.measurements import HEADER, Measurement, Row, cell_int, cell_time, parse_native, read_table
from pkvsim.shapes import DecodeShape
from pkvsim.traces.paper_families import paper_trace

PAPER_SHAPE = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)
PAPER_KERNELS = ("measurement", "batch_size", "seq_len", "splits", "kernel", "time_ms")
PAPER_TRACES = (
    "family", "seed", "requests", "max_active", "steps", "splits", "engine", "gpu_mean_step_ms", "wall_mean_step_ms",
)  # fmt: skip
PEERS = ("device", "system", "version", "kernel", "batch_size", "context_len", "num_q_heads", "num_kv_heads", "time_us")
FLASHINFER = (
    "num_q_heads", "num_kv_heads", "case", "draw", "batch_size", "backend", "kernel_us", "plan_us", "plan_run_sync_us",
)  # fmt: skip
FLASHINFER_ROUTES = {"cuda_core": "flashinfer_cuda_core", "tensor_core": "flashinfer_tensor_core", "xqa": "xqa"}
MAX_SHOWN = 500  # characters of a wrong header in an error
RAGGED_CELLS = "h200_ragged_cells.csv"  # beside the FlashInfer table: the lengths of its ragged cells


def read_measurements(path: str | Path) -> list[Measurement]:
    """Every measurement of a CSV file, native or published. Raises ValueError naming the file, line and column."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read: {getattr(error, 'strerror', None) or error}") from None
    header = set(next(csv.reader(text.splitlines()[:1]), []))
    readers = {HEADER: parse_native, PAPER_KERNELS: _paper_kernel, PAPER_TRACES: _paper_trace, PEERS: _peer}
    for columns, parse in readers.items():
        if set(columns) <= header:
            return read_table(path, text, columns, parse)
    if set(FLASHINFER) <= header:
        lengths = _ragged_lengths(path.parent / RAGGED_CELLS)
        return read_table(path, text, FLASHINFER, lambda row: _flashinfer(row, lengths))
    got = ", ".join(sorted(header))[:MAX_SHOWN] or "an empty line"
    raise ValueError(f"{path}: expected the columns {', '.join(HEADER)} or those of a published table, got {got}")


def _paper_kernel(row: Row) -> list[Measurement]:
    """The paper's single calls: its split kernel over split counts, and FlashInfer's. Other rows are other systems'."""
    kernel = row["kernel"].rsplit(" ", 1)[-1]
    routes = {"persistentkv": "split", "cuda-core": "flashinfer_cuda_core", "tensor-core": "flashinfer_tensor_core"}
    route = routes.get(kernel)
    if route is None:
        return []
    lens = (cell_int(row, "seq_len"),) * cell_int(row, "batch_size")
    splits = cell_int(row, "splits") if row["splits"] else None
    if route == "split" and splits is None:
        return []  # its split count is not stated
    time_us = cell_time(row, "time_ms", scale=1e3)
    return [Measurement(route=route, shape=PAPER_SHAPE, seq_lens=lens, splits=splits, kernel_us=time_us)]


def _paper_trace(row: Row) -> list[Measurement]:
    """An engine's mean over a trace, whose steps follow from family and seed. FlashInfer ran on tensor cores."""
    counts = [cell_int(row, name) for name in ("seed", "requests", "max_active", "steps")]
    steps = tuple(tuple(step.seq_lens.tolist()) for step in paper_trace(row["family"], *counts).iter_steps())
    return [
        Measurement(
            route="flashinfer_tensor_core" if row["engine"] == "flashinfer" else row["engine"],
            shape=PAPER_SHAPE,
            seq_lens=steps[0],
            other_steps=steps[1:],
            planned=True,
            splits=cell_int(row, "splits") if row["splits"] else None,
            kernel_us=cell_time(row, "gpu_mean_step_ms", scale=1e3),
            wall_us=cell_time(row, "wall_mean_step_ms", scale=1e3),
        )
    ]


def _peer(row: Row) -> list[Measurement]:
    """Uniform lengths, head_dim 128; the route is system/version/kernel, with /mha where no heads share a KV head:
    these systems run another kernel there (TensorRT-LLM its masked MHA in place of XQA)."""
    shape = DecodeShape(cell_int(row, "num_q_heads"), cell_int(row, "num_kv_heads"), 128, 16)
    return [
        Measurement(
            route="/".join(
                [*(row[name] for name in ("system", "version", "kernel")), *["mha"][: shape.group_size == 1]]
            ),
            shape=shape,
            seq_lens=(cell_int(row, "context_len"),) * cell_int(row, "batch_size"),
            kernel_us=cell_time(row, "time_us"),
            device=row["device"],
        )
    ]


def _flashinfer(row: Row, lengths: dict[tuple[str, str, int], tuple[int, ...]]) -> list[Measurement]:
    """FlashInfer's backends, head_dim 128, page 16; BatchAttention (wrong results in that pool) is left out."""
    if row["backend"] == "batch_attention":
        return []
    if row["backend"] not in FLASHINFER_ROUTES:
        raise ValueError(f"column backend: expected one of {', '.join(FLASHINFER_ROUTES)}, got {row['backend']!r}")
    batch_size, case = cell_int(row, "batch_size"), row["case"]
    if case.startswith("uniform_length_"):
        lens = (cell_int({"case": case.removeprefix("uniform_length_")}, "case"),) * batch_size
    elif (row["draw"], case, batch_size) in lengths:
        lens = lengths[row["draw"], case, batch_size]
    else:
        raise ValueError(f"column case: expected uniform_length_N or a cell of {RAGGED_CELLS}, got {case!r}")
    return [
        Measurement(
            route=FLASHINFER_ROUTES[row["backend"]],
            shape=DecodeShape(cell_int(row, "num_q_heads"), cell_int(row, "num_kv_heads"), 128, 16),
            seq_lens=lens,
            kernel_us=cell_time(row, "kernel_us"),
            plan_us=cell_time(row, "plan_us", optional=True),
            wall_us=cell_time(row, "plan_run_sync_us", optional=True),
        )
    ]


def _ragged_lengths(path: Path) -> dict[tuple[str, str, int], tuple[int, ...]]:
    """Lengths by (draw, case, batch size)."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise ValueError(f"{path}: cannot read: {error.strerror}") from None
    return {(r["draw"], r["case"], int(r["batch_size"])): tuple(map(int, r["seq_lens"].split())) for r in rows}
