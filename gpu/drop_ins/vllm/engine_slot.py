"""One engine that vLLM's layers decode on, and which of its steps read what rows share once. Needs no vLLM."""
from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gpu.drop_ins.vllm.step import DecodeRows

FIND_GROUPS = "auto"  # DecodeEngine.plan's groups: each step finds by itself which rows begin with the same pages
LEAST_SHARING = 2  # rows, of which pages can be shared at all
LOG = logging.getLogger("vllm.persistentkv")  # vLLM shows the loggers below its own name


@dataclass(slots=True, eq=False)
class EngineSlot:
    """An engine, the rows that it has planned, and where it writes the log-sums that nobody asks for."""

    engine: Any
    lse: torch.Tensor  # [most_rows, (query_tokens,) num_q_heads] float32
    rows: DecodeRows | None = None
    most_sharing: int = 0  # rows of the largest steps that read shared pages once; others read them for each row
    last_sharing: int = 0  # rows of the last such step: a plan for as many allocates nothing

    def plan(self, rows: DecodeRows) -> None:
        """Plans the engine for a step, unless it is the one that it has planned."""
        if self.rows is rows:
            return
        if not (self._shares(rows) and self._plan_sharing(rows)):
            self.engine.plan(rows.seq_lens, rows.block_table)
        self.rows = rows

    def prepare_sharing(self, most_rows: int, query_tokens: int, try_out: Callable[[int], None]) -> None:
        """Finds up to how many rows steps can read shared pages once, and runs what does, so that captures may follow.

        try_out: plans and runs a step of so many empty rows. Which kernels run goes by a step's rows, the same ones in
        ranges of which each has a power of two in it or the most rows that there are.
        """
        if query_tokens > 1:
            LOG.warning("PersistentKV reads shared pages for each row in steps whose rows have %s query tokens",
                        query_tokens)
            return
        refused = None
        for num_rows in sizes(most_rows):
            try:
                lens = torch.zeros(num_rows, dtype=torch.int32, device=self.lse.device)
                self.engine.plan(lens, lens[:, None], groups=FIND_GROUPS)
            except ValueError as error:
                refused = str(error)
                continue
            self.most_sharing = max(self.most_sharing, num_rows)
            try_out(num_rows)
        if self.most_sharing:
            LOG.info("PersistentKV reads pages that rows begin with in common once, in steps of %s to %s rows",
                     LEAST_SHARING, self.most_sharing)
        if refused is not None:
            LOG.warning("PersistentKV reads shared pages for each row in %s, as it has no common reads there: %s",
                        "larger steps" if self.most_sharing else "some layers", refused)

    def _shares(self, rows: DecodeRows) -> bool:
        if not LEAST_SHARING <= rows.num_rows <= self.most_sharing:
            return False
        if rows.num_rows != self.last_sharing and torch.cuda.is_current_stream_capturing():
            LOG.warning("PersistentKV's graph of %s rows reads shared pages for each of them, as no step of so many "
                        "rows ran just before its capture", rows.num_rows)
            return False
        return True

    def _plan_sharing(self, rows: DecodeRows) -> bool:
        """Whether the engine takes such a step of so many rows with tables of this width; it is not asked again."""
        try:
            self.engine.plan(rows.seq_lens, rows.block_table, groups=FIND_GROUPS)
        except ValueError as error:
            self.most_sharing = rows.num_rows - 1
            LOG.warning("PersistentKV reads shared pages for each row in steps of more than %s rows: %s",
                        self.most_sharing, error)
            return False
        self.last_sharing = rows.num_rows
        return True


def sizes(most_rows: int) -> Iterator[int]:
    """`most_rows`, then the powers of two below it, as far as rows can share anything."""
    rows = most_rows
    while rows >= LEAST_SHARING:
        yield rows
        rows = 1 << (rows - 1).bit_length() - 1
