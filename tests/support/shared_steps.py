"""Decode steps on the GPU whose rows share leading pages, with poison in every byte that no row owns."""
from __future__ import annotations

import numpy as np
import torch
from decode_ref import Case, fill_owned, make_table, pages_of

from pkvsim import DecodeShape
from pkvsim.schedule.groups import PrefixGroups


def share(table: np.ndarray, lens: np.ndarray, groups: PrefixGroups, page_size: int) -> np.ndarray:
    """The table with the pages of each group's first long row in all its long rows."""
    table, first = table.copy(), {}
    for row, group in enumerate(groups.group_of_row.tolist()):
        prefix = int(groups.prefix_pages[group]) if group >= 0 else 0
        if 0 < prefix * page_size <= lens[row]:
            table[row, :prefix] = table[first.setdefault(group, row), :prefix]
    return table


def random_groups(
    rng: np.random.Generator, rows: int, max_pages: int, page_size: int
) -> tuple[np.ndarray, PrefixGroups]:
    """(lens, groups): several groups, rows in none, rests of no tokens, rows too short for theirs and empty ones."""
    num_groups = int(rng.integers(1, 4))
    pages = rng.integers(0, max_pages, num_groups)
    group_of_row = rng.integers(-1, num_groups, rows)
    base = np.where(group_of_row >= 0, pages[group_of_row], 0) * page_size
    room = max_pages * page_size
    lens = np.clip(base + rng.choice([0, 0, 1, 15, 16, 100, 300, -40], rows), 0, room)
    lens[rng.random(rows) < 0.1] = 0
    return lens.astype(np.int32), PrefixGroups(group_of_row, pages)


def make_shared_case(shape: DecodeShape, lens: np.ndarray, groups: PrefixGroups, *, dtype: str = "float16",
                     seed: int = 0) -> Case:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    needed = int(pages_of(lens, shape.page_size).sum())
    table = make_table(lens, shape.page_size, rng.permutation(needed + 5)[:needed].astype(np.int32))
    table = share(table, lens, groups, shape.page_size)
    page = (needed + 5, shape.num_kv_heads, shape.page_size, shape.head_dim)
    pools = [torch.full(page, float("nan"), dtype=getattr(torch, dtype), device="cuda") for _ in range(2)]
    for pool, scale in zip(pools, (1.0, 0.5)):
        fill_owned(pool, table, lens, scale=scale)  # only full pages are shared, so no row's end poisons another's
    q = torch.randn(len(lens), shape.num_q_heads, shape.head_dim, device="cuda").to(getattr(torch, dtype))
    return Case(shape=shape, q=q, k_pages=pools[0], v_pages=pools[1], block_table=torch.from_numpy(table).cuda(),
                seq_lens=torch.from_numpy(lens).cuda())

