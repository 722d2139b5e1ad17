"""cuda_src/selected.cu itself, built for the CPU: lists of pages against float64 attention; and the mass of pages."""
from __future__ import annotations

import numpy as np
import nvrtc
import pytest
from decode_on_cpu import aligned, make_step, run
from slow import slow_unless, slow_unless_of
from test_decode_kernel import assert_close

from gpu.kernels.compile import SOURCE_DIR, compile_options
from gpu.kernels.variant import kernel_config
from pkvsim import AttentionOptions, DecodeShape, PageList, list_schedule, reference
from pkvsim.schedule.costs import MEASURED_COSTS, BalancedCosts


def make_lists(shape: DecodeShape, lens: np.ndarray, seed: int, share: float = 0.5) -> PageList:
    """About that share of each row's pages, for each head others; now and then none, all, or more than there are."""
    rng = np.random.default_rng(seed)
    there = -(-lens // shape.page_size)
    pages = rng.integers(-9, 2**31 - 1, (len(lens), shape.num_kv_heads, int(there.max()))).astype(np.int32)
    counts = np.zeros(pages.shape[:2], np.int32)
    for (row, head), _ in np.ndenumerate(counts):
        chosen = np.flatnonzero(rng.random(there[row]) < rng.choice([0.0, share, share, share, 1.0]))
        pages[row, head, : len(chosen)] = chosen
        counts[row, head] = len(chosen) if len(chosen) < there[row] else len(chosen) + rng.integers(0, 9)
    return PageList(aligned(pages), aligned(counts))


def selected(shape, dtype, options, lens, seed=0, **more):
    step = make_step(shape, dtype, options, seed=len(lens) + seed, lens=lens, **more)
    step.lists = make_lists(shape, step.lens, seed)
    return step


def expected(step) -> tuple[np.ndarray, np.ndarray]:
    sinks = None if step.sinks is None else step.sinks.astype(np.float64)
    return reference.selected_attention(step.shape, step.q.astype(np.float64), *step.values(),
                                        np.where(step.table == 0x7FFFFFFF, 0, step.table), step.lens, step.lists,
                                        sinks=sinks, options=step.options, query_lens=step.query_lens)


def assert_selected(got, want, dtype) -> None:
    """As assert_close; a query token that sees nothing of a list that has pages may get anything."""
    seen = np.isfinite(want[1])
    assert_close((np.where(seen[..., None], got[0], 0), np.where(seen, got[1], -np.inf)), want, dtype)


# group size, head_dim, page size, dtype, CTAs; lengths; options
CASES = {
    "many parts": (1, 64, 16, "bfloat16", 29, (400, 390, 512), {"sinks": True}),
    "query tokens across pages": (2, 64, 3, "float16", 5, (100, 82, 81, 90, 7), {"query_tokens": 5}),
    "pages of 64": (4, 64, 64, "float16", 6, (300, 65, 64, 1, 500), {"soft_cap": 4.0}),
    "int8 by token": (4, 128, 16, "bfloat16", 6, (100, 97, 0, 96), {"kv_dtype": "int8", "kv_scales": "token"}),
}  # fmt: skip


@pytest.mark.parametrize("name", slow_unless(lambda name: name == "query tokens across pages", CASES))
def test_the_kernel_reads_the_listed_pages_alone(name) -> None:
    group, head_dim, page_size, dtype, ctas, lens, more = CASES[name]
    step = selected(DecodeShape(2 * group, 2, head_dim, page_size), dtype, AttentionOptions(**more), lens)
    for hurry in (False, True):
        assert_selected(run(step, "balanced", ctas=ctas, hurry=hurry), expected(step), dtype)


@pytest.mark.parametrize("seed", range(4))
def test_random_lists(seed) -> None:
    """By one build of the kernel: few and many CTAs, lists that are equal or not."""
    rng = np.random.default_rng(seed)
    lens = tuple(rng.choice([0, 1, 16, 40, 100, 200, 300], int(rng.integers(1, 50))).tolist())
    step = selected(DecodeShape(8, 2, 64, 16), "float16", AttentionOptions(), lens, seed)
    costs = BalancedCosts(int(rng.integers(0, 9)), int(rng.integers(1, 9)), int(rng.integers(0, 3)))
    got = run(step, "balanced", ctas=int(rng.choice([1, 2, 5, 17, 40])), costs=costs)
    assert_selected(got, expected(step), "float16")


@pytest.mark.parametrize("page_size", slow_unless(lambda page_size: page_size == 16, [16, 64]))
def test_it_plans_what_pkvsim_plans(page_size) -> None:
    """Task for task, and as many of each CTA; lists are equal or not, and few or many."""
    for seed in range(12):
        rng = np.random.default_rng(seed)
        lens = rng.choice([0, 1, 200, 333, 1000], int(rng.integers(1, 60)))
        step = selected(DecodeShape(8, 2, 64, page_size), "float16", AttentionOptions(), tuple(lens.tolist()), seed)
        if seed % 3 == 0:
            step.lists.counts[:] = 3
            step.lists.pages[:, :, :3] = np.arange(3)[: step.lists.pages.shape[2]]
        costs = BalancedCosts(*(int(rng.integers(*span)) for span in ((0, 9), (1, 9), (0, 3), (0, 50))))
        ctas = int(rng.choice([1, 5, 16, 40]))
        lines, counts = run(step, "balanced", ctas=ctas, costs=costs, plan_only=True)
        wanted = list_schedule(step.lists, step.shape, step.lens, num_ctas=ctas, costs=costs)
        tasks = np.stack([wanted.tasks[name] for name in ("row", "tile_begin", "tile_end")], axis=1)
        assert lines.tolist() == tasks.tolist()
        assert counts[counts > 0].tolist() == np.diff(wanted.cta_offsets)[: np.count_nonzero(counts)].tolist()


@pytest.mark.slow
def test_the_variant_of_an_h200() -> None:
    step = selected(DecodeShape(8, 2, 128, 16), "float16", AttentionOptions(), (352, 1024, 16, 700))
    assert_selected(run(step, "balanced", variant=None, ctas=9, costs=MEASURED_COSTS), expected(step), "float16")


def test_equal_lists_and_halved_grids() -> None:
    step = make_step(DecodeShape(8, 2, 64, 16), "float16", AttentionOptions(), seed=2, lens=(320, 300))
    step.lists = PageList(aligned(np.tile(np.arange(3, 13, dtype=np.int32), (2, 2, 1))), np.full((2, 2), 10, np.int32))
    for ctas in (8, 16, 33):
        got = run(step, "balanced", ctas=ctas, costs=BalancedCosts(1, 1, 1, 100))
        assert_selected(got, expected(step), "float16")


@pytest.mark.slow
@pytest.mark.parametrize(("page_size", "more"), [(16, {"query_tokens": 2}), (32, {"soft_cap": 3.0})])
def test_the_mass_of_pages_is_a_by_product(page_size, more) -> None:
    """Of a dense step; and of a listed one, whose tiles count through the list."""
    options, shape = AttentionOptions(**more), DecodeShape(8, 2, 64, page_size)
    step = make_step(shape, "float16", options, seed=4, lens=(100, 0, 33, 290))
    table = np.where(step.table == 0x7FFFFFFF, 0, step.table)
    want = reference.page_lse(shape, step.q.astype(np.float64), step.values()[0], table, step.lens, tokens=16,
                              options=options)  # fmt: skip
    found = aligned(np.full(want.shape, -np.inf, np.float32))
    got = run(step, "balanced", ctas=5, page_lse=found)
    plain = run(step, "balanced", ctas=5)
    assert all((a == b).all() for a, b in zip(got, plain))
    seen = np.isfinite(want)
    np.testing.assert_allclose(found[seen], want[seen], atol=2e-3)
    assert (found[~seen] == -np.inf).all()

    step.lists = make_lists(shape, step.lens, 1)
    listed = aligned(np.full(want.shape, -np.inf, np.float32))
    run(step, "balanced", ctas=5, page_lse=listed)
    each = page_size // 16
    for (row, head), count in np.ndenumerate(np.minimum(step.lists.counts, (-(-step.lens // page_size))[:, None])):
        for i, place in enumerate(step.lists.pages[row, head, :count]):
            whole = want[row, head, place * each:(place + 1) * each]
            mine = listed[row, head, i * each:(i + 1) * each][: len(whole)]
            there = np.isfinite(whole)
            np.testing.assert_allclose(mine[there], whole[there], atol=2e-3)


@pytest.mark.parametrize("capability", slow_unless(lambda capability: capability == 90, [86, 90]))
@pytest.mark.parametrize(("shape", "more", "page_lse"), slow_unless_of(lambda shape, *_: shape.num_q_heads == 32, [
    (DecodeShape(32, 8, 128, 16), {}, False), (DecodeShape(4, 1, 64, 3), {"query_tokens": 4}, False),
    (DecodeShape(8, 1, 128, 16), {"kv_dtype": "int8", "kv_scales": "token", "sinks": True}, True)]))
def test_it_fits_the_registers(capability, shape, more, page_lse) -> None:
    config = kernel_config(shape, "float16", capability, options=AttentionOptions(**more))
    defines = config.selected_defines(selected=True, page_lse=page_lse)
    used = nvrtc.kernel_resources(SOURCE_DIR / "selected.cu", capability, compile_options(defines))
    assert used["pkv_decode_selected"].spills == used["pkv_decode_selected"].stack == 0
    if page_lse:
        defines["SELECTED"] = 0
        used = nvrtc.kernel_resources(SOURCE_DIR / "balanced.cu", capability, compile_options(defines))
        assert used["pkv_decode_balanced"].spills == used["pkv_decode_balanced"].stack == 0
