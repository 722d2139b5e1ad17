"""Steps for FlashInfer's cascade of two levels, and what their attention is."""
from __future__ import annotations

import numpy as np
import torch
from torch_paged import paged_attention

from pkvsim import DecodeShape

SHAPE = DecodeShape(4, 2, 8, 4)


class CascadeStep:
    """Groups of (rows, prefix pages), own tokens of every row; `queries` query tokens each."""

    def __init__(self, groups: list[tuple[int, int]], own: list[int], *, queries: int = 1, seed: int = 0,
                 shape: DecodeShape = SHAPE, device: str = "cpu") -> None:
        torch.manual_seed(seed)
        page = shape.page_size
        members, prefix = zip(*groups)
        own_pages = [-(-tokens // page) for tokens in own]
        ids = torch.randperm(sum(prefix) + sum(own_pages) + 2).to(torch.int32)
        ends = [np.cumsum([0, *counts]).astype(np.int32) for counts in (prefix, own_pages)]
        level_ids = ids[:ends[0][-1]], ids[ends[0][-1]:ends[0][-1] + ends[1][-1]]
        queries_of = [np.cumsum([0, *members]) * queries, np.arange(len(own) + 1) * queries]
        last = [[page] * len(members), [(tokens - 1) % page + 1 if tokens else 0 for tokens in own]]
        self.levels = tuple([torch.as_tensor(np.asarray(array, np.int32)) for array in level] for level in
                            (queries_of, ends, [i.numpy() for i in level_ids], last))
        rows = []
        for group, (count, _) in enumerate(groups):
            for row in range(len(rows), len(rows) + count):
                begin, end = ends[1][row], ends[1][row + 1]
                rows.append([*level_ids[0][ends[0][group]:ends[0][group + 1]].tolist(),
                             *level_ids[1][begin:end].tolist()])
        self.table = torch.zeros(len(own), max(1, *map(len, rows)), dtype=torch.int32)
        for row, pages in enumerate(rows):
            self.table[row, :len(pages)] = torch.tensor(pages, dtype=torch.int32)
        group_of_row = np.repeat(np.arange(len(members)), members)
        self.lens = torch.tensor([page * prefix[group] + tokens for group, tokens in zip(group_of_row, own)],
                                 dtype=torch.int32)
        pool = len(ids), shape.num_kv_heads, page, shape.head_dim
        self.k, self.v = (torch.randn(pool).half().to(device) for _ in range(2))
        self.q = torch.randn(len(own) * queries, shape.num_q_heads, shape.head_dim).half().to(device)
        self.table, self.lens, self.queries = self.table.to(device), self.lens.to(device), queries

    def expected(self, **options: object) -> torch.Tensor:
        """In float64, rounded."""
        q = self.q if self.queries == 1 else self.q.unflatten(0, (len(self.lens), self.queries))
        return paged_attention(q, self.k, self.v, self.table, self.lens, **options)[0].view(self.q.shape)
