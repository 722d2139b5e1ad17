"""Steps whose rows share leading pages, and how they lie in a pool."""
from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from gpu.measure.pools import BenchPool, CellPages
from pkvsim import DecodeShape
from pkvsim.fitting.fit_shared import MeasuredShared
from pkvsim.schedule.costs import SharedCosts, check_shared_costs
from pkvsim.schedule.groups import PrefixGroups


@dataclass(frozen=True, slots=True)
class SharedCell:
    """`groups` groups of as many of the rows each: prefix tokens in common, then `own` tokens of each row."""

    rows: int
    prefix: int
    own: int
    groups: int = 1
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128

    @property
    def name(self) -> str:
        count = f"{self.groups} x {self.rows // self.groups}" if self.groups > 1 else str(self.rows)
        heads = "" if (self.num_q_heads, self.num_kv_heads, self.head_dim) == (32, 8, 128) else (
            f", {self.num_q_heads}/{self.num_kv_heads} heads of {self.head_dim}")  # fmt: skip
        shared = f"{_label(self.prefix)} shared + " if self.prefix else ""
        return f"{count} rows x ({shared}{_label(self.own)} own){heads}"

    @property
    def shape(self) -> DecodeShape:
        return DecodeShape(self.num_q_heads, self.num_kv_heads, self.head_dim, 16)

    def lengths(self) -> np.ndarray:
        return np.full(self.rows, self.prefix + self.own, np.int32)

    def group_of_row(self) -> np.ndarray:
        return np.arange(self.rows, dtype=np.int32) // (self.rows // self.groups)

    def distinct_bytes(self) -> int:
        """Of K and V, 16-bit, each page counted once."""
        tokens = self.groups * self.prefix + self.rows * self.own
        return tokens * self.num_kv_heads * self.head_dim * 2 * 2

    def prefix_groups(self) -> PrefixGroups:
        return PrefixGroups(self.group_of_row(), np.full(self.groups, self.prefix // 16, np.int32))

    def lay_out(self, pool: BenchPool, *, l2_size: int, seed: int) -> CellPages:
        """Scattered pages, those of a prefix in all its rows."""
        parts = np.array([*[self.prefix] * (self.groups if self.prefix else 0), *[self.own] * self.rows], np.int64)
        pages = pool.lay_out(self.shape, parts, kv_bytes=self.distinct_bytes(), l2_size=l2_size, seed=seed)
        if not self.prefix:
            return pages
        prefixes = pages.block_table[: self.groups, : self.prefix // 16][self.group_of_row()]
        return replace(pages, block_table=np.concatenate(
            [prefixes, pages.block_table[self.groups :, : -(-self.own // 16)]], axis=1))  # fmt: skip


def _label(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


CELLS = (
    SharedCell(64, 8192, 512),
    SharedCell(256, 2048, 256),
    SharedCell(8, 32768, 4096),
    SharedCell(64, 4096, 1024, groups=4),
    SharedCell(16, 8192, 512),
    SharedCell(64, 8192, 512, num_q_heads=64, num_kv_heads=8, head_dim=64),
    SharedCell(64, 8192, 512, num_q_heads=28, num_kv_heads=4),
    SharedCell(64, 8192, 512, num_q_heads=32, num_kv_heads=32),
)
# Of what drawn() draws: groups, their rows, shared and own tokens, and head shapes, the commonest more often.
DRAWN_GROUPS, DRAWN_MEMBERS = (1, 1, 1, 2, 4, 8), (2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)
DRAWN_PREFIX, DRAWN_OWN = (512, 32768), (16, 4096)
DRAWN_HEADS = ((32, 8, 128), (32, 8, 128), (32, 8, 128), (28, 4, 128), (64, 8, 64), (32, 32, 128), (64, 8, 128))
MOST_ROWS, MOST_BYTES = 256, 1 << 30  # of distinct K and V


def drawn(count: int, seed: int) -> tuple[SharedCell, ...]:
    """So many steps that share pages, all unlike; lengths are log-uniform in whole pages."""
    rng, cells = np.random.default_rng(seed), []
    while len(cells) < count:
        groups, members = int(rng.choice(DRAWN_GROUPS)), int(rng.choice(DRAWN_MEMBERS))
        prefix, own = (int(16 * round(np.exp(rng.uniform(*np.log(span))) / 16)) for span in (DRAWN_PREFIX, DRAWN_OWN))
        heads = DRAWN_HEADS[rng.integers(len(DRAWN_HEADS))]
        cell = SharedCell(groups * members, prefix, max(16, own), groups, *heads)
        if cell.rows <= MOST_ROWS and cell.distinct_bytes() <= MOST_BYTES and cell not in cells:
            cells.append(cell)
    return tuple(cells)


def costs_of(text: str) -> dict[str, int]:
    """SharedCosts' fields of "merge=0,tile=12". Raises ValueError saying what is wrong of it."""
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in SharedCosts._fields or not value.isdecimal() or name in found:
            raise ValueError(f"costs: expected names of {', '.join(SharedCosts._fields)} once each, with whole "
                             f"numbers, as in merge=0,tile=12, got {text!r}")  # fmt: skip
        found[name] = int(value)
    check_shared_costs(SharedCosts(**found))
    return found


def read_measured(path: Path) -> list[MeasuredShared]:
    """measured_of a file. Raises ValueError naming one that bench_shared has not written."""
    try:
        return measured_of(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: expected what bench_shared --json wrote, got {type(error).__name__}: {error}"
                         ) from None  # fmt: skip


def measured_of(document: dict) -> list[MeasuredShared]:
    """The steps of what bench_shared wrote that were told their groups, once for each way in which they were planned:
    of --drawn, or of the cells, by name."""
    named, found = {cell.name: cell for cell in CELLS}, []
    for result in document["results"]:
        given = {field.name: result[field.name] for field in fields(SharedCell) if field.name in result}
        cell = SharedCell(**given) if given else named.get(result["cell"])
        for name, costs in result.get("costs", {}).items():
            us = result["times"].get(name)
            if us is not None and cell is not None:
                found.append(MeasuredShared(cell.name, cell.shape, cell.lengths(), cell.prefix_groups(), us,
                                            costs=SharedCosts(**costs)))  # fmt: skip
    return found


NOTHING_SHARED = (SharedCell(64, 0, 1024), SharedCell(64, 0, 4096), SharedCell(16, 0, 2048))
