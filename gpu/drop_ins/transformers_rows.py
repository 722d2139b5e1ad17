"""Pages and lengths of a batch's rows, whose padding may be known on the GPU alone."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gpu.drop_ins.transformers_heads import HeadRows
from pkvsim.memory.page_allocator import PageAllocator
from pkvsim.schedule.prefixes import SharingRule
from pkvsim.shapes import check_int

RULE = SharingRule()


@dataclass(frozen=True, slots=True)
class NewTokens:
    """Where a step's tokens go, as append_tokens() wants it told, and what each may see."""

    kept: torch.Tensor | None  # [batch_size, new_tokens] bool, those to append; None: all
    lens: torch.Tensor  # [batch_size] int32: the last of a row's appended tokens is at lens - 1
    offsets: torch.Tensor | None  # [batch_size + 1] int32, of the rows in the appended tokens; None: one each
    ends: torch.Tensor  # [batch_size, new_tokens] int64, tokens of the row up to and including this one


class PagedRows:
    """The rows' pages and lengths, the same for all layers.

    The host knows an upper bound of every length, which is what it reserves pages for; the lengths themselves are on
    the device. So a decode step never waits for the GPU, whatever its mask.
    """

    __slots__ = ("page_size", "max_seq_len", "num_pages", "rows_per_prompt", "rule", "seen", "step", "table", "lens",
                 "groups", "evicted", "_pages", "_bounds", "_shared")

    def __init__(self, *, max_batch_size: int, max_seq_len: int, page_size: int, num_pages: int,
                 rows_per_prompt: int = 1, rule: SharingRule = RULE) -> None:
        """rows_per_prompt: neighbouring rows that begin with the same tokens, whose full pages they share. rule: when
        these are worth reading once."""
        columns = -(-max_seq_len // page_size)
        self._pages = PageAllocator(num_pages=num_pages, page_size=page_size, max_batch=max_batch_size,
                                    max_seq_len=columns * page_size)
        self.page_size, self.max_seq_len, self.num_pages = page_size, max_seq_len, num_pages
        self.rows_per_prompt, self.rule = check_int("rows_per_prompt", rows_per_prompt, 1), rule
        self.groups: tuple[torch.Tensor, torch.Tensor] | None = None  # group_of_row, prefix_pages of what is read once
        self.seen = 0  # tokens a row that went through, padding included
        self.step: NewTokens | None = None  # the last of them
        self.table: torch.Tensor | None = None  # [batch_size, max_pages] int32
        self.lens: torch.Tensor | None = None  # [batch_size] int32
        self.evicted = False  # the layers take pages for themselves
        self._bounds = np.zeros(0, np.int64)  # [batch_size], each at least the row's length
        self._shared = np.zeros(0, np.int64)  # [batch_size], the row's first pages that another row owns

    @property
    def num_free_pages(self) -> int:
        return self._pages.num_free_pages

    @property
    def bounds(self) -> np.ndarray:
        """[batch_size] int64 on the host, each at least the row's length."""
        return self._bounds

    @property
    def columns_in_use(self) -> int:
        """Pages of the longest row at most."""
        return -(-int(self._bounds.max(initial=0)) // self.page_size)

    def reset(self) -> None:
        """Gives all pages back."""
        for row in range(len(self._bounds)):
            self._pages.free(row)
        self.seen, self.step, self.table, self.lens, self.groups = 0, None, None, None, None
        self.evicted = False
        self._bounds = self._shared = np.zeros(0, np.int64)

    def extend(self, kept: torch.Tensor | None, batch_size: int, new_tokens: int, device: torch.device) -> None:
        """Makes room for a step's tokens, which `step` then describes.

        kept [batch_size, new_tokens] bool: those that are no padding; None: all.
        Waits for the GPU where kept is given for several tokens a row. Raises ValueError where the rows, their
        lengths or the pages do not fit.
        """
        if self.lens is None:
            self._open(batch_size, device)
        elif batch_size != len(self.lens):
            raise ValueError(f"past_key_values: expected its {len(self.lens)} rows, got a batch of {batch_size}")
        several = kept is not None and new_tokens > 1
        counts = kept.sum(1).cpu().numpy() if several else np.full(batch_size, new_tokens)
        first_step = self.seen == 0 and self.rows_per_prompt > 1
        if first_step:
            self._share(counts, device)
        self._reserve(self._bounds + counts)
        if first_step:
            self._copy_shared_ids()
        old = self.lens.long()
        ends = old[:, None] + (torch.arange(1, new_tokens + 1, device=device) if kept is None else kept.cumsum(1))
        self.lens.copy_(ends[:, -1])
        self.seen += new_tokens
        if first_step and self._shared.any():
            # What rows share is written by the one that owns it.
            own = ends > torch.from_numpy(self._shared * self.page_size).to(device)[:, None]
            kept = own if kept is None else own & kept
            counts = kept.sum(1)
            offsets = torch.zeros(batch_size + 1, dtype=torch.int32, device=device)
            torch.cumsum(counts, 0, dtype=torch.int32, out=offsets[1:])
            self.step = NewTokens(kept, self.lens, offsets, ends)
            return
        if new_tokens == 1:
            # A token that is padding goes behind the row's end, where the row's next one will overwrite it.
            self.step = NewTokens(None, self.lens if kept is None else (old + 1).int(), None, ends)
            return
        offsets = torch.zeros(batch_size + 1, dtype=torch.int32, device=device)
        torch.cumsum(ends[:, -1] - old, 0, dtype=torch.int32, out=offsets[1:])
        self.step = NewTokens(kept, self.lens, offsets, ends)

    def shorten(self, lens: torch.Tensor, seen: int) -> None:
        """Takes back what extend() added, down to lens [batch_size] int64 on the host; pages stay the rows'."""
        self._bounds = lens.numpy().astype(np.int64)
        self.lens.copy_(lens)
        self.seen, self.step = seen, None

    def pages_of(self, row: int, count: int) -> np.ndarray:
        """The row's first pages, int32 [count]."""
        return self._pages.block_table[row, :count].copy()

    def by_head(self, num_kv_heads: int) -> HeadRows:
        """What the rows have, for a layer whose heads keep pages apart from here on."""
        return HeadRows(self._pages, self._bounds, self.lens, num_kv_heads)

    def _open(self, batch_size: int, device: torch.device) -> None:
        room, columns = self._pages.block_table.shape
        if batch_size > room:
            raise ValueError(f"max_batch_size: expected at least the batch's {batch_size} rows, got {room}")
        for row in range(batch_size):
            self._pages.allocate(row)
        if batch_size % self.rows_per_prompt:
            raise ValueError(f"rows_per_prompt: expected a batch of whole prompts of {self.rows_per_prompt} rows, got "
                             f"{batch_size} rows")
        self._bounds, self._shared = np.zeros(batch_size, np.int64), np.zeros(batch_size, np.int64)
        self.table = torch.zeros((batch_size, columns), dtype=torch.int32, device=device)
        self.lens = torch.zeros(batch_size, dtype=torch.int32, device=device)

    def _share(self, counts: np.ndarray, device: torch.device) -> None:
        """Decides which pages of prompts of `counts` [batch_size] tokens the first row of each owns for the others.

        Raises ValueError where the rows of a prompt differ in length.
        """
        by_prompt = counts.reshape(-1, self.rows_per_prompt)
        if (by_prompt != by_prompt[:, :1]).any():
            raise ValueError(f"rows_per_prompt: expected {self.rows_per_prompt} neighbouring rows of one prompt, got "
                             f"rows of {by_prompt[(by_prompt != by_prompt[:, :1]).any(1)][0].tolist()} tokens")
        pages = by_prompt[:, 0] // self.page_size  # full ones, [num_prompts]
        self._shared = np.repeat(pages, self.rows_per_prompt)
        self._shared[::self.rows_per_prompt] = 0
        pays = [self.rule.pays(self.rows_per_prompt, int(count) * self.page_size) for count in pages]
        read_once = np.where(pays, pages, 0).astype(np.int32)
        if read_once.any():
            group_of_row = np.arange(len(counts), dtype=np.int32) // self.rows_per_prompt
            self.groups = torch.from_numpy(group_of_row).to(device), torch.from_numpy(read_once).to(device)

    def _copy_shared_ids(self) -> None:
        """Puts the ids of owners' pages into the tables of the rows that share them."""
        columns = int(self._shared.max(initial=0))
        if columns:
            owners = torch.arange(len(self.lens), device=self.table.device) // self.rows_per_prompt
            theirs = self.table[owners * self.rows_per_prompt, :columns]
            shared = torch.from_numpy(self._shared).to(self.table.device)[:, None]
            mine = torch.arange(columns, device=self.table.device) < shared
            self.table[:, :columns] = torch.where(mine, theirs, self.table[:, :columns])

    def reorder(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(page ids to copy from, page ids to copy to), so that row r becomes what row source[r] was; lengths follow.

        source [batch_size] int64 on the device, of each row one of the same prompt. Only pages that a row has for
        itself are copied.
        """
        columns = -(-self._bounds // self.page_size)
        counts = columns - np.minimum(self._shared_by_prompt(), columns)  # what even the owner has for itself
        rows = np.repeat(np.arange(len(counts)), counts)
        places = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - columns, counts)
        rows, places = torch.from_numpy(np.stack([rows, places])).to(self.table.device, non_blocking=True)
        self.lens.copy_(self.lens[source])
        return self.table[source[rows], places].long(), self.table[rows, places].long()

    def _shared_by_prompt(self) -> np.ndarray:
        """First pages that each row's prompt shares, its owner included: int64 [batch_size]."""
        most = self._shared.reshape(-1, self.rows_per_prompt).max(1)
        return np.repeat(most, self.rows_per_prompt)

    def _reserve(self, bounds: np.ndarray) -> None:
        """Takes pages for rows of `bounds` tokens and copies their ids to the device."""
        if self.evicted:
            self._bounds = bounds
            return
        if bounds.max(initial=0) > self.max_seq_len:
            raise ValueError(f"max_seq_len: expected at least {int(bounds.max())} tokens a row, got {self.max_seq_len}")
        old = self._pages.seq_lens[:len(bounds)] // self.page_size  # whole pages are reserved
        wanted = -(-bounds // self.page_size) - self._shared
        grown = np.flatnonzero(wanted > old)
        if len(grown):
            more = wanted[grown] - old[grown]
            self._pages.extend(grown, more * self.page_size)
            rows = np.repeat(grown, more)
            columns = np.arange(more.sum()) - np.repeat(np.cumsum(more) - more - old[grown], more)
            entries = np.stack([rows, columns + self._shared[rows], self._pages.block_table[rows, columns]])
            rows, columns, ids = torch.from_numpy(entries).to(self.table.device, non_blocking=True)
            self.table[rows, columns] = ids.int()
        self._bounds = bounds
