"""ShardedDecode: one decode step of rows whose pages are spread over several GPUs."""
from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

from gpu.inputs import checks
from gpu.inputs.block_tables import StepTables
from gpu.inputs.run import Run
from gpu.several.group import Group, check_group
from gpu.several.inbox import OWNERS, owned
from gpu.several.rank_engine import RankEngine
from pkvsim import DecodeShape
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.schedule.costs import BalancedCosts
from pkvsim.schedule.shares import PageShares, interleaved

SHARED = "interleaved"
GIVEN = "given"


class ShardedDecode:
    """Decode attention of rows that the ranks of a group hold together: each rank attends to its own pages, and the
    states of all merge inside the kernel, in the order of the ranks.

    A step is one launch of each rank. Lengths, tables and queries may change in place between runs, also inside a
    captured CUDA graph, and results repeat bit for bit. Every rank plans and runs the same steps in the same order,
    with the same lengths; the queries of a step are on every rank, whole. A step's ranks wait for each other: on a
    device that several of them share, theirs must be the only work that takes its SMs for long. They write into each
    other's memory: synchronize() before the object is dropped.

    engines: this process's ranks', by rank; engines[rank].run(Run(..)) is one rank's launch alone, as a captured graph
    of that rank needs it.
    """

    def __init__(self, shape: DecodeShape, dtype: str = "float16", *, group: Group, owner: str = "head",
                 shares: PageShares | str = SHARED, max_batch: int = 256, num_ctas: int | None = None,
                 costs: BalancedCosts | None = None, variant: tuple[int, int] | None = None,
                 options: AttentionOptions = PLAIN, kv_dtype: str | None = None, kv_scales: str | None = None,
                 layout: str = "HND", scale: float | None = None, timeout_s: float = 2.0,
                 overlap: bool | None = None) -> None:
        """
        shape, dtype, costs, variant, options, kv_dtype, kv_scales, layout, scale: as gpu.DecodeEngine. Windows and
        several query tokens are refused.
        owner: whose the outputs are. "head": rank r of n has KV heads [Hkv * r // n, Hkv * (r + 1) // n) of every row,
        "row": the same of the rows, "all": every rank has everything, bit for bit alike.
        shares: which pages of a row are whose; page by page in turn by default. "given": plan() takes each rank's own
        lengths, whatever pages they are.
        max_batch: rows of a step at most; inboxes of 2 * num_ranks states for each of their heads are kept for them.
        num_ctas: of a rank's launch, by default its part of the device's SMs.
        timeout_s: how long a rank waits for another before RankLost, and then on every rank. A CollectiveGroup's step
        waits for as long as torch.distributed does.
        overlap: whether a rank's launch may begin while the one before it ends (sm_90); by default where the rank has a
        GPU for itself. Ranks that share one let it begin once all CTAs of the step are there.

        All ranks make it together. Raises ValueError naming the argument.
        """
        self.group = check_group(group)
        checks.check_engine(shape, dtype, "balanced", ("balanced",), options, layout, 16, variant)
        options = options.with_cache(kv_dtype, kv_scales)
        checks.expect("owner", f"one of {', '.join(OWNERS)}", repr(owner), isinstance(owner, str) and owner in OWNERS)
        timeout_s = checks.check_scale(timeout_s)
        checks.expect("timeout_s", "more than 0 and at most 3600", timeout_s, 0 < timeout_s <= 3600)
        if isinstance(shares, str):
            checks.expect("shares", f"PageShares, {SHARED!r} or {GIVEN!r}", repr(shares), shares in (SHARED, GIVEN))
            dealt = interleaved(group.num_ranks, shape.page_size) if shares == SHARED else None
        else:
            checks.expect("shares", f"PageShares of {group.num_ranks} ranks and pages of {shape.page_size}",
                          repr(shares), isinstance(shares, PageShares) and shares.num_ranks == group.num_ranks
                          and shares.page_size == shape.page_size)
            dealt = shares
        self.shape, self.owner, self.shares = shape, owner, dealt
        self.engines: dict[int, RankEngine] = {}
        for rank in group.ranks:
            with group.use(rank):
                self.engines[rank] = RankEngine(
                    shape, dtype, group=group, rank=rank, owner=owner, shares=dealt, max_batch=max_batch,
                    num_ctas=num_ctas, costs=costs, variant=variant, options=options, layout=layout, scale=scale,
                    timeout_s=timeout_s, overlap=overlap)
        sizes = {engine.config.inbox_bytes for engine in self.engines.values()}
        checks.expect("group", "GPUs that run the same kernel variant", sorted(sizes), len(sizes) == 1)
        inboxes = group.inboxes(sizes.pop())
        for rank, engine in self.engines.items():
            with group.use(rank):
                engine.connect(inboxes[rank])
        self._planned = False

    def plan(self, seq_lens: object, block_table: object = None, *, indptr: object = None, indices: object = None,
             validate: bool = False) -> None:
        """Prepares a step on this process's ranks.

        Each argument is a list with an entry for each of them, or, with one rank in this process, the array itself.
        seq_lens [batch_size] int32: tokens of the whole rows, which are the same on every rank (with shares="given",
        the tokens that this rank has). block_table [batch_size, max_pages] int32 or int64, or CSR: this rank's pages of
        each row in the row's order, pkvsim.schedule.shares says which; and so on as gpu.DecodeEngine.plan.

        All ranks call it together the first time. Raises ValueError naming the argument, and leaves the last plan as it
        was.
        """
        given = [self._of_ranks(name, value) for name, value in
                 (("seq_lens", seq_lens), ("block_table", block_table), ("indptr", indptr), ("indices", indices))]
        before = [engine.planned for engine in self.engines.values()]
        try:
            for rank, *tables in zip(self.engines, *given):
                with self.group.use(rank):
                    self.engines[rank].plan(StepTables(*tables), validate=validate)
        except BaseException:
            for engine, planned in zip(self.engines.values(), before):
                engine.planned = planned
            raise
        if not self._planned:
            self.group.barrier()  # a rank's first launch waits for no other's compiler
            self._planned = True

    def run(self, q: object, k_pages: object, v_pages: object = None, *, out: object = None, lse: object = None,
            scale: float | None = None, sinks: object = None, k_scale: object = None, v_scale: object = None) -> Any:
        """Attention of the planned step, each rank on its stream (group.use).

        Lists as in plan(): q [batch_size, num_q_heads, head_dim], the same on every rank; k_pages and v_pages, this
        rank's pool; the others as gpu.DecodeEngine.run. Returns (out, lse), or a list of one of each rank; owned()
        tells which of it is there, and the rest is left as it was.

        Raises ValueError naming the argument; RankLost where an earlier step waited for a rank in vain.
        """
        given = [self._of_ranks(name, value) for name, value in (
            ("q", q), ("k_pages", k_pages), ("v_pages", v_pages), ("out", out), ("lse", lse), ("sinks", sinks),
            ("k_scale", k_scale), ("v_scale", v_scale))]  # fmt: skip
        prepared, results = [], []
        for rank, own_q, k, v, to, lse_to, own_sinks, own_k_scale, own_v_scale in zip(self.engines, *given):
            with self.group.use(rank):
                prepared.append(self.engines[rank].prepare(Run(own_q, k, v, to, lse_to, scale, own_sinks, None,
                                                               own_k_scale, own_v_scale)))
        # A rank that is launched waits for the others, so nothing is between these launches that could fail or block.
        for rank, one in zip(self.engines, prepared):
            with self.group.use(rank):
                results.append(self.engines[rank].launch(one))
        return results[0] if len(self.group.ranks) == 1 else results

    def owned(self, rank: int, batch_size: int) -> tuple[range, range]:
        """(rows, query heads) whose outputs are the rank's."""
        rows, heads = owned(self.owner, rank, num_ranks=self.group.num_ranks, batch_size=batch_size,
                            num_kv_heads=self.shape.num_kv_heads)
        group = self.shape.group_size
        return rows, range(heads.start * group, heads.stop * group)

    def synchronize(self) -> None:
        """Waits for this process's ranks. Raises RankLost where a step waited for a rank in vain."""
        import cupy

        for rank, engine in self.engines.items():
            cupy.cuda.Device(self.group.device(rank)).synchronize()
            engine.check()

    def reset(self) -> None:
        """After RankLost, when no rank runs anything: empties what the ranks have written to each other. All ranks
        call it together."""
        self.group.barrier()
        for rank, engine in self.engines.items():
            with self.group.use(rank):
                engine.clear()
        self.group.barrier()

    def _of_ranks(self, name: str, value: Any) -> Sequence[Any]:
        count = len(self.group.ranks)
        if value is None:
            return (None,) * count
        many = isinstance(value, (list, tuple))
        if count == 1 and not (many and len(value) == 1 and not isinstance(value[0], numbers.Number)):
            return (value,)  # a list of numbers is the lengths themselves
        checks.expect(name, f"a list with an entry for each of {count} ranks", f"{type(value).__name__} of {len(value)}"
                      if many else type(value).__name__, many and len(value) == count)
        return value
