"""ShardedDecode's host side on a fake GPU: every rank's kernel gets what it needs to compute its part of a step."""
from __future__ import annotations

import itertools
import types
from dataclasses import dataclass, field

import numpy as np
import pytest
from fake_gpu import decode, memory
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu.kernels import fields
from gpu.several import inbox
from pkvsim import AttentionOptions, DecodeShape, reference
from pkvsim.schedule.shares import RankShare, in_proportion, in_runs, interleaved

SHAPE = DecodeShape(8, 4, 64, 16)


@dataclass
class Wire:
    """What fake kernels have sent, by the address of the inbox; the last rank's launch merges all."""

    num_ranks: int
    sent: dict[int, tuple] = field(default_factory=dict)
    lost: bool = False


class SeveralKernel:
    """pkv_decode_several in float64."""

    def __init__(self, wire: Wire, defines: dict, given_names: tuple[str, ...]) -> None:
        self.wire, self.defines, self.names = wire, defines, given_names

    def __call__(self, grid: int, args: tuple, stream: int, pairs: bool = False) -> None:
        values = types.SimpleNamespace(**dict(zip(self.names, args, strict=True)))
        letters = fields.signature("pkv_decode_several", self.defines).replace("[", "").replace("]", "")
        for name, letter in zip(fields.names("pkv_decode_several", self.defines), letters, strict=True):
            assert isinstance(getattr(values, name), float if letter == "f" else (int, np.integer)), name
        if self.wire.lost:
            memory(values.failure, np.uint32, (1,))[0] = 1 - values.rank
            return
        batch, q_heads = values.batch_size, values.num_kv_heads * self.defines["GROUP_SIZE"]
        lens = memory(values.lengths, np.int32, (batch,))
        local = RankShare(values.share_begin, values.share_tokens, values.share_cycle).of(lens).astype(np.int32)
        out = np.zeros((batch, q_heads, self.defines["V_DIM"]), np.float16)
        lse = np.zeros((batch, q_heads), np.float32)
        alone = types.SimpleNamespace(**vars(values) | {
            "lengths": local.ctypes.data, "out": out.ctypes.data, "lse": lse.ctypes.data})
        decode(self.defines | {"SINKS": 0}, alone, tasks=False)
        reached = memory(values.inboxes, np.int64, (self.wire.num_ranks,))
        assert reached[values.rank] == values.own and values.in_kernel == 1
        self.wire.sent[int(values.own)] = out, lse, values
        if len(self.wire.sent) == self.wire.num_ranks:
            self.merge([self.wire.sent.pop(int(at)) for at in reached])

    def merge(self, sent: list[tuple]) -> None:
        lses = np.stack([lse for _, lse, _ in sent]).astype(np.float64)
        with np.errstate(all="ignore"):
            whole = np.logaddexp.reduce(lses, axis=0)
            out = sum(np.exp(lse - whole)[..., None] * one.astype(np.float64) for (one, *_), lse in zip(sent, lses))
        out = np.where(np.isfinite(whole)[..., None], out, 0)
        owner = {number: name for name, number in inbox.OWNERS.items()}[sent[0][2].owner]
        batch, q_heads, _ = out.shape
        group = self.defines["GROUP_SIZE"]
        for rank, (_, _, values) in enumerate(sent):
            rows, heads = inbox.owned(owner, rank, num_ranks=len(sent), batch_size=batch, num_kv_heads=q_heads // group)
            part = slice(rows.start, rows.stop), slice(heads.start * group, heads.stop * group)
            memory(values.out, np.float16, out.shape)[part] = out[part]
            memory(values.lse, np.float32, whole.shape)[part] = whole[part]


def make(gpu, num_ranks: int, **more):
    import gpu.several.rank_engine as rank_engine
    from gpu.several.one_process import DeviceGroup
    from gpu.several.sharded_decode import ShardedDecode

    wire = Wire(num_ranks)
    rank_engine.load_kernel = lambda file, name, defines, *, given=None, **launch: SeveralKernel(wire, defines, given)
    options = more.pop("options", AttentionOptions())
    return ShardedDecode(SHAPE, group=DeviceGroup([0] * num_ranks), max_batch=8, options=options, **more), wire


def shares_of(kind: str, num_ranks: int):
    if kind == "runs":
        return in_runs(num_ranks, 16, max_tokens=200)
    if kind == "unlike":
        return in_proportion([1, *range(num_ranks - 1, 0, -1)], 16, cycle_pages=6)
    return interleaved(num_ranks, 16, pages=2)


@settings(max_examples=30, deadline=None)
@given(num_ranks=st.integers(2, 4), owner=st.sampled_from(sorted(inbox.OWNERS)),
       kind=st.sampled_from(["interleaved", "runs", "unlike"]), host=st.booleans(), int64=st.booleans(),
       lens=st.lists(st.integers(0, 200), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_ranks_together_compute_the_step(gpu, num_ranks, owner, kind, host, int64, lens, seed) -> None:
    shares = shares_of(kind, num_ranks)
    engine, _ = make(gpu, num_ranks, owner=owner, shares=shares)
    rng, lens = np.random.default_rng(seed), np.array(lens, np.int32)
    pages = 13  # of a row
    table = rng.permutation(len(lens) * pages).astype(np.int32).reshape(len(lens), pages)
    of, place = shares.place(np.arange(pages))
    pools = [rng.standard_normal((len(lens) * pages, 4, 16, 64)).astype(np.float16) for _ in range(2)]
    q = rng.standard_normal((len(lens), 8, 64)).astype(np.float16)
    locals_ = []
    for rank in range(num_ranks):
        local = np.full((len(lens), max(1, int((of == rank).sum()))), 0x7FFFFFFF, np.int64 if int64 else np.int32)
        local[:, place[of == rank]] = table[:, of == rank]
        locals_.append(local if host else gpu.array(local))
    outs = [gpu.array(np.full(q.shape, np.nan, np.float16)) for _ in range(num_ranks)]
    lses = [gpu.array(np.full(q.shape[:2], np.nan, np.float32)) for _ in range(num_ranks)]
    engine.plan([lens if host else gpu.array(lens)] * num_ranks, locals_, validate=bool(seed % 2))
    k, v = (gpu.array(pool) for pool in pools)
    for _ in range(2):
        engine.run([gpu.array(q)] * num_ranks, [k] * num_ranks, [v] * num_ranks, out=outs, lse=lses)
        wanted, wanted_lse = reference.attention(SHAPE, q.astype(np.float64), *(p.astype(np.float64) for p in pools),
                                                 table, lens)
        for rank in range(num_ranks):
            rows, heads = engine.owned(rank, len(lens))
            part = slice(rows.start, rows.stop), slice(heads.start, heads.stop)
            np.testing.assert_allclose(outs[rank].host[part].astype(np.float64), wanted[part], atol=4e-3)
            np.testing.assert_allclose(lses[rank].host[part], wanted_lse[part], atol=1e-3)
        engine.synchronize()


def test_a_lost_rank_is_an_error_until_the_group_is_reset(gpu) -> None:
    from gpu.several.rank_engine import RankLost

    engine, wire = make(gpu, 2, timeout_s=0.5)
    lens, table = np.array([20], np.int32), np.array([[0]], np.int32)
    pool, q = gpu.array(np.zeros((2, 4, 16, 64), np.float16)), gpu.array(np.zeros((1, 8, 64), np.float16))
    arguments = [q, q], [pool, pool], [pool, pool]
    engine.plan([lens, lens], [table, table])
    engine.run(*arguments)
    wire.lost = True
    engine.run(*arguments)
    with pytest.raises(RankLost, match=r"rank 0: rank 1 did not do its part of a step within 0.5 s"):
        engine.run(*arguments)
    with pytest.raises(RankLost):
        engine.synchronize()
    engine.reset()
    wire.lost = False
    engine.run(*arguments)


def test_no_rank_is_launched_where_an_argument_of_another_is_refused(gpu) -> None:
    engine, wire = make(gpu, 2)
    lens, table = np.array([20], np.int32), np.array([[0]], np.int32)
    pool, q = gpu.array(np.zeros((2, 4, 16, 64), np.float16)), gpu.array(np.zeros((1, 8, 64), np.float16))
    engine.plan([lens, lens], [table, table])
    with pytest.raises(ValueError, match="^q: expected"):
        engine.run([q, gpu.array(np.zeros((2, 8, 64), np.float16))], [pool, pool], [pool, pool])
    assert not wire.sent
    engine.run([q, q], [pool, pool], [pool, pool])


REFUSED = [
    ("owner", {"owner": "token"}), ("timeout_s", {"timeout_s": 0.0}), ("shares", {"shares": "split"}),
    ("shares", {"shares": interleaved(3, 16)}), ("shares", {"shares": interleaved(2, 32)}),
    ("window", {"options": AttentionOptions(window=64)}), ("query_tokens", {"options": AttentionOptions(query_tokens=2)}),
    ("num_ctas", {"num_ctas": 7}), ("max_batch", {"max_batch": 0}), ("group", {"group": None}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "more"), REFUSED, ids=[name for name, _ in REFUSED])
def test_what_is_not_served_is_refused_by_name(gpu, name, more) -> None:
    from gpu.several.one_process import DeviceGroup
    from gpu.several.sharded_decode import ShardedDecode

    given_ = {"group": DeviceGroup([0, 0]), "max_batch": 8} | more
    with pytest.raises(ValueError, match=f"^{name}"):
        ShardedDecode(SHAPE, **given_)


def test_plans_are_checked(gpu) -> None:
    engine, _ = make(gpu, 2)
    lens, table = np.array([33], np.int32), np.array([[0]], np.int32)
    wide = np.array([[0, 1]], np.int32)
    for name, arguments in (
        ("seq_lens", ([lens, lens], [table, table])),  # rank 0 has 17 of the tokens
        ("block_table", ([lens, lens], [wide])),
        ("seq_lens", (lens, [wide, wide])),
        ("seq_lens", ([np.zeros(9, np.int32)] * 2, [np.zeros((9, 1), np.int32)] * 2)),
    ):
        with pytest.raises(ValueError, match=f"^{name}"):
            engine.plan(*arguments)
    engine.plan([lens, lens], [wide, table])
    kept = [one.planned for one in engine.engines.values()]
    with pytest.raises(ValueError, match="^seq_lens"):  # of rank 1, when rank 0 has planned
        engine.plan([np.array([49], np.int32)] * 2, [wide, table])
    assert [one.planned for one in engine.engines.values()] == kept


def test_who_came_late_is_told_of_itself(gpu) -> None:
    from gpu.several.rank_engine import RankLost

    engine, _ = make(gpu, 2)
    engine.engines[1]._failure[0] = 1  # as the kernel writes it
    with pytest.raises(RankLost, match=r"^rank 1: this rank did not do its part of a step within 2 s; .* reset\(\)"):
        engine.synchronize()


def test_a_process_with_one_rank_gives_its_arrays_or_lists_of_them(gpu, monkeypatch) -> None:
    """Also lengths of one row as a list of numbers, which is no list of the one rank's arrays."""
    from gpu.several.group import Inboxes
    from gpu.several.one_process import DeviceGroup

    def one_rank(group: DeviceGroup, devices: object) -> None:
        made(group, devices)
        group.ranks = (0,)

    made = DeviceGroup.__init__
    monkeypatch.setattr(DeviceGroup, "__init__", one_rank)
    monkeypatch.setattr(DeviceGroup, "inboxes", lambda group, size: {0: Inboxes(0, (0, 0), ())})
    engine, _ = make(gpu, 2)
    table = np.array([[0, 1]], np.int32)
    for lens in ([33], [np.int64(33)], [[33]], np.array([33], np.int32), [np.array([33], np.int32)]):
        engine.plan(lens, [table])
        assert engine.engines[0].planned[0].batch_size == 1
    engine.plan([33, 40], np.array([[0, 1], [2, 3]], np.int32))
    with pytest.raises(ValueError, match=r"^block_table: expected int32 or int64 \[2, max_pages\]"):
        engine.plan([33, 40], table)


@pytest.mark.parametrize(("lens", "said"), [(5, "got int"), ([[5]] * 3, "got list of 3")])
def test_lists_of_other_ranks_are_refused(gpu, lens, said) -> None:
    engine, _ = make(gpu, 2)
    with pytest.raises(ValueError, match=f"^seq_lens: expected a list with an entry for each of 2 ranks, {said}"):
        engine.plan(lens, [np.zeros((1, 1), np.int32)] * 2)


@pytest.mark.parametrize("devices", [2, None, [0], [0] * 9, ["cuda:0", "cuda:0"], [0, 1], [0, -1], [0, True], "00"])
def test_devices_are_checked(gpu, devices) -> None:
    from gpu.several.one_process import DeviceGroup

    with pytest.raises(ValueError, match="^devices"):
        DeviceGroup(devices)


def test_what_ranks_own_is_everything_once() -> None:
    for owner, ranks, batch, heads in itertools.product(("row", "head"), (2, 3, 8), (1, 2, 7), (1, 4, 8)):
        seen = np.zeros((batch, heads), int)
        for rank in range(ranks):
            rows, kv_heads = inbox.owned(owner, rank, num_ranks=ranks, batch_size=batch, num_kv_heads=heads)
            seen[rows.start:rows.stop, kv_heads.start:kv_heads.stop] += 1
            begin, end = inbox.owned_places(owner, rank, num_ranks=ranks, batch_size=batch, num_kv_heads=heads)
            assert end - begin == len(rows) * len(kv_heads)
        assert (seen == 1).all()
