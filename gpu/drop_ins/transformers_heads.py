"""A layer of a PagedCache after an eviction: every KV head of a row has pages, and a length, of its own.

The layer's pool stays where it is and is read as one of pages of one head (PageAllocator.by_head): a step takes each
KV head with its group of query heads for a row, a lane.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gpu.drop_ins.torch_append import append_tokens
from gpu.drop_ins.torch_decode import decode_attention
from pkvsim.memory.page_allocator import PageAllocator


class HeadRows:
    """Pages, lengths and table of a layer's lanes: head h of row r is lane r * num_kv_heads + h.

    As of PagedRows, the host knows an upper bound of every length, the device the lengths.
    """

    __slots__ = ("num_kv_heads", "page_size", "lens", "table", "_pages", "_bounds")

    def __init__(self, pages: PageAllocator, bounds: np.ndarray, lens: torch.Tensor, num_kv_heads: int) -> None:
        """pages: of the rows while heads had them together, of which whole ones are reserved. bounds [batch_size]
        int64, lens [batch_size] int32 on the device."""
        self.num_kv_heads, self.page_size = num_kv_heads, pages.page_size
        self._pages = pages.by_head(num_kv_heads)
        self._bounds = np.repeat(bounds, num_kv_heads)
        self.lens = lens.repeat_interleave(num_kv_heads)  # [batch_size * num_kv_heads] int32
        self._copy_table()

    @property
    def num_free_pages(self) -> int:
        """Pages of one head."""
        return self._pages.num_free_pages

    @property
    def lengths(self) -> np.ndarray:
        """Tokens that each lane keeps at most, int64 [batch_size, num_kv_heads]."""
        return self._bounds.reshape(-1, self.num_kv_heads).copy()

    def evict(self, kept: Sequence[Sequence[object]]) -> int:
        """Row r's head h keeps its pages at the ascending places kept[r][h]; returns how many went back to the pool.

        Waits for the GPU, which knows the lengths. Raises ValueError naming `kept`, and changes nothing.
        """
        rows = len(self._bounds) // self.num_kv_heads
        if len(kept) != rows or any(len(row) != self.num_kv_heads for row in kept):
            raise ValueError(f"kept: expected places of {rows} rows with {self.num_kv_heads} KV heads each")
        places = [np.asarray(own) for row in kept for own in row]
        lens = self.lens.cpu().numpy().astype(np.int64)
        used = -(-lens // self.page_size)
        lasts = np.array([own[-1] if own.ndim == 1 and len(own) else -1 for own in places])
        if (lasts >= used).any():
            raise ValueError(f"kept: expected places below a lane's {used.tolist()} pages, got {lasts.tolist()}")
        gone = self._pages.evict_rows(range(len(places)), places)
        counts = np.array([len(own) for own in places], np.int64)
        self._bounds = counts * self.page_size - np.where(lasts == used - 1, used * self.page_size - lens, 0)
        self.lens = torch.from_numpy(self._bounds.astype(np.int32)).to(self.lens.device)
        self._copy_table()
        return len(gone)

    def store(self, keys: torch.Tensor, values: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor,
              kept: torch.Tensor | None) -> torch.Tensor:
        """Appends a step's tokens to every lane; returns what each may see of it, int64 [batch_size, num_kv_heads,
        new_tokens] tokens.

        keys, values [batch_size, num_kv_heads, new_tokens, head_dim], k_pages and v_pages the layer's, kept
        [batch_size, new_tokens] bool: no padding, None: all. Raises ValueError where pages do not suffice.
        """
        new_tokens, head_dim = keys.shape[2:]
        self._reserve(new_tokens)
        own = None if kept is None else kept.repeat_interleave(self.num_kv_heads, 0)
        counts = torch.arange(1, new_tokens + 1, device=keys.device)[None] if own is None else own.cumsum(1)
        ends = self.lens.long()[:, None] + counts
        k_new, v_new = (new.reshape(-1, new_tokens, 1, head_dim) for new in (keys, values))
        # A padding token alone goes behind the lane's end, where the lane's next one will overwrite it.
        lens, offsets = (self.lens + 1, None) if new_tokens == 1 else (ends[:, -1].int(), self.lens.new_zeros(
            len(ends) + 1))  # fmt: skip
        if offsets is not None:
            torch.cumsum(ends[:, -1] - self.lens, 0, dtype=torch.int32, out=offsets[1:])
        everything = own is None or new_tokens == 1
        k_new, v_new = (new.flatten(0, 1) if everything else new[own] for new in (k_new, v_new))
        append_tokens(k_new, v_new, by_head(k_pages), by_head(v_pages), self.table, lens, offsets)
        self.lens.copy_(ends[:, -1])
        return ends.view(-1, self.num_kv_heads, new_tokens)

    def decode(self, query: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, *, scale: float | None,
               soft_cap: float | None) -> torch.Tensor:
        """Attention of one new token, like query [batch_size, num_q_heads, head_dim]."""
        by_lane = query.reshape(len(self.lens), -1, query.shape[-1])
        out, _ = decode_attention(by_lane, by_head(k_pages), by_head(v_pages), self.table, self.lens, scale, None,
                                  soft_cap, None, None, None)
        return out.view(query.shape)

    def dense(
        self, k_pages: torch.Tensor, v_pages: torch.Tensor, ends: torch.Tensor, num_q_heads: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """(keys, values [batch_size, num_kv_heads, tokens, head_dim], mask [batch_size, num_q_heads, new_tokens,
        tokens]) of all lanes, for several new tokens; ends as store() gave them."""
        ids = self.table[:, : -(-int(self._bounds.max(initial=0)) // self.page_size)].long()
        key, value = (pages[ids].flatten(1, 3).view(*ends.shape[:2], -1, pages.shape[-1])
                      for pages in (by_head(k_pages), by_head(v_pages)))  # fmt: skip
        mask = torch.arange(key.shape[2], device=key.device) < ends[..., None]
        return key, value, mask.repeat_interleave(num_q_heads // self.num_kv_heads, 1)

    def _reserve(self, new_tokens: int) -> None:
        bounds = self._bounds + new_tokens
        more = -(-bounds // self.page_size) - self._pages.seq_lens[: len(bounds)] // self.page_size
        grown = np.flatnonzero(more > 0)
        if len(grown):
            ends = self._pages.extend(grown, more[grown] * self.page_size) // self.page_size + more[grown]
            lanes = np.repeat(grown, more[grown])
            columns = np.arange(len(lanes)) - np.repeat(np.cumsum(more[grown]) - ends, more[grown])
            entries = np.stack([lanes, columns, self._pages.block_table[lanes, columns]])
            lanes, columns, ids = torch.from_numpy(entries).to(self.table.device, non_blocking=True)
            self.table[lanes, columns] = ids.int()
        self._bounds = bounds

    def _copy_table(self) -> None:
        table = np.maximum(self._pages.block_table[: len(self._bounds)], 0)
        self.table = torch.from_numpy(table).to(self.lens.device)  # [lanes, max_pages] int32


def by_head(pool: torch.Tensor) -> torch.Tensor:
    """A pool [num_pages, num_kv_heads, page_size, head_dim] as one of pages of one head, where it lies."""
    return pool.view(-1, 1, *pool.shape[2:])
