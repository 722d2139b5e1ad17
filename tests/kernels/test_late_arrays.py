"""Lengths and page ids that are written while the balanced kernel already plans: the kernel itself, on the CPU.

Where kernels overlap, it reads both before the previous kernel has ended, uses what may be anything, and has to notice.
"""
from __future__ import annotations

import numpy as np
import pytest
from decode_on_cpu import make_step, run
from hypothesis import given, settings
from hypothesis import strategies as st
from slow import slow_unless

from pkvsim import AttentionOptions, DecodeShape, reference
from pkvsim.schedule.costs import BalancedCosts

SHAPES = {  # a warp alone, a team of warps; pages smaller and larger than tiles
    "one warp": (DecodeShape(8, 2, 64, 16), {}),
    "small pages": (DecodeShape(8, 2, 64, 3), {"window": 40}),
    "team": (DecodeShape(6, 2, 64, 32), {"query_tokens": 7}),
}
LENGTH = st.one_of(st.integers(0, 90), st.sampled_from((0, 1, 16, 17)))
INT32 = st.integers(-(2**31), 2**31 - 1)


RANGE_BEGINS, RANGE_ENDS = 32 + 5, 32 + 6  # X0 and X_END of a pkv::PlanRecord, whose first 32 words are lengths


def records(data, lens_before, step, rng, ctas) -> np.ndarray:
    """pkv::PlanRecords [ctas, 64], flat: none, or such as a CTA may meet half written, of the lengths of before or
    now."""
    found = np.full((ctas, 64), -1, np.int32)
    kind = data.draw(st.sampled_from(("none", "before", "now")), "records")
    if kind != "none" and len(step.lens) <= 32:
        most = step.table.shape[1] * step.shape.page_size
        found[:, :32] = 0
        found[:, :len(step.lens)] = np.clip(lens_before if kind == "before" else step.lens, 0, most)
        found[:, 32:43] = rng.integers(-1, 40, (ctas, 11))
        found[:, 32:34] = len(step.lens), most
        found[:, 34] = np.minimum(found[:, 34], len(step.lens) - 1)
        found[:, 35] = np.minimum(found[:, 35], step.shape.num_kv_heads - 1)
        if data.draw(st.booleans(), "records that can be followed"):
            found = np.maximum(found, 0)
    return found.reshape(-1)


@pytest.mark.parametrize("name", slow_unless(lambda name: name == "one warp", SHAPES))
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_what_the_previous_kernel_writes_counts(name, data) -> None:
    shape, more = SHAPES[name]
    options = AttentionOptions(**more)
    rows = data.draw(st.sampled_from((1, 5, 33, 40)), "rows")
    lens = data.draw(st.lists(LENGTH, min_size=rows, max_size=rows).filter(any), "lengths")
    if options.query_tokens > 1:  # rows are empty or have all their query tokens
        lens = [length and max(length, options.query_tokens) for length in lens]
    step = make_step(shape, "float16", options, seed=rows, lens=tuple(lens))
    seed = data.draw(st.integers(0, 999), "seed of what was there before")
    rng = np.random.default_rng(seed)
    lens_before = step.lens.copy()
    kinds = {"none": 0, "a tenth": rng.random(rows) < 0.1, "the last": np.arange(rows) == rows - 1, "all": 1}
    kind = data.draw(st.sampled_from(sorted(kinds)), "lengths that change")
    changed = np.broadcast_to(kinds[kind], rows).astype(bool)
    lens_before[changed] = data.draw(st.lists(st.one_of(LENGTH, INT32), min_size=rows, max_size=rows))[:changed.sum()]
    table_before = step.table.copy()
    changed = rng.random(step.table.shape) < data.draw(st.sampled_from((0, 0.05, 1)), "page ids that change")
    table_before[changed] = rng.integers(-(2**31), 2**31, changed.sum(), dtype=np.int32)
    variant = (4, 2) if options.query_tokens > 1 else (2, 2)
    ctas = data.draw(st.integers(1, 9), "CTAs")
    before = lens_before, table_before, records(data, lens_before, step, rng, ctas)
    costs = BalancedCosts(1, 2, pair=data.draw(st.sampled_from((0, 80)), "cost of a pair"))
    turn_order = data.draw(st.integers(0, 2**32 - 1), "order of the warps' turns")
    out, lse = run(step, "balanced", variant=variant, ctas=ctas, costs=costs, before=before, turn_order=turn_order)
    want, want_lse = reference.attention(shape, step.q.astype(np.float64), *step.values(), step.table, step.lens,
                                         options=options)
    assert np.abs(out - want).max() <= 1e-3 * max(1.0, np.abs(want).max())  # NaN fails too
    seen = np.isfinite(want_lse)
    np.testing.assert_allclose(lse[seen], want_lse[seen], atol=1e-3)
    assert (lse[~seen] == -np.inf).all()


@pytest.mark.parametrize("rows, recalled", [(1, True), (32, True), (33, False)])
@pytest.mark.parametrize("name", slow_unless(lambda name: name == "one warp", SHAPES))
def test_a_plan_that_was_left_is_used(name, rows, recalled) -> None:
    """Of up to 32 rows: by records that leave every CTA nothing to do, nothing is done; not by those of other
    lengths."""
    shape, more = SHAPES[name]
    options = AttentionOptions(**more)
    step = make_step(shape, "float16", options, seed=rows, lens=tuple(20 + 7 * (row % 5) for row in range(rows)))

    def empty(records: np.ndarray) -> None:
        records[:, RANGE_BEGINS] = records[:, RANGE_ENDS] = 0

    def empty_and_of_others(records: np.ndarray) -> None:
        empty(records)
        records[:, 0] += 1

    variant = (4, 2) if options.query_tokens > 1 else (2, 2)
    out, _ = run(step, "balanced", variant=variant, between=empty)
    assert np.isnan(out).all() if recalled else np.isfinite(out).all()
    out, _ = run(step, "balanced", variant=variant, between=empty_and_of_others)
    assert np.isfinite(out).all()
