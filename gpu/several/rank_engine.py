"""RankEngine: one rank's part of a decode step over several GPUs, its plan and its launch."""
from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import cupy
import numpy as np

from gpu.engine.arguments import VALUES, DecodeArguments
from gpu.engine.plan import Plan, place
from gpu.inputs import arrays, checks
from gpu.inputs.block_tables import StepTables, TableLayout, fingerprint
from gpu.inputs.run import Run
from gpu.kernels import fields
from gpu.kernels.compile import load_kernel
from gpu.kernels.this_gpu import this_gpu
from gpu.several.inbox import EMPTY_WORD, HEAD_BYTES, OWNERS, owned_places, rank_config
from pkvsim import DecodeShape
from pkvsim.options import AttentionOptions
from pkvsim.schedule.costs import BalancedCosts, check_costs, default_costs
from pkvsim.schedule.shares import WHOLE, PageShares
from pkvsim.shapes import check_int, check_seq_lens

if TYPE_CHECKING:
    from gpu.kernels.launch import Kernel
    from gpu.several.group import Group, Inboxes

RANK_FIELDS = tuple(field.name for field in fields.RANK.fields)
SEVERAL_VALUES = (*VALUES, *BalancedCosts._fields, *RANK_FIELDS, "max_tokens")


class RankLost(RuntimeError):
    """A rank did not do its part of a step within the stated time. The group's steps are void until reset().

    Who came late itself learns of it from its next step, which computes nothing.
    """


class PreparedRun(NamedTuple):
    """A run whose arguments have passed, and the arrays behind their addresses that are needed after the launch."""

    given: tuple  # gpu.engine.arguments.VALUES
    out: object
    lse: object
    sinks: object


class RankEngine:
    """Decode attention of one rank; gpu.several.ShardedDecode says what each argument is.

    All of a rank's runs belong on one stream, or on streams that are ordered with each other.
    """

    def __init__(self, shape: DecodeShape, dtype: str, *, group: Group, rank: int, owner: str,
                 shares: PageShares | None, max_batch: int, num_ctas: int | None, costs: BalancedCosts | None,
                 variant: tuple[int, int] | None, options: AttentionOptions, layout: str, scale: float | None,
                 timeout_s: float, overlap: bool | None) -> None:
        """On the rank's device and stream, which are current. Raises ValueError naming the argument."""
        gpu = this_gpu()
        self.shape, self.dtype, self.options, self.layout, self.owner = shape, dtype, options, layout, owner
        self.rank, self.group, self.shares = rank, group, shares
        self.device_id = cupy.cuda.Device().id
        self.config = rank_config(shape, dtype, gpu.compute_capability, num_ranks=group.num_ranks, max_batch=max_batch,
                                  variant=variant, options=options)
        self.max_batch, self.timeout_s = max_batch, timeout_s
        kernel, sharers = self.config.kernel, group.sharers(rank)
        self._heads = replace(shape, num_kv_heads=shape.num_kv_heads * kernel.head_split)
        # Ranks that share a GPU have to be there at a time.
        most = gpu.num_sms // sharers
        self.num_ctas = most if num_ctas is None else check_int("num_ctas", num_ctas, 1, most)
        self._same_gpu = sharers > 1
        self._overlap = gpu.overlaps and (not self._same_gpu if overlap is None else overlap)
        if costs is None:
            costs = default_costs(divmod(gpu.compute_capability, 10)).of_kernel(
                columns=kernel.columns, v_head_dim=kernel.v_dim, kv_element_bytes=options.kv_element_bytes(shape),
                page_size=shape.page_size)
        self.costs = check_costs(costs)
        self._arguments = DecodeArguments(shape, dtype, options, layout, num_kv_heads=self._heads.num_kv_heads,
                                          scale=scale, device_id=self.device_id)
        self._kernels: dict[TableLayout, Kernel] = {}
        self._merge: Kernel | None = None
        self._plan: Plan | None = None
        self._checked_plan: list | None = None
        self._in_graphs: list[tuple] = []
        self._workspace = cupy.full(self.config.workspace_bytes(self.num_ctas), 0xFF, dtype=cupy.uint8)
        pinned = cupy.cuda.alloc_pinned_memory(128)
        self._failure = np.frombuffer(pinned, np.uint32, 32)
        self._failure[:] = EMPTY_WORD
        cupy.cuda.get_current_stream().synchronize()

    def connect(self, inboxes: Inboxes) -> None:
        """Before the first run, with this rank's of group.inboxes(config.inbox_bytes)."""
        self._inboxes = inboxes
        self._reached = cupy.asarray(np.array(inboxes.reached, np.int64))
        self._received: Any = None  # of collectives, a torch tensor [bytes]
        self._left: Any = None  # of collectives, the states that launches leave, a torch tensor [bytes]
        self._counts: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        cupy.cuda.get_current_stream().synchronize()

    @property
    def planned(self) -> tuple[Plan | None, list | None]:
        """The last plan, as plan() has left it."""
        return None if self._plan is None else replace(self._plan), self._checked_plan

    @planned.setter
    def planned(self, planned: tuple[Plan | None, list | None]) -> None:
        self._plan, self._checked_plan = planned

    def plan(self, tables: StepTables, *, validate: bool = False) -> None:
        """As gpu.several.ShardedDecode.plan, of this rank's tables."""
        addresses, key = fingerprint(tables)
        if (key == self._checked_plan and not validate and self._plan is not None
                and self._plan.move(tables, addresses, self.shape.page_size)):
            return
        checks.expect("last_page_len", "None with several ranks, which take whole rows' seq_lens",
                      type(tables.last_page_len).__name__, tables.last_page_len is None)
        if isinstance(tables.seq_lens, (list, tuple)):
            tables = tables._replace(seq_lens=check_seq_lens(tables.seq_lens))
        views = tables.views()
        checks.check_plan(views, self.device_id)
        checks.check_room(views, self._heads, segment_cost=self.costs.segment)
        batch = views["seq_lens"].shape[0]
        checks.expect("seq_lens", f"at most max_batch = {self.max_batch} rows", batch, batch <= self.max_batch)
        unchecked = None
        if validate or tables.lengths_on_host(views):
            host = tables.on_host(page_ids=validate)
            share = WHOLE if self.shares is None else self.shares.of_rank(self.rank)
            local = host._replace(seq_lens=share.of(check_seq_lens(host.seq_lens)).astype(np.int32))
            checks.check_contents(local, self.shape.page_size)
            unchecked = (local, local.seq_lens) if validate else None
        library = "torch" if any(array.library == "torch" for array in views.values()) else self._arguments.library
        with arrays.on_stream(library, self.device_id) as stream:
            plan = place(tables, views, self.shape.page_size)
            plan.decode = self._decode_kernel(plan.layout)
            if not self.group.in_kernel:
                self._prepare_exchange(batch)
            stream.synchronize()  # the first run may be on another stream
        plan.unchecked_ids = unchecked
        self._checked_plan = key if all(array.device >= 0 for array in views.values()) else None
        self._plan = plan

    def _decode_kernel(self, layout: TableLayout) -> Kernel:
        if layout not in self._kernels:
            self._kernels[layout] = load_kernel(
                "several.cu", "pkv_decode_several", self.config.defines() | layout.defines(),
                threads=self.config.kernel.threads, shared_bytes=self.config.shared_bytes, overlap=self._overlap,
                given=SEVERAL_VALUES)
        return self._kernels[layout]

    def _prepare_exchange(self, batch_size: int) -> None:
        """Buffers and counts of the collective that carries the states of a step of so many rows."""
        import torch

        if self._merge is None:
            self._merge = load_kernel("several.cu", "pkv_merge_ranks", self.config.defines(),
                                      threads=self.config.kernel.threads, overlap=False)
        ranks, size = self.group.num_ranks, self.config.kernel.state_bytes
        places = [owned_places(self.owner, rank, num_ranks=ranks, batch_size=batch_size,
                               num_kv_heads=self.shape.num_kv_heads, head_split=self.config.kernel.head_split)
                  for rank in range(ranks)]
        own = places[self.rank][1] - places[self.rank][0]
        sent = batch_size * self._heads.num_kv_heads
        if self._received is None or self._received.numel() != ranks * own * size:
            # First of all, since where no memory is left the last plan stays, with the counts that belong to it.
            received = torch.empty(ranks * own * size, dtype=torch.uint8, device=f"cuda:{self.device_id}")
            if self._received is not None:
                self._in_graphs.append((self._received,))  # a captured graph may write it still
            self._received = received
        self._counts = None if self.owner == "all" else (
            tuple((end - begin) * size for begin, end in places), (own * size,) * ranks)
        box = self._inboxes.kept[0]
        self._left = torch.as_tensor(box, device=f"cuda:{self.device_id}")[HEAD_BYTES:HEAD_BYTES + sent * size]

    def run(self, run: Run) -> tuple[object, object]:
        """As gpu.several.ShardedDecode.run, of this rank's arrays, on the caller's current stream."""
        return self.launch(self.prepare(run))

    def prepare(self, run: Run) -> PreparedRun:
        """Everything of a run that can be refused: no rank is launched before every rank's arguments have passed.

        Raises ValueError naming the argument, RankLost as check().
        """
        plan = self._plan
        if plan is None:
            raise RuntimeError("run: call plan() first")
        self.check()
        q, k_pages, v_pages, out, lse, *others, selected, page_lse = run
        for name, what in (("selected", selected), ("page_lse", page_lse)):
            checks.expect(name, "None over several GPUs", type(what).__name__, what is None)
        if v_pages is None:
            k_pages, v_pages = arrays.split_combined(k_pages)
        if out is None or lse is None:
            heads = arrays.shape_of("q", q)[:-1]
            out = arrays.empty_like(q, (*heads, self.options.value_dim(self.shape)), self.dtype) if out is None else out
            lse = arrays.empty_like(q, heads, "float32") if lse is None else lse
        given = self._arguments.take(plan, self._workspace.data.ptr, q, k_pages, v_pages, out, lse, *others)
        return PreparedRun(given, out, lse, run.sinks)

    def launch(self, prepared: PreparedRun) -> tuple[object, object]:
        """The rank's part of the step, on the caller's current stream; returns (out, lse)."""
        plan, given, out, lse = self._plan, prepared.given, prepared.out, prepared.lse
        stream = arrays.current_stream(self._arguments.library, self.device_id)
        if plan.copies and not plan.in_graph and arrays.is_capturing(stream):
            self._in_graphs.append((plan.copies,))
            plan.in_graph = True
        share = WHOLE if self.shares is None else self.shares.of_rank(self.rank)
        of_rank = (self._reached.data.ptr, self._inboxes.own, self._failure.ctypes.data, self.config.half_slots,
                   int(self.timeout_s * 1e9), self.rank, OWNERS[self.owner], int(self.group.in_kernel),
                   int(self._same_gpu), *share.numbers())
        plan.decode(self.num_ctas, (*given, *self.costs, *of_rank, plan.max_tokens), stream, pairs=True)
        if not self.group.in_kernel:
            self._exchange(plan, prepared, stream)
        return out, lse

    def _exchange(self, plan: Plan, prepared: PreparedRun, stream: int) -> None:
        import torch

        with torch.cuda.stream(torch.cuda.ExternalStream(stream, device=self.device_id)):
            self.group.exchange(self.rank, self._left, self._received, self._counts)
        size = self.config.kernel.state_bytes * self.group.num_ranks
        own = self._received.numel() // size
        if own:
            at = [0 if array is None else arrays.view(name, array).pointer
                  for name, array in (("out", prepared.out), ("lse", prepared.lse), ("sinks", prepared.sinks))]
            warps = self.config.kernel.warps
            self._merge(min(self.num_ctas, -(-own * self.config.kernel.columns // warps)),
                        (self._received.data_ptr(), own, *at, self.rank, OWNERS[self.owner], plan.batch_size,
                         self._heads.num_kv_heads), stream)

    def check(self) -> None:
        """Raises RankLost where a launch that has ended waited in vain. Waits for nothing."""
        lost = int(self._failure[0])
        if lost != EMPTY_WORD:
            who = "this rank" if lost == self.rank else f"rank {lost}"
            raise RankLost(f"rank {self.rank}: {who} did not do its part of a step within {self.timeout_s:g} s; they "
                           "serve again after reset() on all ranks")

    def clear(self) -> None:
        """Empties what is this rank's, when no rank's launch runs; ShardedDecode.reset() says what else."""
        self._workspace.fill(0xFF)
        cupy.cuda.runtime.memset(self._inboxes.own, 0xFF, self.config.inbox_bytes)
        cupy.cuda.Device(self.device_id).synchronize()
        self._failure[:] = EMPTY_WORD
