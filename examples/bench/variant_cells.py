"""What bench_variants measures: variants of attention and of its arrays, on which steps, and the bytes each must read.

A further kind of cache is a line of VARIANTS; how its pages are made is in variant_caches.py.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from bench.cells import Cell, ragged_cells, uniform_cells
from bench.tables import Table, us

from gpu.routes import flashinfer_decode as fi
from gpu.routes import route_engines as routes
from pkvsim import AttentionOptions, DecodeShape
from pkvsim.pricing.counters import useful_kv_bytes

WINDOW = 4096
TABLES = ("block table", "csr and lengths", "csr and last pages")
MOST_OVER_SHORT_ROWS = (
    1.05  # a window's time over long rows, as a multiple of plain attention's over rows of its length
)
MOST_OVER_THEIR_ERROR = 1.5  # our error, as a multiple of FlashInfer's of the same variant


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of attention, its arrays' layout, and whether FlashInfer's backends that have it are timed beside it."""

    name: str
    options: AttentionOptions = AttentionOptions()
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    layout: str = "HND"
    ids: str = "int32"
    tables: str = TABLES[0]
    against_flashinfer: bool = True

    def shape(self, page_size: int) -> DecodeShape:
        return DecodeShape(self.num_q_heads, self.num_kv_heads, self.head_dim, page_size)

    def kv_bytes(self, seq_lens: np.ndarray, page_size: int) -> int:
        """Bytes of K, V and scales that a step of rows seq_lens [batch_size] must read."""
        return useful_kv_bytes(self.shape(page_size), seq_lens, self.options)


def _cache(name: str, kv_dtype: str, kv_scales: str) -> Variant:
    return Variant(f"{name} by {kv_scales}", AttentionOptions(kv_dtype=kv_dtype, kv_scales=kv_scales))


VARIANTS = (
    Variant("plain"),
    Variant("window 4K", AttentionOptions(window=WINDOW)),
    Variant("sinks", AttentionOptions(sinks=True)),
    Variant("soft cap", AttentionOptions(soft_cap=30.0)),
    *(Variant(f"{count} query tokens", AttentionOptions(query_tokens=count)) for count in (2, 4, 8)),
    Variant("head_dim 192/128", AttentionOptions(v_head_dim=128), head_dim=192),
    Variant("group size 8", num_q_heads=64),
    Variant("NHD", layout="NHD", against_flashinfer=False),
    Variant("int64 table", ids="int64", against_flashinfer=False),
    Variant("CSR", tables=TABLES[1], against_flashinfer=False),
    Variant("CSR, last pages", tables=TABLES[2], against_flashinfer=False),
    _cache("e4m3", "float8_e4m3fn", "tensor"),
    _cache("e4m3", "float8_e4m3fn", "page"),
    _cache("e5m2", "float8_e5m2", "tensor"),
    _cache("int8", "int8", "token"),
)
PLAIN, WINDOWED = VARIANTS[:2]


@dataclass(frozen=True, slots=True)
class Result:
    """One row of the table; times of a route that was not timed are None and `note` says why."""

    variant: str
    case: str
    batch_size: int
    num_kv_heads: int
    route: str
    kv_bytes: int
    limit_us: float
    kernel_us: float | None = None
    spread: float | None = None
    layers: int = 0
    max_abs_error: float | None = None  # against float64 on sampled rows, of what 8-bit pages stand for
    rms_error: float | None = None      # the root mean square of the same errors
    kernel: str = ""  # warps x stages, of ours
    note: str = ""


def flashinfer_backends(variant: Variant, shape: DecodeShape) -> dict[str, str]:
    """FlashInfer's backends that are timed beside ours, by route; over FP8 pages too, which no route hands on."""
    if not variant.against_flashinfer:
        return {}
    over_16_bit = replace(variant.options, kv_dtype=None, kv_scales=None)
    missing = routes.missing_routes(shape, options=over_16_bit, layout=variant.layout)
    return {route: backend for route, backend in routes.BACKENDS.items()
            if route not in missing and fi.supports(shape, backend, variant.options) is None}


def _named(cells: list[Cell], batch_size: int, case: str) -> Cell:
    return next(cell for cell in cells if (cell.batch_size, cell.case) == (batch_size, case))


def cells() -> dict[str, Cell]:
    """The steps that every variant is measured on, by name."""
    uniform = uniform_cells()
    return {"8x32K": _named(uniform, 8, "32K"),
            "64x2K": Cell(case="2K", num_q_heads=32, num_kv_heads=8, seq_lens=(2048,) * 64),
            "bimodal": _named(ragged_cells(), 32, "bimodal")}


def window_cells() -> list[tuple[Variant, Cell]]:
    """A window over long rows, and plain attention over rows as long as the window: as many bytes, as much time."""
    long, short = (Cell(case=f"{length // 1024}K", num_q_heads=32, num_kv_heads=8, seq_lens=(length,) * 8)
                   for length in (32 * WINDOW, WINDOW))
    return [(WINDOWED, long), (PLAIN, short)]


def jobs(variants: tuple[Variant, ...], names: list[str]) -> list[tuple[Variant, Cell]]:
    """What to measure; the window's comparison is there where both its variants are asked for."""
    every = cells()
    found = [(variant, every[name]) for variant in variants for name in names]
    return found + (window_cells() if PLAIN in variants and WINDOWED in variants else [])


def window_cost(results: list[Result]) -> float | None:
    """Balanced over long rows with a window, as a multiple of plain attention over short rows; None if not measured."""
    times = {_step(r): r.kernel_us for r in results if r.route == "balanced"}
    pair = [times.get((variant.name, cell.case, cell.batch_size)) for variant, cell in window_cells()]
    return None if None in pair else pair[0] / pair[1]


def _step(result: Result) -> tuple[str, str, int]:
    return result.variant, result.case, result.batch_size


def error_ratios(results: list[Result], measure: str = "max_abs_error") -> dict[tuple[str, str, int], float]:
    """By (variant, case, batch size): our error over the least of FlashInfer's, where one of its backends was timed.

    measure: "max_abs_error" or "rms_error".
    """
    ours, theirs = {}, {}
    for r in results:
        error = getattr(r, measure)
        if r.kernel_us is not None and error is not None:
            errors = ours if r.route == "balanced" else theirs
            errors[_step(r)] = min(error, errors.get(_step(r), error))
    return {step: error / theirs[step] for step, error in ours.items() if theirs.get(step)}


def table(results: list[Result], dtype: str = "float16") -> Table:
    """dtype: of queries and 16-bit pages. x FP16 (or BF16): over plain attention's time on the same step. error: the
    largest against float64; x theirs: over the least of FlashInfer's backends."""
    plain = {(r.case, r.batch_size): r.kernel_us for r in results if (r.variant, r.route) == (PLAIN.name, "balanced")}
    ratios = error_ratios(results)
    rows = []
    for r in results:
        theirs = [other.kernel_us for other in results
                  if _step(other) == _step(r) and other.route != "balanced" and other.kernel_us is not None]
        ours = r.route == "balanced" and r.kernel_us is not None
        over = plain.get((r.case, r.batch_size)) if ours else None
        rows.append((r.variant, r.case, str(r.batch_size), str(r.num_kv_heads), r.route, r.kernel or "-",
                     us(r.kernel_us),
                     "-" if r.kernel_us is None else f"{r.kv_bytes / r.kernel_us / 1e3:.0f}", us(r.limit_us),
                     "-" if r.kernel_us is None else f"{r.kernel_us / r.limit_us:.2f}",
                     "-" if over is None else f"{r.kernel_us / over:.3f}",
                     f"{min(theirs) / r.kernel_us:.2f}" if ours and theirs else "-",
                     "-" if r.max_abs_error is None else f"{r.max_abs_error:.1e}",
                     f"{ratios[_step(r)]:.2f}" if ours and _step(r) in ratios else "-"))
    cost = window_cost(results)
    note = (
        ""
        if cost is None
        else (
            f"window of {WINDOW} tokens over {32 * WINDOW // 1024}K rows: {cost:.3f} x plain over rows of {WINDOW} "
            f"({'within' if cost <= MOST_OVER_SHORT_ROWS else 'above'} {MOST_OVER_SHORT_ROWS})"
        )
    )
    worst = []
    for what, found in (("our error", ratios), ("its root mean square", error_ratios(results, "rms_error"))):
        if found:
            (variant, case, batch_size), most = max(found.items(), key=lambda item: item[1])
            worst.append(f"{what}: at most {most:.2f} x FlashInfer's ({variant}, {batch_size} x {case}; "
                         f"{'within' if most <= MOST_OVER_THEIR_ERROR else 'above'} {MOST_OVER_THEIR_ERROR})")
    notes = sorted({f"not timed: {r.variant}, {r.route}: {r.note}" for r in results if r.note})
    return Table("variants of decode attention, cold L2, kernel time in a CUDA graph",
                 ("variant", "case", "batch", "kv_heads", "route", "kernel", "us", "GB/s", "limit us", "x limit",
                  {"float16": "x FP16", "bfloat16": "x BF16"}[dtype], "x FlashInfer",
                  "error", "x theirs"),
                 tuple(rows), "\n".join(filter(None, [note, *worst, *notes])))
