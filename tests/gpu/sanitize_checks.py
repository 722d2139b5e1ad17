"""What tests.gpu.sanitize runs: one small checked step of every schedule, option, layout, type of cache and append."""
from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("support", "gpu/engine")]

from pkvsim import AttentionOptions, DecodeShape  # noqa: E402
from pkvsim.kv_types import KV_DTYPES, KV_SCALES  # noqa: E402
from pkvsim.selection.by_name import BY_SUMMARIES  # noqa: E402

SHAPE = DecodeShape(num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16)
LENS = (0, 1, 700, 33, 2100)
SCHEDULES = ("balanced", "workqueue", "split")
OPTIONS = {
    "window": AttentionOptions(window=100), "window of one token": AttentionOptions(window=1),
    "soft cap": AttentionOptions(soft_cap=5.0), "sinks": AttentionOptions(sinks=True),
    "window, soft cap and sinks": AttentionOptions(window=333, soft_cap=5.0, sinks=True),
    **{f"{n} query tokens": AttentionOptions(query_tokens=n) for n in (2, 4, 8)},
    "query tokens under a window": AttentionOptions(query_tokens=5, window=20),
}
FORMS = ("block table", "csr and lengths", "csr and last pages")
# Lists, and the masses of pages: one kernel variant of each width, type and kind of team.
SELECTED = {
    "selected": {}, "selected, page size 1": {"page_size": 1, "head_dim": 64}, "selected, head_dim 256": {"head_dim": 256},
    "selected, 2 query tokens": {"query_tokens": 2}, "selected, sinks": {"sinks": True},
    "selected, int8 by token": {"kv_dtype": "int8", "kv_scales": "token"},
}
PAGE_LSE = {"page_lse": {}, "page_lse, page size 64": {"page_size": 64}, "page_lse, 2 query tokens": {"query_tokens": 2}}
APPEND_TYPES = (None, *KV_DTYPES)
APPEND_ROPES = (None, "half", "interleaved")


def plain(schedule: str, page_size: int = 16, head_dim: int = 128) -> None:
    from decode_ref import check, make_case, run_poisoned

    from gpu import DecodeEngine

    shape = DecodeShape(SHAPE.num_q_heads, SHAPE.num_kv_heads, head_dim, page_size)
    case = make_case(shape, LENS, seed=1)
    engine = DecodeEngine(shape, schedule=schedule, splits=4)
    engine.plan(case.seq_lens, case.block_table)
    for _ in range(2):  # the workspace is left clean
        check(*run_poisoned(engine, case), case, dtype="float16")


def with_options(
    options: AttentionOptions, schedule: str = "balanced", *, head_dim: int = 128, layout: str = "HND"
) -> None:
    import torch
    from test_gpu_options import agree, expected, run, step

    from gpu import DecodeEngine

    shape = DecodeShape(SHAPE.num_q_heads, SHAPE.num_kv_heads, head_dim, 16)
    arrays = step(shape, options, "float16", layout=layout)
    sinks = torch.randn(SHAPE.num_q_heads, device="cuda") if options.sinks else None
    given = {"sinks": sinks} if options.sinks else {}
    wanted = {"sinks": sinks.double().cpu().numpy()} if options.sinks else {}
    engine = DecodeEngine(shape, schedule=schedule, options=options, layout=layout, splits=4)
    agree(run(engine, arrays, **given), expected(shape, options, arrays, layout, **wanted), "float16")


def with_tables(form: str, ids: str, page_size: int = 16) -> None:
    import torch
    from decode_ref import check, make_case, run_poisoned
    from test_gpu_layouts import tables

    from gpu import DecodeEngine

    shape = DecodeShape(SHAPE.num_q_heads, SHAPE.num_kv_heads, SHAPE.head_dim, page_size)
    case = make_case(shape, LENS, seed=2)
    for schedule in SCHEDULES[:2]:
        engine = DecodeEngine(shape, schedule=schedule, splits=4)
        engine.plan(**tables(case, form, getattr(torch, ids)))
        check(*run_poisoned(engine, case), case, dtype="float16")


def with_cache(kv_dtype: str, kv_scales: str) -> None:
    import test_gpu_kv_types as kv_types
    from decode_ref import check

    from gpu import DecodeEngine

    options = AttentionOptions(kv_dtype=kv_dtype, kv_scales=kv_scales)
    step = kv_types.make_quantised(SHAPE, LENS, options, seed=1)
    check(*kv_types.run(DecodeEngine(SHAPE, options=options), step), step.case(), dtype="float16")


def grouped(groups: str, head_dim: int = 128, group: int = 4) -> None:
    """Rows that read together: told or found, among rows that do not."""
    import numpy as np
    from decode_ref import check, run_poisoned
    from shared_steps import make_shared_case

    from gpu import DecodeEngine
    from pkvsim.schedule.groups import PrefixGroups
    from pkvsim.schedule.prefixes import SharingRule

    given = PrefixGroups([0, 0, -1, 1, 0, 1, 0, 0], [40, 3])
    lens = np.array([700, 640, 300, 50, 650, 48, 1, 900], np.int32)
    shape = DecodeShape(2 * group, 2, head_dim, 16)
    case = make_shared_case(shape, lens, given, seed=3)
    engine = DecodeEngine(shape, sharing_rule=SharingRule(0, 0))
    for _ in range(2):
        engine.plan(case.seq_lens, case.block_table, groups="auto" if groups == "found" else given)
        check(*run_poisoned(engine, case), case, dtype="float16")


def grouped_replays() -> None:
    """A captured step whose groups are found at each replay, and change between them."""
    import numpy as np
    import torch
    from decode_ref import check
    from shared_steps import make_shared_case

    from gpu import DecodeEngine
    from gpu.measure.timing import capture, shared_stream
    from pkvsim.schedule.groups import PrefixGroups
    from pkvsim.schedule.prefixes import SharingRule

    lens = np.array([700, 640, 300, 650], np.int32)
    cases = [make_shared_case(SHAPE, lens, PrefixGroups(groups, [18, 40]), seed=4)
             for groups in ([0, 0, 0, 0], [1, 1, -1, 1], [-1, -1, -1, -1])]
    names = "q", "k_pages", "v_pages", "block_table"
    q, k_pages, v_pages, table = static = [getattr(cases[0], name).clone() for name in names]
    engine, seq_lens = DecodeEngine(SHAPE, sharing_rule=SharingRule(0, 0)), cases[0].seq_lens
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device="cuda")

    def step() -> None:
        engine.plan(seq_lens, table, groups="auto")
        engine.run(q, k_pages, v_pages, out=out, lse=lse)

    with shared_stream():
        step()
        graph = capture(step)
        for case in cases[::-1]:
            for array, name in zip(static, names):
                array.copy_(getattr(case, name))
            graph.replay()
            torch.cuda.synchronize()
            check(out, lse, case, dtype="float16")


def listed_case(
    page_size: int = 16, head_dim: int = 128, **options: object
) -> tuple[DecodeShape, str, AttentionOptions, tuple[int, ...]]:
    """(shape, dtype, options, lengths) of a step of SELECTED or PAGE_LSE. Rows have their query tokens, which count in a
    length, or nothing at all: one that saw no token would get NaN, which is not equal to itself."""
    attention = AttentionOptions(**options)
    lens = tuple(length and max(length, attention.query_tokens) for length in LENS)
    return DecodeShape(SHAPE.num_q_heads, SHAPE.num_kv_heads, head_dim, page_size), "float16", attention, lens


def selected(**case: object) -> None:
    """Ragged lists, some of them empty, among rows that are."""
    from selected_cases import GpuStep, assert_selected

    step = GpuStep(*listed_case(**case), seed=1)
    for _ in range(2):  # the workspace is left clean
        assert_selected(step.run(selected=step.lists), step.expected(), "float16")


def with_page_lse(**case: object) -> None:
    """The masses of a dense step's pages and of a listed one's, whose results stay what they were: a dense step's to the
    bit, since CTAs, costs and variant are the same and so is the plan."""
    import torch
    from selected_cases import GpuStep, assert_selected

    shape, _, _, lens = arguments = listed_case(**case)
    step = GpuStep(*arguments, seed=2)
    inner = (shape.group_size,) if step.q.dim() == 3 else (step.q.shape[1], shape.group_size)
    for lists in (None, step.lists):
        tiles = -(-max(lens) // 16) if lists is None else lists.pages.shape[2] * (shape.page_size // 16)
        masses = torch.full((len(lens), shape.num_kv_heads, tiles, *inner), float("-inf"), device="cuda")
        found = step.run(selected=lists, page_lse=masses)
        if lists is None:
            assert all((a == b).all() for a, b in zip(found, step.run(selected=None)))
        else:
            assert_selected(found, step.expected(), "float16")
        assert bool((masses > float("-inf")).any()) and not bool(masses.isnan().any())


def summarized(kind: str, layout: str) -> None:
    """Summaries of whole rows, then of the pages that new tokens touched."""
    import numpy as np
    from test_gpu_page_selection import Pool

    from gpu import PageSummaries
    from pkvsim.selection import centroids
    from pkvsim.selection.summaries import row_summaries

    pool = Pool(SHAPE, "float16", LENS, seed=3)
    pages = pool.k if layout == "HND" else pool.k.transpose(1, 2).contiguous()
    summaries = PageSummaries(SHAPE, pages, kind=kind, layout=layout)
    for new_tokens in (None, 20):
        summaries.update(pages, *pool.on_gpu, new_tokens=new_tokens)
    for row in (2, 4):
        ids = pool.table[row, : -(-int(pool.lens[row]) // SHAPE.page_size)].astype(np.int64)
        got = summaries.array[ids, 1].cpu().numpy()
        if kind == centroids.CENTROIDS:
            coded = centroids.encode(centroids.row_centroids(pool.keys(row, 1), SHAPE.page_size))
            assert (got != coded.codes).mean() <= 0.02  # where the last bit of a quotient decides
            continue
        want = row_summaries(pool.keys(row, 1), SHAPE.page_size, kind)
        np.testing.assert_allclose(got, want, atol=4e-3, rtol=2e-3)


def selecting(method: str | None, head_dim: int = 128) -> None:
    """A step's lists by summaries or given scores, of short rows and of one that several CTAs score."""
    import torch
    from test_gpu_page_selection import Pool

    from gpu import PageSelector, PageSummaries

    shape = DecodeShape(SHAPE.num_q_heads, SHAPE.num_kv_heads, head_dim, 16)
    pool = Pool(shape, "float16", (*LENS, 20000), seed=4)
    selector = PageSelector(shape, "float16", method)
    selector.plan(*pool.on_gpu)
    if method is None:
        scores = torch.rand(len(pool.lens), shape.num_kv_heads, pool.table.shape[1], device="cuda")
        given, more = (None,), {"scores": scores}
    else:
        summaries = PageSummaries(shape, pool.k, kind=selector.summary)
        summaries.update(pool.k, *pool.on_gpu)
        given, more = (pool.q, summaries), {}
    for _ in range(2):  # tickets are left clean
        pages, counts = (array.cpu().numpy() for array in selector.select(*given, **more))
        for row, length in enumerate(pool.lens.tolist()):
            count = selector.budget.pages(-(-length // 16), selector.pins)
            assert (counts[row] == count).all()
            assert (pages[row, :, 1:count] > pages[row, :, : max(0, count - 1)]).all()


def evicting(per_head: bool) -> None:
    """Selection, eviction and growth in turn, of whole pages or of pages of one head."""
    from evicting_rows import EvictingRows

    pool = EvictingRows(per_head=per_head, layers=2 if per_head else 1)
    pool.begin()
    for row, count in enumerate((100, 70)):
        pool.open(row)
        pool.grow(row, count, seed=row)
    for turn in range(3):
        pool.select(seed=turn, evict=turn % 2)
        pool.evict(turn % 2, "h2o", seed=turn)
        pool.grow(turn % 2, 30, seed=turn)
        pool.decode(seed=turn)


def flash_attention() -> None:
    """New tokens rotated, written and attended by FlashAttention's function, among rows that are none."""
    import torch

    from gpu.flash_attn import flash_attn_with_kvcache

    torch.manual_seed(0)
    lens = torch.tensor([-1, 0, 5, 300], dtype=torch.int32, device="cuda")
    table = torch.tensor([[-1, -1], [3, -1], [0, -1], [2, 1]], dtype=torch.int32, device="cuda")
    k_cache, v_cache = torch.randn(2, 4, 256, 2, 128, device="cuda").half()
    q, (k, v) = torch.randn(4, 1, 8, 128, device="cuda").half(), torch.randn(2, 4, 1, 2, 128, device="cuda").half()
    angles = torch.outer(torch.arange(512.0), 1e4 ** -torch.arange(32.0).div(32)).cuda()
    out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, angles.cos(), angles.sin(), lens, block_table=table)
    assert not out[0].any() and out[1:].isfinite().all()
    torch.testing.assert_close(out[1, 0], v[1, 0].repeat_interleave(4, 0))  # of one token


def over_ranks(ranks: int, owner: str) -> None:
    """Ranks that share the GPU: rows that some have nothing of, steps that use each half of the inboxes twice."""
    from decode_ref import check, make_case
    from several_ranks import RankArrays

    from gpu.several import DeviceGroup, ShardedDecode

    # The sanitizer slows every rank down, and none of them is lost.
    engine = ShardedDecode(SHAPE, group=DeviceGroup([0] * ranks), owner=owner, max_batch=len(LENS), timeout_s=600)
    arrays = RankArrays(engine, make_case(SHAPE, LENS, seed=5))
    arrays.plan(validate=True)
    for _ in range(4):
        arrays.poison()
        check(*arrays.run(), arrays.case, dtype="float16")


def append(kv_dtype: str | None, style: str | None) -> None:
    from append_ref import assert_same_bits, expected, make_step, rope_of

    from gpu import CacheWriter

    for seed, (dims, layout, ragged) in enumerate(
        (((128, 128, 128, 8, 2, 16), "HND", True), ((192, 128, 64, 8, 2, 3), "NHD", False))
    ):
        step = make_step(dims, kv_dtype=kv_dtype, layout=layout, ragged=ragged, seed=seed)
        want = expected(step, rope_of(style, dims[2], on_gpu=False), layout)
        writer = CacheWriter(
            step.shape, kv_dtype=kv_dtype, layout=layout, head_dim_v=dims[1], rope=rope_of(style, dims[2], on_gpu=True)
        )
        writer.append(
            step.k_new,
            step.v_new,
            step.k_pages,
            step.v_pages,
            q=step.q if style else None,
            **step.where(),
            **step.options,
        )
        assert_same_bits(step, step.q, want)


def checks() -> dict[str, Callable[[], None]]:
    """Every check by its name; those of appends begin with "append"."""
    found: dict[str, Callable[[], None]] = {schedule: partial(plain, schedule) for schedule in SCHEDULES}
    found |= {f"page size {size}": partial(plain, "balanced", size) for size in (1, 3, 256)}
    found |= {f"head_dim {dim}": partial(plain, "balanced", 16, dim) for dim in (64, 256)}
    found |= {name: partial(with_options, options) for name, options in OPTIONS.items()}
    found |= {f"window, {schedule}": partial(with_options, OPTIONS["window"], schedule) for schedule in SCHEDULES[1:]}
    found["head_dim 192/128"] = partial(with_options, AttentionOptions(v_head_dim=128), head_dim=192)
    found["NHD"] = partial(with_options, AttentionOptions(), layout="NHD")
    found |= {form if ids == "int32" else f"{form}, {ids}": partial(with_tables, form, ids)
              for form in FORMS for ids in ("int32", "int64")}
    found["csr and last pages, page size 1"] = partial(with_tables, FORMS[2], "int64", 1)
    found |= {f"groups {how}": partial(grouped, how) for how in ("told", "found")}
    found |= {f"{ranks} ranks, by {owner}": partial(over_ranks, ranks, owner)
              for ranks, owner in ((2, "head"), (3, "row"), (2, "all"))}
    found["groups found in a graph"] = partial(grouped_replays)
    found |= {name: partial(selected, **options) for name, options in SELECTED.items()}
    found |= {name: partial(with_page_lse, **options) for name, options in PAGE_LSE.items()}
    found |= {f"summaries {kind} {layout}": partial(summarized, kind, layout)
              for kind, layout in (("mean_std", "HND"), ("min_max", "NHD"), ("centroids", "NHD"))}
    found |= {f"select by {method or 'given scores'}": partial(selecting, method)
              for method in (*BY_SUMMARIES, None)}
    found["select by mean_std, head_dim 64"] = partial(selecting, "mean_std", 64)
    found |= {f"evict {what}": partial(evicting, what == "heads") for what in ("pages", "heads")}
    found["flash_attn_with_kvcache"] = partial(flash_attention)
    found["groups told, head_dim 64"] = partial(grouped, "told", 64, 8)
    found |= {f"{kv_dtype} by {kv_scales}": partial(with_cache, kv_dtype, kv_scales)
              for kv_dtype in KV_DTYPES for kv_scales in KV_SCALES}
    found |= {" ".join(filter(None, ("append", kv_dtype or "float16", style))): partial(append, kv_dtype, style)
              for kv_dtype in APPEND_TYPES for style in APPEND_ROPES}
    return found
