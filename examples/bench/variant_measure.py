"""Measures one variant on one step: checks every engine's result, then times it cold in a graph."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from bench.cells import Cell
from bench.variant_caches import MAX_ERROR, Layer, coded_pool, error_over_16_bit, factors_of, scales_of, values_of
from bench.variant_cells import Result, Variant, flashinfer_backends
from bench.variant_reference import attention_of_draws

from gpu import DecodeEngine
from gpu.measure.pools import BenchPool, CellPages
from gpu.measure.timing import StreamLimit, graph_time_us, l2_bytes
from gpu.routes import flashinfer_decode as fi
from gpu.routes.flashinfer_builds import why_not
from pkvsim import DecodeShape

TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2}
FLASHINFER_TOLERANCE = 2  # times as much: its soft cap and its sums are in other precisions
SEED = 20260624
DRAWS = 8  # of queries, over which errors are taken: the largest of a few thousand numbers is mostly luck
OURS = "balanced"

Run = Callable[[Layer, torch.Tensor], object]  # into an output
Build = Callable[[torch.Tensor, np.ndarray, np.ndarray, torch.Tensor | None], tuple[Run, str]]  # and the kernel's name


class VariantBench:
    """Everything that outlives a step: the pool, the streaming limit, the options."""

    __slots__ = ("pool", "limit", "dtype", "page_size", "repeats", "flashinfer", "kernel", "_coded")

    def __init__(self, *, pool: BenchPool, dtype: str, page_size: int, repeats: int, flashinfer: bool,
                 kernel: tuple[int, int] | None = None) -> None:
        """kernel: (warps, stages) of 8-bit caches, by default the engine's choice."""
        self.pool, self.limit = pool, StreamLimit(pool.flat)
        self.dtype, self.page_size, self.repeats, self.flashinfer = dtype, page_size, repeats, flashinfer
        self.kernel = kernel
        self._coded: tuple[str | None, BenchPool] = None, pool

    def measure(self, variant: Variant, cell: Cell) -> list[Result]:
        """Ours first, then FlashInfer's backends that have the variant.

        Raises NoRoom where the pool is too small, SystemExit where our result is wrong.
        """
        shape, lens = variant.shape(self.page_size), cell.lengths()
        kv_bytes = variant.kv_bytes(lens, self.page_size)
        pool = self._pool_of(variant.options.kv_dtype)
        pages = pool.lay_out(shape, lens, kv_bytes=kv_bytes, l2_size=l2_bytes(), seed=1)
        layers = layers_of(pool, variant, shape, pages)
        tokens = () if variant.options.query_tokens == 1 else (variant.options.query_tokens,)
        random = torch.Generator("cuda").manual_seed(SEED)
        draws = torch.randn(DRAWS, len(lens), *tokens, shape.num_q_heads, shape.head_dim, device="cuda",
                            generator=random).to(self.pool.flat.dtype)
        q = draws[0].clone()
        sinks = torch.randn(shape.num_q_heads, device="cuda", generator=random) if variant.options.sinks else None
        row = {"variant": variant.name, "case": cell.case, "batch_size": len(lens), "num_kv_heads": shape.num_kv_heads,
               "kv_bytes": kv_bytes, "limit_us": self.limit.time_us(kv_bytes), "layers": len(layers)}
        rows = sorted({int(lens.argmin()), int(lens.argmax())})
        expected = [self._expected(variant, layers[0], draws[:, r], pages.block_table[r], int(lens[r]), sinks)
                    for r in rows]
        results = []
        for route, build in self._routes(variant, shape).items():
            try:
                run, kernel = build(q, lens, pages.block_table, sinks)
                out = torch.full(
                    (*q.shape[:-1], variant.options.value_dim(shape)), float("nan"), dtype=q.dtype, device="cuda"
                )
                errors = []
                for draw, drawn in enumerate(draws):
                    q.copy_(drawn)
                    run(layers[0], out)
                    errors += [(out[r].double() - want[draw]).flatten() for r, want in zip(rows, expected)]
                errors = torch.cat(errors)
                error, rms = float(errors.abs().max()), float(errors.square().mean().sqrt())
            except Exception as error:  # a backend whose kernels cannot be built here: named in the table
                if route == OURS:
                    raise
                results.append(Result(**row, route=route, note=why_not(error)))
                continue
            if not error < self._tolerance(variant, route):  # NaN fails too
                if route == OURS:
                    raise SystemExit(
                        f"bench_variants: {variant.name}, {cell.case}: differs from float64 by {error:.2g}"
                    )
                results.append(
                    Result(**row, route=route, max_abs_error=error, rms_error=rms, note=f"differs by {error:.2g}")
                )
                continue
            if route == OURS and variant.options.kv_dtype is not None:
                over = error_over_16_bit(shape, variant.options, q, out, lens, pages.block_table, layers[0])
                if not over <= MAX_ERROR:
                    raise SystemExit(f"bench_variants: {variant.name}, {cell.case}: differs by {over:.3g} from a "
                                     f"16-bit cache of the same values, expected at most {MAX_ERROR}")
            timing = graph_time_us(lambda i: run(layers[i], out), variants=len(layers), repeats=self.repeats)
            results.append(Result(**row, route=route, kernel_us=timing.median_us, spread=timing.spread,
                                  max_abs_error=error, rms_error=rms, kernel=kernel))
        return results

    def _tolerance(self, variant: Variant, route: str) -> float:
        if route == OURS:
            return TOLERANCE[self.dtype]
        return TOLERANCE[self.dtype] * FLASHINFER_TOLERANCE if variant.options.kv_dtype is None else MAX_ERROR

    def _pool_of(self, kv_dtype: str | None) -> BenchPool:
        """The pool, or its values as codes, which are kept for the variants that follow."""
        if kv_dtype is None:
            return self.pool
        if self._coded[0] != kv_dtype:
            self._coded = None, self.pool  # lets go of the last type's codes first: memory may not hold both
            self._coded = kv_dtype, coded_pool(self.pool, kv_dtype)
        return self._coded[1]

    def _expected(self, variant: Variant, layer: Layer, draws: torch.Tensor, page_ids: np.ndarray, length: int,
                  sinks: torch.Tensor | None) -> torch.Tensor:
        """Float64 attention [draws, ..] of one row for each of its draws of queries."""
        own = page_ids[:-(-length // self.page_size)].astype(np.int64)
        ids = torch.from_numpy(own).cuda()
        k, v = (values_of(pages[ids], variant.options.kv_dtype, draws.dtype) for pages in (layer.k, layer.v))
        return attention_of_draws(draws, k, v, variant.layout, np.arange(len(own)), length, variant.options, sinks)

    def _routes(self, variant: Variant, shape: DecodeShape) -> dict[str, Build]:
        def ours(
            q: torch.Tensor, lens: np.ndarray, table: np.ndarray, sinks: torch.Tensor | None
        ) -> tuple[Run, str]:
            engine = DecodeEngine(shape, self.dtype, OURS, options=variant.options, layout=variant.layout,
                                  variant=None if variant.options.kv_dtype is None else self.kernel)
            tables = tables_of(variant, lens, table, self.page_size)
            engine.plan(**tables)
            lse = torch.empty(q.shape[:-1], dtype=torch.float32, device="cuda")
            name = "x".join(map(str, engine.schedule_engine.config.variant))
            return lambda layer, out: engine.run(
                q, layer.k, layer.v, out=out, lse=lse, sinks=sinks, **layer.scales
            ), name

        def theirs(backend: str) -> Build:
            def build(
                q: torch.Tensor, lens: np.ndarray, table: np.ndarray, sinks: torch.Tensor | None
            ) -> tuple[Run, str]:
                engine = fi.FlashInferDecode(shape, self.dtype, backend, variant.options)
                engine.plan_packed(fi.pack_table(lens, table, page_size=self.page_size))
                factors = factors_of(variant.options)
                return lambda layer, out: engine.run(
                    q, layer.k, layer.v, out=out, return_lse=False, sinks=sinks, **factors
                ), ""

            return build

        found = {OURS: ours}
        if self.flashinfer:
            found |= {route: theirs(backend) for route, backend in flashinfer_backends(variant, shape).items()}
        return found


def layers_of(pool: BenchPool, variant: Variant, shape: DecodeShape, pages: CellPages) -> list[Layer]:
    """The pool's layers with V pages of their own head_dim, in the variant's layout: the same random values."""
    k_all, _ = pool.pages(shape)
    v_all = pool.pages(
        DecodeShape(shape.num_q_heads, shape.num_kv_heads, variant.options.value_dim(shape), shape.page_size)
    )[1]
    found = []
    for k, v in pages.layers:
        at = (k.storage_offset() - k_all.storage_offset()) // k_all.stride(0)
        layer = k, v_all[at:at + len(v)]
        if variant.layout == "NHD":
            layer = tuple(part.view(len(part), shape.page_size, shape.num_kv_heads, -1) for part in layer)
        found.append(Layer(*layer, scales_of(k, shape, variant.options)))
    return found


def tables_of(variant: Variant, lens: np.ndarray, table: np.ndarray, page_size: int) -> dict[str, torch.Tensor]:
    """Arguments of plan() on the GPU."""
    ids = torch.from_numpy(table.astype(variant.ids)).cuda()
    lengths = {"seq_lens": torch.from_numpy(lens).cuda()}
    if variant.tables == "block table":
        return {"block_table": ids} | lengths
    packed = fi.pack_table(lens, table, page_size=page_size)
    if variant.tables == "csr and last pages":
        lengths = {"last_page_len": packed.last_page_len.cuda()}
    return {"indptr": packed.indptr.cuda(), "indices": packed.indices.to(ids.dtype)} | lengths
