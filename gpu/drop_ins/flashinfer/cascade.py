"""FlashInfer's MultiLevelCascadeAttentionWrapper of two levels: rows that share leading pages, in one launch a layer.

Arguments, order, defaults and return values are those of FlashInfer 0.7.2. Level 0 holds the prefixes, level 1 what
each row has for itself. What gpu.drop_ins.refusals lists raises NotImplementedError naming the argument. Where it
differs, on purpose: the workspace is not used; a prefix that is not worth a read of its own is read row by row.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gpu.drop_ins.flashinfer.arguments import check_numbers, check_tensor, dtype_of, name_of, pages_of
from gpu.drop_ins.refusals import check_served
from pkvsim import DecodeShape
from pkvsim.options import AttentionOptions
from pkvsim.schedule.prefixes import SharingRule

LEVELS = 2
ARRAYS = ("qo_indptr_arr", "paged_kv_indptr_arr", "paged_kv_indices_arr", "paged_kv_last_page_len")
BUFFERS = ("qo_indptr_buf_arr", "paged_kv_indptr_buf_arr", "paged_kv_indices_buf_arr", "paged_kv_last_page_len_buf_arr")


@dataclass(slots=True, eq=False)
class StepArrays:
    """A step as the engine takes it, on the GPU."""

    block_table: torch.Tensor  # [rows, max_pages] int32
    seq_lens: torch.Tensor  # [rows] int32
    group_of_row: torch.Tensor  # [rows] int32
    prefix_pages: torch.Tensor  # [most groups] int32


@dataclass(frozen=True, slots=True, eq=False)
class HostStep:
    """The same on the host, as the levels' arrays say it."""

    block_table: np.ndarray  # [rows, max_pages] int32
    seq_lens: np.ndarray  # [rows] int32
    group_of_row: np.ndarray  # [rows] int32
    prefix_pages: np.ndarray  # [groups] int32, 0 where reading together does not pay
    query_tokens: int


class MultiLevelCascadeAttentionWrapper:
    """Decode attention of rows that share prefixes: plan() a step, run() it for every layer.

    plan() and run() belong on one stream. With use_cuda_graph a captured run() follows later plans of as many rows.
    """

    def __init__(
        self, num_levels: int, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD",
        use_cuda_graph: bool = False, qo_indptr_buf_arr: Sequence[torch.Tensor] | None = None,
        paged_kv_indptr_buf_arr: Sequence[torch.Tensor] | None = None,
        paged_kv_indices_buf_arr: Sequence[torch.Tensor] | None = None,
        paged_kv_last_page_len_buf_arr: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """
        float_workspace_buffer: only its device is used. *_buf_arr: with use_cuda_graph, a buffer of each level, whose
        sizes say how many groups, rows and pages a step may have at most; nothing is written there.

        Raises KeyError for an unknown kv_layout, ValueError for graph buffers that are missing, NotImplementedError for
        what is not served.
        """
        check_tensor("float_workspace_buffer", float_workspace_buffer)
        if kv_layout not in ("NHD", "HND"):
            raise KeyError(f"kv_layout: expected NHD or HND, got {kv_layout!r}")
        check_served("num_levels", num_levels)
        self.device = float_workspace_buffer.device
        self._kv_layout, self._use_cuda_graph = kv_layout, use_cuda_graph
        self._engines: dict[tuple, object] = {}
        self._engine: object = None
        self._tokens = self._rows = 0
        self._query_tokens: int | None = None
        self._dtypes: tuple[torch.dtype, torch.dtype] | None = None
        self._scale: float | None = None
        self._step: StepArrays | None = None
        if use_cuda_graph:
            given = (qo_indptr_buf_arr, paged_kv_indptr_buf_arr, paged_kv_indices_buf_arr,
                     paged_kv_last_page_len_buf_arr)
            for name, buffers in zip(BUFFERS, given):
                if buffers is None or len(buffers) != LEVELS:
                    raise ValueError(f"{name}: expected a buffer for each of {LEVELS} levels with use_cuda_graph, got "
                                     f"{'None' if buffers is None else len(buffers)}")
            groups, rows = (len(buffer) - 1 for buffer in paged_kv_indptr_buf_arr)
            self._step = self._empty_step(rows, max(1, groups), sum(len(buffer) for buffer in paged_kv_indices_buf_arr))

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._use_cuda_graph

    def reset_workspace_buffer(
        self, float_workspace_buffer: torch.Tensor, int_workspace_buffers: Sequence[torch.Tensor]
    ) -> None:
        """Only checks the device, as the workspaces are not used. Raises ValueError naming the argument."""
        for name, buffer in (("float_workspace_buffer", float_workspace_buffer),
                             *(("int_workspace_buffers", buffer) for buffer in int_workspace_buffers)):
            if buffer.device != self.device:
                raise ValueError(f"{name}: expected a buffer on {self.device}, got one on {buffer.device}")

    def plan(
        self, qo_indptr_arr: Sequence[torch.Tensor], paged_kv_indptr_arr: Sequence[torch.Tensor],
        paged_kv_indices_arr: Sequence[torch.Tensor], paged_kv_last_page_len: Sequence[torch.Tensor],
        num_qo_heads: int, num_kv_heads: int, head_dim: int, page_size: int, causal: bool = False,
        pos_encoding_mode: str = "NONE", use_fp16_qk_reduction: bool = False, sm_scale: float | None = None,
        window_left: int = -1, logits_soft_cap: float | None = None, rope_scale: float | None = None,
        rope_theta: float | None = None, q_data_type: str | torch.dtype | None = "float16",
        kv_data_type: str | torch.dtype | None = None,
    ) -> None:
        """Prepares a step; copies what is on the GPU to the host, as FlashInfer's does.

        Of level 0 and level 1 each: qo_indptr [groups + 1] or [rows + 1], the queries that an entry's pages are for;
        paged_kv_indptr alike, paged_kv_indices and paged_kv_last_page_len [groups] or [rows], integers, on the host or
        the GPU. All pages of a prefix are full; every row has as many query tokens, one or, causal, up to 8.

        Raises ValueError or NotImplementedError naming the argument, and leaves the last plan as it was.
        """
        check_numbers(window_left, logits_soft_cap, sm_scale)
        q_dtype = dtype_of(q_data_type if q_data_type is not None else "float16")
        kv_dtype = dtype_of(kv_data_type) if kv_data_type is not None else q_dtype
        for name, value in (("pos_encoding_mode", pos_encoding_mode), ("q_data_type", name_of(q_dtype)),
                            ("kv_data_type", name_of(kv_dtype)), ("cascade window_left", window_left),
                            ("use_fp16_qk_reduction", use_fp16_qk_reduction)):
            check_served(name, value)
        if kv_dtype.itemsize > 1 and kv_dtype != q_dtype:
            raise NotImplementedError(f"kv_data_type: expected q_data_type {name_of(q_dtype)}, got {name_of(kv_dtype)}")
        shape = DecodeShape(num_qo_heads, num_kv_heads, head_dim, page_size)
        given = (qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len)
        levels = _on_host(given)
        tokens = _query_tokens(levels[1][0], causal=causal)
        options = AttentionOptions(
            soft_cap=logits_soft_cap if logits_soft_cap and logits_soft_cap > 0 else None, query_tokens=tokens,
            kv_dtype=name_of(kv_dtype) if kv_dtype.itemsize == 1 else None)
        step = lay_out(levels, page_size=page_size, query_tokens=tokens, rule=self._rule(shape, options))
        placed = self._place(step)
        key = shape, name_of(q_dtype), options
        engine = self._engines.get(key)
        if engine is None:
            engine = self._engines[key] = self._make_engine(shape, name_of(q_dtype), options)
        # A captured run always reads by groups, as the next step may have some.
        groups = (placed.group_of_row, placed.prefix_pages)
        shares = self._use_cuda_graph or bool(step.prefix_pages.any())
        engine.plan(placed.seq_lens, placed.block_table, groups=self._groups(*groups) if shares else None)
        self._engine, self._rows, self._query_tokens = engine, len(step.seq_lens), tokens
        self._dtypes, self._scale = (q_dtype, kv_dtype), sm_scale

    begin_forward = plan

    def end_forward(self) -> None:
        """Nothing to do; kept for scripts that call it."""

    def run(
        self, q: torch.Tensor, paged_kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Attention of the planned step, like q [rows * query tokens, num_qo_heads, head_dim].

        paged_kv_cache: a pair of pools [num_pages, num_kv_heads, page_size, head_dim], with NHD [num_pages, page_size,
        num_kv_heads, head_dim], or both in one [num_pages, 2, ..].

        Raises ValueError naming the argument, RuntimeError when nothing was planned.
        """
        if self._engine is None:
            raise RuntimeError("run: call plan() first")
        k_pages, v_pages = pages_of(paged_kv_cache, self._kv_layout)
        rows, tokens = self._rows, self._query_tokens
        check_tensor("q", q)
        if q.dim() != 3 or q.shape[0] != rows * tokens:
            raise ValueError(f"q: expected {rows} rows of {tokens} tokens, [{rows * tokens}, num_qo_heads, head_dim], "
                             f"got {list(q.shape)}")
        for name, array, wanted in (("q", q, self._dtypes[0]), ("k", k_pages, self._dtypes[1]),
                                    ("v", v_pages, self._dtypes[1])):
            if array.dtype != wanted:
                raise ValueError(f"{name}: expected plan()'s {name_of(wanted)}, got {name_of(array.dtype)}")
        q = q.contiguous()
        out, _ = self._engine.run(q if tokens == 1 else q.unflatten(0, (rows, tokens)), k_pages, v_pages,
                                  scale=None if self._scale is None else float(self._scale))
        return out if tokens == 1 else out.flatten(0, 1)

    forward = run

    def _empty_step(self, rows: int, groups: int, max_pages: int) -> StepArrays:
        sizes = ((rows, max_pages), (rows,), (rows,), (groups,))
        return StepArrays(*(torch.zeros(size, dtype=torch.int32, device=self.device) for size in sizes))

    def _place(self, step: HostStep) -> StepArrays:
        """The step on the GPU: in new arrays, or in those that captured runs read."""
        rows, pages = step.block_table.shape
        groups = len(step.prefix_pages)
        if not self._use_cuda_graph:
            placed = self._empty_step(rows, max(1, groups), pages)
        else:
            placed = self._step
            room = len(placed.seq_lens), len(placed.prefix_pages)
            if rows != room[0] or groups > room[1]:
                raise ValueError(f"paged_kv_indptr_arr: expected {room[0]} rows in at most {room[1]} groups, as the "
                                 f"buffers of use_cuda_graph, got {rows} in {groups}")
            if pages > placed.block_table.shape[1]:
                raise ValueError("paged_kv_indices_arr: expected rows of at most the buffers' "
                                 f"{placed.block_table.shape[1]} pages, got {pages}")
            placed.prefix_pages.zero_()
        placed.block_table[:, :pages].copy_(torch.from_numpy(step.block_table))
        placed.seq_lens.copy_(torch.from_numpy(step.seq_lens))
        placed.group_of_row.copy_(torch.from_numpy(step.group_of_row))
        placed.prefix_pages[:groups].copy_(torch.from_numpy(step.prefix_pages))
        return placed

    def _rule(self, shape: DecodeShape, options: AttentionOptions) -> SharingRule:
        from gpu.engine.prefixes import default_rule

        return default_rule(shape, options)

    def _groups(self, group_of_row: torch.Tensor, prefix_pages: torch.Tensor) -> object:
        from gpu.engine.prefixes import PrefixGroups

        return PrefixGroups(group_of_row, prefix_pages)

    def _make_engine(self, shape: DecodeShape, dtype: str, options: AttentionOptions) -> object:
        from gpu.decode_engine import DecodeEngine

        return DecodeEngine(shape, dtype, "balanced", options=options)


def _on_host(given: tuple[Sequence[torch.Tensor], ...]) -> list[tuple[np.ndarray, ...]]:
    """(qo_indptr, indptr, indices, last_page_len) int64 of each level. Raises ValueError naming the argument."""
    for name, arrays in zip(ARRAYS, given):
        if len(arrays) != LEVELS:
            raise ValueError(f"{name}: expected an array for each of {LEVELS} levels, got {len(arrays)}")
        for array in arrays:
            check_tensor(name, array)
            if array.dim() != 1:
                raise ValueError(f"{name}: expected arrays of one axis, got {list(array.shape)}")
    levels = [tuple(array.cpu().numpy().astype(np.int64) for array in arrays) for arrays in zip(*given)]
    for level, (queries, pages, indices, last) in enumerate(levels):
        for name, array in zip(ARRAYS[:2], (queries, pages)):
            if len(array) != len(last) + 1 or array[0] != 0 or (np.diff(array) < 0).any():
                raise ValueError(f"{name}[{level}]: expected {len(last) + 1} offsets from 0 on that do not fall, got "
                                 f"{array.tolist()}")
        if pages[-1] > len(indices):
            raise ValueError(f"paged_kv_indices_arr[{level}]: expected at least {pages[-1]} entries, got "
                             f"{len(indices)}")
    if levels[0][0][-1] != levels[1][0][-1]:
        raise ValueError(f"qo_indptr_arr: expected the same queries on both levels, got {levels[0][0][-1]} and "
                         f"{levels[1][0][-1]}")
    return levels


def _query_tokens(qo_indptr: np.ndarray, *, causal: bool) -> int:
    """Query tokens of every row. Raises NotImplementedError where rows differ, or see what comes behind."""
    counts = np.diff(qo_indptr)
    tokens = int(counts[0]) if len(counts) else 1
    if (counts != tokens).any() or tokens < 1:
        raise NotImplementedError("qo_indptr_arr[1]: expected rows of as many query tokens each, got "
                                  f"{counts.tolist()}")
    check_served("q_len_per_req", tokens)
    if tokens > 1 and not causal:
        raise NotImplementedError(f"causal: expected True with {tokens} query tokens per row, got {causal}")
    return tokens


def lay_out(levels: list[tuple[np.ndarray, ...]], *, page_size: int, query_tokens: int, rule: SharingRule) -> HostStep:
    """Rows as their prefix's pages and their own, of levels as _on_host gives them.

    Raises ValueError or NotImplementedError naming the argument.
    """
    (shared_queries, shared_pages, shared_ids, shared_last), (_, own_pages, own_ids, own_last) = levels
    if (shared_queries % query_tokens).any():
        raise ValueError(f"qo_indptr_arr[0]: expected whole rows of {query_tokens} query tokens, got "
                         f"{shared_queries.tolist()}")
    counts, own_counts = np.diff(shared_pages), np.diff(own_pages)
    if (shared_last[counts > 0] != page_size).any():
        raise NotImplementedError(f"paged_kv_last_page_len[0]: expected full pages of {page_size} tokens, got "
                                  f"{shared_last.tolist()}")
    bad = (own_last < 1) | (own_last > page_size)
    if (bad & (own_counts > 0)).any():
        raise ValueError(f"paged_kv_last_page_len[1]: expected 1 to {page_size}, got {own_last.tolist()}")
    rows, members = len(own_counts), np.diff(shared_queries) // query_tokens  # of each group
    group = np.repeat(np.arange(len(members)), members)  # [rows]
    prefix = counts[group] if len(members) else np.zeros(rows, np.int64)
    table = np.zeros((rows, max(1, int((prefix + own_counts).max(initial=0)))), np.int32)
    for row in range(rows):
        if prefix[row]:
            begin = shared_pages[group[row]]
            table[row, :prefix[row]] = shared_ids[begin:begin + prefix[row]]
        table[row, prefix[row]:prefix[row] + own_counts[row]] = own_ids[own_pages[row]:own_pages[row + 1]]
    own_tokens = np.where(own_counts > 0, (own_counts - 1) * page_size + own_last, 0)
    pays = np.array([rule.pays(int(count), int(pages) * page_size) for count, pages in zip(members, counts)], bool)
    pays &= rule.worth(int(((members - 1) * counts * page_size)[pays].sum()))
    return HostStep(table, (prefix * page_size + own_tokens).astype(np.int32), group.astype(np.int32),
                    np.where(pays, counts, 0).astype(np.int32), query_tokens)
