"""Lists of pages for tests on a GPU, and steps of tests/support/decode_on_cpu there."""
from __future__ import annotations

import numpy as np
import torch
from decode_on_cpu import Step, make_step

from gpu import DecodeEngine, PageList
from pkvsim import AttentionOptions, DecodeShape, reference


def random_lists(rng: np.random.Generator, shape: DecodeShape, lens: np.ndarray, room: int) -> PageList:
    """Ascending places of each (row, KV head), from none to all, NumPy; nonsense behind them."""
    pages = rng.integers(-9, 2**31 - 1, (len(lens), shape.num_kv_heads, room)).astype(np.int32)
    counts = np.zeros(pages.shape[:2], np.int32)
    for (row, head), _ in np.ndenumerate(counts):
        there = -(-int(lens[row]) // shape.page_size)
        count = int(rng.choice([0, min(there, room), rng.integers(0, min(there, room) + 1)], p=[0.1, 0.2, 0.7]))
        pages[row, head, :count] = np.sort(rng.choice(there, count, replace=False)) if count else ()
        counts[row, head] = count
    return PageList(pages, counts)


def on_gpu(array: np.ndarray | None) -> torch.Tensor | None:
    if array is None:
        return None
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).cuda().view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array)).cuda()


class GpuStep:
    """A step with lists, its arrays on the GPU, and what float64 says of it."""

    def __init__(self, shape: DecodeShape, dtype: str, options: AttentionOptions, lens: tuple[int, ...], seed: int,
                 room: int | None = None) -> None:
        self.step: Step = make_step(shape, dtype, options, seed=seed, lens=lens)
        most = max(1, -(-int(self.step.lens.max()) // shape.page_size))
        self.step.lists = random_lists(np.random.default_rng(seed), shape, self.step.lens, room or most)
        step, int8 = self.step, options.kv_dtype == "int8"
        self.engine = DecodeEngine(shape, dtype, options=options)
        self.lens, self.table = on_gpu(step.lens), on_gpu(step.table)
        self.lists = PageList(*map(on_gpu, step.lists))
        self.q, self.k, self.v = (on_gpu(x.view(np.int8) if int8 and i else x)
                                  for i, x in enumerate((step.q, step.k, step.v)))
        self.more = {"sinks": on_gpu(step.sinks), "query_lens": on_gpu(step.query_lens),
                     "k_scale": on_gpu(step.k_scales), "v_scale": on_gpu(step.v_scales)}
        self.engine.plan(self.lens, self.table)

    def run(self, *, selected: PageList | None, page_lse: torch.Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(out, lse) float64, of outputs that were NaN before."""
        width = self.step.options.value_dim(self.step.shape)
        out = torch.full((*self.q.shape[:-1], width), float("nan"), dtype=self.q.dtype, device="cuda")
        lse = torch.full(self.q.shape[:-1], float("nan"), device="cuda")
        self.engine.run(self.q, self.k, self.v, out=out, lse=lse, selected=selected, page_lse=page_lse, **self.more)
        torch.cuda.synchronize()
        return out.double().cpu().numpy(), lse.double().cpu().numpy()

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        step = self.step
        sinks = None if step.sinks is None else step.sinks.astype(np.float64)
        table = np.where(step.table == 0x7FFFFFFF, 0, step.table)
        return reference.selected_attention(
            step.shape, step.q.astype(np.float64), *step.values(), table, step.lens, step.lists, sinks=sinks,
            options=step.options, query_lens=step.query_lens)


def assert_selected(got: tuple[np.ndarray, np.ndarray], want: tuple[np.ndarray, np.ndarray], dtype: str) -> None:
    """A query token that sees nothing of a list that has pages may get anything."""
    seen = np.isfinite(want[1])
    tolerance = {"float16": 2e-3, "bfloat16": 1.6e-2}[dtype] * max(1.0, np.abs(want[0]).max(initial=0))
    np.testing.assert_allclose(got[0][seen], want[0][seen], atol=tolerance, rtol=0)
    np.testing.assert_allclose(got[1][seen], want[1][seen], atol=2e-3, rtol=0)
