"""Windows, soft caps, sinks, several query tokens, V of another head_dim and NHD pages, against float64 on the CPU."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from decode_ref import MAX_ERROR, make_table, pages_of

from gpu import DecodeEngine
from pkvsim import AttentionOptions, DecodeShape, reference

SCHEDULES = ("balanced", "workqueue", "split")
LENGTHS = (0, 8, 9, 16, 17, 40, 130, 257, 1000, 3001)
OPTIONS = (
    AttentionOptions(window=1),
    AttentionOptions(window=16),
    AttentionOptions(window=100),
    AttentionOptions(window=5000),
    AttentionOptions(soft_cap=2.0),
    AttentionOptions(sinks=True),
    AttentionOptions(window=333, soft_cap=5.0, sinks=True),
    *(AttentionOptions(query_tokens=n) for n in (2, 3, 4, 8)),
    AttentionOptions(query_tokens=5, window=20, sinks=True),
    AttentionOptions(v_head_dim=64),
)


def step(shape: DecodeShape, options: AttentionOptions, dtype: str, *, layout: str = "HND", seed: int = 0):
    """(q, k_pages, v_pages, block_table, seq_lens) on the GPU; NaN wherever no row reads."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    lens = np.array(LENGTHS, np.int32)
    count = int(pages_of(lens, shape.page_size).sum()) + 4
    table = make_table(lens, shape.page_size, rng.permutation(count).astype(np.int32))
    pools = []
    for width in (shape.head_dim, options.value_dim(shape)):
        pool = torch.full(
            (count, shape.num_kv_heads, shape.page_size, width),
            float("nan"),
            dtype=getattr(torch, dtype),
            device="cuda",
        )
        for row, length in enumerate(lens):
            reach = options.reach or int(length)
            for t in range(max(0, int(length) - reach) // 16 * 16, int(length), shape.page_size):
                t = t // shape.page_size * shape.page_size
                upto = min(shape.page_size, int(length) - t)
                pool[table[row, t // shape.page_size], :, :upto] = (
                    torch.randn(shape.num_kv_heads, upto, width, device="cuda").to(pool.dtype) * 0.5
                )
        pools.append(pool if layout == "HND" else pool.transpose(1, 2).contiguous())
    tokens = () if options.query_tokens == 1 else (options.query_tokens,)
    q = torch.randn(len(lens), *tokens, shape.num_q_heads, shape.head_dim, device="cuda").to(pools[0].dtype)
    return q, *pools, torch.from_numpy(table).cuda(), torch.from_numpy(lens).cuda()


def expected(shape, options, arrays, layout="HND", **more):
    q, k, v, table, lens = arrays
    pools = [(pool if layout == "HND" else pool.transpose(1, 2)).double().nan_to_num().cpu().numpy() for pool in (k, v)]
    return reference.attention(
        shape, q.double().cpu().numpy(), *pools, table.cpu().numpy(), lens.cpu().numpy(), options=options, **more
    )


def run(engine, arrays, **more):
    q, k, v, table, lens = arrays
    engine.plan(lens, table)
    out = torch.full((*q.shape[:-1], v.shape[-1]), float("nan"), dtype=q.dtype, device="cuda")
    lse = torch.full(q.shape[:-1], float("nan"), dtype=torch.float32, device="cuda")
    engine.run(q, k, v, out=out, lse=lse, **more)
    torch.cuda.synchronize()
    return out.double().cpu().numpy(), lse.double().cpu().numpy()


def agree(got, wanted, dtype):
    assert np.abs(got[0] - wanted[0]).max() <= MAX_ERROR[dtype]  # NaN fails too
    finite = np.isfinite(wanted[1])
    assert (got[1][~finite] == -np.inf).all() and np.abs(got[1] - wanted[1])[finite].max() <= 2e-3


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
@pytest.mark.parametrize("options", OPTIONS, ids=repr)
def test_options(options: AttentionOptions, dtype: str, schedule: str) -> None:
    shape = DecodeShape(num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16)
    arrays = step(shape, options, dtype)
    sinks = torch.randn(8, device="cuda") if options.sinks else None
    more = {"sinks": sinks} if options.sinks else {}
    wanted = expected(shape, options, arrays, **({"sinks": sinks.double().cpu().numpy()} if options.sinks else {}))
    engine = DecodeEngine(shape, dtype, schedule, options=options)
    agree(run(engine, arrays, **more), wanted, dtype)


@pytest.mark.parametrize(
    "group,query_tokens,head_dim,v_head_dim",
    [
        (1, 8, 64, 64),
        (16, 8, 128, 128),
        (7, 3, 128, 128),
        (5, 4, 256, 256),
        (4, 1, 192, 128),
        (8, 2, 192, 128),
        (16, 1, 192, 128),
    ],
)
def test_shapes(group: int, query_tokens: int, head_dim: int, v_head_dim: int) -> None:
    shape = DecodeShape(num_q_heads=2 * group, num_kv_heads=2, head_dim=head_dim, page_size=16)
    options = AttentionOptions(query_tokens=query_tokens, v_head_dim=v_head_dim, window=700)
    arrays = step(shape, options, "float16")
    agree(run(DecodeEngine(shape, options=options), arrays), expected(shape, options, arrays), "float16")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ragged_query_tokens(schedule: str) -> None:
    shape, options = DecodeShape(num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16), AttentionOptions(
        query_tokens=4
    )
    arrays = step(shape, options, "float16")
    counts = np.array([1, 2, 3, 4, 1, 2, 3, 4, 1, 2], np.int32)
    wanted = expected(shape, options, arrays, query_lens=counts)
    out, lse = run(
        DecodeEngine(shape, schedule=schedule, options=options), arrays, query_lens=torch.from_numpy(counts).cuda()
    )
    live = np.arange(4)[None, :] < counts[:, None]
    agree((out[live], lse[live]), (wanted[0][live], wanted[1][live]), "float16")
    assert np.isnan(out[~live][LENGTHS[0] == 0:]).any()  # what a row does not have is left alone


@pytest.mark.parametrize("page_size", (1, 16, 64))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nhd_pages(schedule: str, page_size: int) -> None:
    shape, options = DecodeShape(num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=page_size), AttentionOptions()
    arrays = step(shape, options, "float16", layout="NHD")
    agree(
        run(DecodeEngine(shape, schedule=schedule, layout="NHD"), arrays),
        expected(shape, options, arrays, "NHD"),
        "float16",
    )


def test_strided_pages() -> None:
    """K and V as views with other strides: of one tensor, of every other page, with space between the tokens."""
    shape, options = DecodeShape(num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16), AttentionOptions()
    q, k, v, table, lens = step(shape, options, "float16")
    wide = torch.full((2 * len(k), 2, 16, 136), float("nan"), dtype=k.dtype, device="cuda")
    wide[::2, :, :, :128] = k
    both = torch.full((len(v), 3, 2, 16, 128), float("nan"), dtype=v.dtype, device="cuda")
    both[:, 1] = v
    arrays = q, wide[::2, :, :, :128], both[:, 1], table, lens
    agree(run(DecodeEngine(shape), arrays), expected(shape, options, (q, k, v, table, lens)), "float16")


def test_scale_per_run() -> None:
    shape, options = DecodeShape(num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16), AttentionOptions(
        soft_cap=3.0
    )
    arrays = step(shape, options, "float16")
    engine = DecodeEngine(shape, options=options)
    for scale in (0.05, 0.2):
        agree(run(engine, arrays, scale=scale), expected(shape, options, arrays, scale=scale), "float16")


def test_device_plan_with_a_window() -> None:
    from pkvsim import make_schedule

    shape = DecodeShape(num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16)
    engine = DecodeEngine(shape, options=AttentionOptions(window=500, query_tokens=3))
    lens = torch.tensor(LENGTHS, dtype=torch.int32, device="cuda")
    engine.plan(lens, torch.zeros((len(LENGTHS), 188), dtype=torch.int32, device="cuda"))
    planned = engine.schedule_engine
    tasks, offsets = planned.device_tasks()
    wanted = make_schedule(
        "balanced",
        shape,
        LENGTHS,
        num_ctas=planned.num_ctas,
        costs=planned.costs,
        tile_tokens=16,
        window=502,
    )
    np.testing.assert_array_equal(tasks, wanted.tasks)
    np.testing.assert_array_equal(offsets, wanted.cta_offsets)


def test_what_is_not_on_the_gpu_is_refused_after_a_step_without_it() -> None:
    shape, options = DecodeShape(num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16), AttentionOptions(
        query_tokens=2
    )
    arrays = step(shape, options, "float16")
    engine = DecodeEngine(shape, options=options)
    run(engine, arrays)
    for counts in (np.ones(len(LENGTHS), np.int32), torch.ones(len(LENGTHS), dtype=torch.int32), [1] * len(LENGTHS)):
        with pytest.raises(ValueError, match="^query_lens"):
            run(engine, arrays, query_lens=counts)
    run(engine, arrays)


@pytest.mark.parametrize(
    "options,more,named",
    [
        (AttentionOptions(), {"sinks": True}, "sinks"),
        (AttentionOptions(sinks=True), {}, "sinks"),
        (AttentionOptions(), {"query_lens": True}, "query_lens"),
    ],
)
def test_what_the_options_do_not_say_is_refused(options, more, named) -> None:
    shape = DecodeShape(num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16)
    arrays = step(shape, options, "float16")
    given = {
        "sinks": torch.zeros(8, device="cuda"),
        "query_lens": torch.ones(len(LENGTHS), dtype=torch.int32, device="cuda"),
    }
    engine = DecodeEngine(shape, options=options)
    with pytest.raises(ValueError, match=named):
        run(engine, arrays, **{name: given[name] for name in more})
