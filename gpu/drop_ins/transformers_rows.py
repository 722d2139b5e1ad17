"""Pages and lengths of a batch's rows, whose padding may be known on the GPU alone."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pkvsim.memory.page_allocator import PageAllocator


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

    __slots__ = ("page_size", "max_seq_len", "num_pages", "seen", "step", "table", "lens", "_pages", "_bounds")

    def __init__(self, *, max_batch_size: int, max_seq_len: int, page_size: int, num_pages: int) -> None:
        columns = -(-max_seq_len // page_size)
        self._pages = PageAllocator(num_pages=num_pages, page_size=page_size, max_batch=max_batch_size,
                                    max_seq_len=columns * page_size)
        self.page_size, self.max_seq_len, self.num_pages = page_size, max_seq_len, num_pages
        self.seen = 0  # tokens a row that went through, padding included
        self.step: NewTokens | None = None  # the last of them
        self.table: torch.Tensor | None = None  # [batch_size, max_pages] int32
        self.lens: torch.Tensor | None = None  # [batch_size] int32
        self._bounds = np.zeros(0, np.int64)  # [batch_size], each at least the row's length

    @property
    def num_free_pages(self) -> int:
        return self._pages.num_free_pages

    @property
    def columns_in_use(self) -> int:
        """Pages of the longest row at most."""
        return -(-int(self._bounds.max(initial=0)) // self.page_size)

    def reset(self) -> None:
        """Gives all pages back."""
        for row in range(len(self._bounds)):
            self._pages.free(row)
        self.seen, self.step, self.table, self.lens = 0, None, None, None
        self._bounds = np.zeros(0, np.int64)

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
        self._reserve(self._bounds + (kept.sum(1).cpu().numpy() if several else new_tokens))
        old = self.lens.long()
        ends = old[:, None] + (torch.arange(1, new_tokens + 1, device=device) if kept is None else kept.cumsum(1))
        self.lens.copy_(ends[:, -1])
        self.seen += new_tokens
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

    def _open(self, batch_size: int, device: torch.device) -> None:
        room, columns = self._pages.block_table.shape
        if batch_size > room:
            raise ValueError(f"max_batch_size: expected at least the batch's {batch_size} rows, got {room}")
        for row in range(batch_size):
            self._pages.allocate(row)
        self._bounds = np.zeros(batch_size, np.int64)
        self.table = torch.zeros((batch_size, columns), dtype=torch.int32, device=device)
        self.lens = torch.zeros(batch_size, dtype=torch.int32, device=device)

    def _reserve(self, bounds: np.ndarray) -> None:
        """Takes pages for rows of `bounds` tokens and copies their ids to the device."""
        if bounds.max(initial=0) > self.max_seq_len:
            raise ValueError(f"max_seq_len: expected at least {int(bounds.max())} tokens a row, got {self.max_seq_len}")
        old = self._pages.seq_lens[:len(bounds)] // self.page_size  # whole pages are reserved
        grown = np.flatnonzero(-(-bounds // self.page_size) > old)
        if len(grown):
            more = -(-bounds[grown] // self.page_size) - old[grown]
            self._pages.extend(grown, more * self.page_size)
            rows = np.repeat(grown, more)
            columns = np.arange(more.sum()) - np.repeat(np.cumsum(more) - more - old[grown], more)
            entries = np.stack([rows, columns, self._pages.block_table[rows, columns]])
            rows, columns, ids = torch.from_numpy(entries).to(self.table.device, non_blocking=True)
            self.table[rows, columns] = ids.int()
        self._bounds = bounds
