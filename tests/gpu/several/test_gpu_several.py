"""Decode over several ranks on one GPU, each with its part of the SMs: results, repeats, graphs, delays, lost ranks."""
from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch
from decode_ref import Case, check, make_case
from delayed_ranks import run_delayed_steps
from quantised_ref import make_quantised
from several_ranks import RankArrays

from gpu import DecodeEngine
from gpu.measure.timing import capture
from gpu.several import DeviceGroup, RankLost, ShardedDecode
from gpu.several.inbox import EMPTY_WORD, HEAD_BYTES
from pkvsim import AttentionOptions, DecodeShape
from pkvsim.schedule.shares import PageShares, in_proportion, in_runs, interleaved

EDGES = (0, 1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 129, 257, 0, 1000, 2049)
# dtype and head_dim meet every count of ranks; owners, group and page sizes take turns.
VARIANTS = [(dtype, head_dim, ranks, ("head", "row", "all")[index % 3], (4, 1, 8)[index // 2 % 3],
             (16, 64, 1)[index % 3])
            for index, (dtype, head_dim, ranks) in enumerate(itertools.product(("float16", "bfloat16"), (64, 128, 256),
                                                                               (2, 3, 4)))]
PATIENT_S = 30.0  # where no rank is lost, however busy the machine is


def shape_of(head_dim: int = 128, group: int = 4, page: int = 16, *, kv_heads: int = 4) -> DecodeShape:
    return DecodeShape(group * kv_heads, kv_heads, head_dim, page)


def left_empty(engine: ShardedDecode) -> None:
    """Every slot of every inbox is empty after a step, and nobody has failed."""
    for one in engine.engines.values():
        (box,) = one._inboxes.kept
        assert bool((box[HEAD_BYTES:] == 0xFF).all())
        slots = one.config.kernel.slots_bytes(one.num_ctas)
        assert bool((one._workspace[:slots] == 0xFF).all()) and int(one._failure[0]) == EMPTY_WORD


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v)))
def test_the_grid_of_shapes(variant: tuple) -> None:
    dtype, head_dim, ranks, owner, group, page = variant
    shape = shape_of(head_dim, group, page)
    engine = ShardedDecode(shape, dtype, group=DeviceGroup([0] * ranks), owner=owner, max_batch=20, timeout_s=PATIENT_S)
    for seed, lens in enumerate((EDGES, (9000, 3, 700), (5,), (0, 0), (1500,) * 20)):
        arrays = RankArrays(engine, make_case(shape, lens, dtype=dtype, seed=seed))
        arrays.plan(validate=True)
        first = arrays.run()
        check(*first, arrays.case, dtype=dtype)
        arrays.poison()
        again = arrays.run()
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    left_empty(engine)


SHARES = {
    "runs": in_runs(3, 16, max_tokens=4096),
    "70:20:10": in_proportion((7, 2, 1), 16, cycle_pages=10),
    "one rank has nothing": PageShares(16, (1, 0, 2)),
    "one rank has all": PageShares(16, (0, 1, 0)),
    "four pages in turn": interleaved(3, 16, pages=4),
}


@pytest.mark.parametrize("name", SHARES)
def test_shares(name: str) -> None:
    shape = shape_of()
    engine = ShardedDecode(shape, group=DeviceGroup([0] * 3), shares=SHARES[name], max_batch=16, owner="row",
                           timeout_s=PATIENT_S)
    arrays = RankArrays(engine, make_case(shape, (4000, 1, 0, 37, 1365, 1366, 2731, 16, 90), seed=5))
    arrays.plan(validate=True)
    check(*arrays.run(), arrays.case, dtype="float16")
    left_empty(engine)


@pytest.mark.parametrize("options", [
    AttentionOptions(sinks=True), AttentionOptions(soft_cap=5.0), AttentionOptions(v_head_dim=64),
    AttentionOptions(kv_dtype="float8_e4m3fn", kv_scales="tensor"), AttentionOptions(kv_dtype="int8", kv_scales="token"),
    AttentionOptions(kv_dtype="float8_e5m2", kv_scales="page", sinks=True),
], ids=repr)
def test_options_as_one_engine_has_them(options: AttentionOptions) -> None:
    shape, lens = shape_of(), (0, 8, 17, 40, 130, 257, 1000, 3001)
    extra = {"sinks": torch.randn(shape.num_q_heads, device="cuda")} if options.sinks else {}
    if options.kv_dtype is not None:
        step = make_quantised(shape, lens, options)
        case = Case(shape, step.q, step.k, step.v, step.block_table, step.seq_lens)
        extra |= {"k_scale": step.k_scale, "v_scale": step.v_scale}
    else:
        case = make_case(shape, lens, seed=2)
        case = Case(shape, case.q, case.k_pages, case.v_pages[..., :options.value_dim(shape)].contiguous(),
                    case.block_table, case.seq_lens)
    one = DecodeEngine(shape, options=options)
    one.plan(case.seq_lens, case.block_table)
    want, want_lse = one.run(case.q, case.k_pages, case.v_pages, **extra)
    arrays = RankArrays(ShardedDecode(shape, group=DeviceGroup([0, 0]), options=options, max_batch=8, timeout_s=PATIENT_S),
                        case, extra=extra)
    arrays.plan()
    out, lse = arrays.run()
    assert float((out.float() - want.float()).abs().max()) <= 2e-3
    seen = want_lse.isfinite()
    assert float((lse - want_lse)[seen].abs().max()) <= 1e-3 and bool((lse[~seen] == want_lse[~seen]).all())


@pytest.mark.parametrize(("ranks", "owner", "overlap"), [(2, "head", None), (3, "row", None), (2, "all", True),
                                                         (3, "head", True)])
def test_captured_steps_follow_lengths_and_tables(ranks: int, owner: str, overlap: bool | None) -> None:
    """500 replays of three captured layers each; lengths and tables change in place between them."""
    shape, rng = shape_of(), np.random.default_rng(7)
    cases = [make_case(shape, rng.integers(0, 2500, 6), seed=seed, num_pages=1200) for seed in range(4)]
    width = max(case.block_table.shape[1] for case in cases)
    engine = ShardedDecode(shape, group=DeviceGroup([0] * ranks), owner=owner, max_batch=6, timeout_s=PATIENT_S,
                           overlap=overlap)
    steps = []
    for case in cases:
        table = torch.nn.functional.pad(case.block_table, (0, width - case.block_table.shape[1]))
        steps.append(RankArrays(engine, Case(shape, case.q, case.k_pages, case.v_pages, table, case.seq_lens)))
    live = RankArrays(engine, steps[0].case)
    live.plan()
    live.run()
    graphs = {}
    for rank in range(ranks):
        with engine.group.use(rank):
            graphs[rank] = capture(lambda rank=rank: [live.launch(rank) for _ in range(3)])
    wanted: dict[int, tuple] = {}
    for replay in range(500):
        which = int(rng.integers(len(steps)))
        step = steps[which]
        for rank in range(ranks):
            with engine.group.use(rank):
                for name in ("lens", "tables", "q", "k", "v"):
                    getattr(live, name)[rank].copy_(getattr(step, name)[rank])
                live.out[rank].fill_(float("nan")), live.lse[rank].fill_(float("nan"))
                graphs[rank].replay()
        if replay % 10 == 0 or replay > 480:
            engine.synchronize()
            found = live.together()
            if which not in wanted:
                check(*found, step.case, dtype="float16")
                wanted[which] = found
            assert all(torch.equal(a, b) for a, b in zip(found, wanted[which]))
    engine.synchronize()
    left_empty(engine)


@pytest.mark.parametrize("overlap", [None, True])
@pytest.mark.parametrize("owner", ["head", "row"])
def test_a_rank_that_is_late_at_random(owner: str, overlap: bool | None) -> None:
    """By the row, one rank owns nothing of one row: it is held back by its peer's progress alone."""
    shape, rng = shape_of(64, 4), np.random.default_rng(11)
    engine = ShardedDecode(shape, group=DeviceGroup([0, 0]), owner=owner, max_batch=1, timeout_s=PATIENT_S,
                           overlap=overlap)
    arrays = RankArrays(engine, make_case(shape, (700,), seed=1))
    arrays.plan()
    run_delayed_steps(arrays, [(700,), (16,), (500,), (0,), (311,)], rng)
    left_empty(engine)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_stops_ends_the_others(lost: int) -> None:
    shape = shape_of()
    engine = ShardedDecode(shape, group=DeviceGroup([0, 0, 0]), max_batch=4, timeout_s=0.4)
    arrays = RankArrays(engine, make_case(shape, (900, 20), seed=3))
    arrays.plan()
    want = arrays.run()
    begin = time.perf_counter()
    for _ in range(3):  # what was queued behind the step that fails ends at once
        for rank in set(range(3)) - {lost}:
            with engine.group.use(rank):
                arrays.launch(rank)
    with pytest.raises(RankLost, match=f"rank {lost} did not do its part of a step within 0.4 s"):
        engine.synchronize()
    torch.cuda.synchronize()
    assert 0.4 <= time.perf_counter() - begin < 1.5
    with engine.group.use(lost):
        arrays.launch(lost)  # it comes after all, and computes nothing
    torch.cuda.synchronize()
    with pytest.raises(RankLost, match=f"rank {lost}: this rank did not do its part"):
        engine.engines[lost].check()
    with pytest.raises(RankLost):
        arrays.run()
    engine.reset()
    arrays.poison()
    found = arrays.run()
    assert all(torch.equal(a, b) for a, b in zip(found, want))


def test_states_that_the_host_exchanges_merge_to_the_same_bits() -> None:
    """The collective's way without a collective: every rank's states are copied to the others by hand."""
    class ByHand(DeviceGroup):
        in_kernel = False
        engines: dict = {}  # noqa: RUF012

        def inboxes(self, num_bytes):
            from gpu.several.group import Inboxes

            return {rank: Inboxes(one.own, (one.own,) * self.num_ranks, one.kept)
                    for rank, one in super().inboxes(num_bytes).items()}

        def exchange(self, rank, sent, received, counts):
            sizes = [0] * self.num_ranks if counts is None else counts[0]
            begin, size = sum(sizes[:rank]), sent.numel() if counts is None else sizes[rank]
            for source, part in enumerate(received.view(self.num_ranks, -1)):
                part.copy_(self.engines[source]._left[begin:begin + size])

    shape = shape_of()
    case = make_case(shape, EDGES, seed=9)
    for ranks, owner in ((2, "head"), (3, "row"), (3, "all")):
        found = []
        for kind in (DeviceGroup, ByHand):
            group = kind([0] * ranks)
            engine = ShardedDecode(shape, group=group, owner=owner, max_batch=len(EDGES), timeout_s=PATIENT_S)
            group.engines = engine.engines
            arrays = RankArrays(engine, case)
            arrays.plan()
            arrays.step()  # by hand, a rank finds the others' states of the step before
            arrays.poison()
            found.append(arrays.run())
        check(*found[0], case, dtype="float16")
        assert all(torch.equal(a, b) for a, b in zip(*found))
