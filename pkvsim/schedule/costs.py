"""What the balanced schedule weighs, as one value: from a device's route to the kernels' arguments."""
from __future__ import annotations

import math
from typing import NamedTuple

from pkvsim.shapes import check_int

MAX_ACCUMULATED = 2048  # columns x V's head_dim whose sums a warp's registers hold; more go to several warps
MANY_COLUMNS = 32  # from which on a segment costs MANY_COLUMNS_SEGMENT
# Tiles. Of one run on an H200 (bimodal rows, 32 columns): 20 to 28 took 1.5 % less time than 7. No table of
# examples/results/ holds that figure.
MANY_COLUMNS_SEGMENT = 20
MAX_COST = 2**20  # of a segment and of a range; keeps the planner's sums within 31 bits together with its lengths
MAX_PART_COST = 2**10  # keeps part * MOST_TILES_PER_HEAD within 31 bits
MAX_PAIR_COST = 2**10  # the same of pair * CTAs
EIGHTHS = 8  # of a tile: what a tile of a shared read costs is counted in
SHARED_COLUMNS = 64  # for which SharedCosts.tile is stated
# SharedCosts.tile of a read by warpgroups, whatever its columns. Of 8, 10, 12, 16 and 20 on one H200 in the first five
# cells of bench_shared (2026-11-29) it was the best in three, and 3 and 5 % from it in the others.
WARPGROUP_TILE = 12
MAX_SHARED_COLUMNS = 128  # of a read
MAX_SHARED_COST = 2**8  # of SharedCosts.tile, .least, .segment and .merge
MOST_READ_COST = 2**20  # of the reads for each output, for the root in least_own(): PKV_MOST_TILES in cuda_src/plan.cuh
MERGED_SUMS = 128  # of a row, that SharedCosts.merge counts a tile for


class BalancedCosts(NamedTuple):
    """Costs of the balanced schedule, in tiles of 16 tokens. pkv::Costs in cuda_src/plan.cuh has the same fields.

    segment: what a row segment costs beside its tiles. minimum: the least cost of a range, so that small steps take
    fewer CTAs. part: what merging one more part of a head costs; heads are cut into no more parts than pay for that.
    pair: rows of one length that cost less than this for each CTA get half of the CTAs (balanced_ranges says why).
    """

    segment: int = 0
    minimum: int = 1
    part: int = 0
    pair: int = 0

    def of_kernel(self, *, columns: int, v_head_dim: int, kv_element_bytes: float, page_size: int) -> BalancedCosts:
        """These costs for a kernel whose CTA serves so many columns (query heads times query tokens)."""
        return self._replace(
            segment=segment_of(self.segment, columns),
            pair=paired(self.pair, columns, v_head_dim, kv_element_bytes, page_size),
        )


class SharedCosts(NamedTuple):
    """What the balanced schedule weighs where one read serves several rows, and for how many columns a read is made.

    columns: query columns (the members' query heads times query tokens) that a read serves at most: those of the
    kernel variant that reads for groups. tile: cost of a tile read for 64 columns, in eighths of a plain tile; other
    reads cost in proportion, but none less than `least`, in eighths too. segment: cost of a read's end for each column,
    in eighths of a tile; it costs no less than BalancedCosts.segment or a tile. merge: tiles in whose time a CTA merges
    the output of a member's KV head, from which least_own() follows.

    tile and segment are the best of a sweep on one H200 (2026-11-29, `examples/bench_shared.py --calibrate`: 64 rows of
    8K shared and 512 own tokens, and 8 rows of 32K and 4K).

    pkvsim.pricing.shared_us compiles tile_eighths, segment_tiles and least_own as they stand here.
    """

    columns: int = 64
    tile: int = 24
    least: int = EIGHTHS
    segment: int = 3
    merge: int = 0

    def tile_eighths(self, columns: int) -> int:
        """Cost of a tile that is read for so many columns, in eighths of a plain tile."""
        return max(self.least, -(-columns * self.tile // SHARED_COLUMNS))

    def segment_tiles(self, columns: int, segment: int) -> int:
        """Cost of the end of a read for so many columns, where a plain segment's is `segment` tiles."""
        return max(1, segment, -(-columns * self.segment // EIGHTHS))

    def least_own(self, reads_cost: int, outputs: int) -> int:
        """Tiles that what a member has for itself costs at least, beside BalancedCosts.segment, for each KV head.
        reads_cost: of all reads of the step, in tiles; outputs: members times KV heads.

        CTAs of reads and of rows begin together, but an output is merged when its read has ended: of N CTAs, x of which
        have rows, a step of reads that cost R and of O outputs ends after R / (N - x) + merge * O / x. That is least
        where x : N - x is as sqrt(merge * O) : sqrt(R), which is where the schedule puts it if an output costs
        sqrt(merge * R / O). Where its own tiles cost more, they are what its CTA is busy with.
        """
        # Numba has no math.isqrt. Of at most 2**28, which check_shared_costs leaves, the rounded root is as exact.
        return max(1, int(math.sqrt(self.merge * min(reads_cost // outputs, MOST_READ_COST))))

    def longest_gap(self, columns: int, segment: int, least_own: int) -> int:
        """Most tiles between two places at which a schedule with reads of up to so many columns can be cut."""
        read = self.segment_tiles(columns, segment) - (-self.tile_eighths(columns) // EIGHTHS)
        return max(segment + least_own, read)


# What the engine balances with, from a sweep on an H200 (2026-11-21). The cost of a pair holds on GPUs of compute
# capability PAIRS_MEASURED, whose neighbouring SMs share their way to memory; on others nothing was measured.
MEASURED_COSTS = BalancedCosts(segment=7, minimum=8, part=2, pair=80)
PAIRS_MEASURED = 9, 0


def check_costs(costs: object) -> BalancedCosts:
    """`costs` as plain integers. Raises ValueError naming the field that is none, or out of range."""
    if not isinstance(costs, BalancedCosts):
        raise ValueError(f"costs: expected BalancedCosts, got {costs!r}")
    return BalancedCosts(
        segment=check_int("costs.segment", costs.segment, 0, MAX_COST),
        minimum=check_int("costs.minimum", costs.minimum, 1, MAX_COST),
        part=check_int("costs.part", costs.part, 0, MAX_PART_COST),
        pair=check_int("costs.pair", costs.pair, 0, MAX_PAIR_COST),
    )


def columns_for(batch_columns: int) -> int:
    """Columns that reads are made for in a step whose rows have so many together. Reads for 32 take a quarter less time
    than those for 64 where 32 are all there are (8 rows of 4 heads on one H200, 2026-11-29: 99 and 126 us)."""
    return SHARED_COLUMNS // 2 if batch_columns <= SHARED_COLUMNS // 2 else SHARED_COLUMNS


def default_shared_costs(
    batch_columns: int, *, row_columns: int, value_dim: int, by_warpgroups: bool
) -> SharedCosts:
    """SharedCosts of an engine whose step's rows have so many columns together, row_columns each, of value_dim sums.
    by_warpgroups: reads are multiplied by warpgroups (wgmma), which take the same time for a tile however many columns
    they serve.

    Merging an output takes a tile's time for every MERGED_SUMS sums: half to twice as many tiles all are within 1 % of
    the best, and four times as many are worse, in the 72 steps of examples/results/h200_shared.md, as
    pkvsim.timeline.shared predicts them for an H200. On other GPUs it is an assumption.
    """
    merge = min(MAX_SHARED_COST, max(1, row_columns * value_dim // MERGED_SUMS))
    costs = SharedCosts(columns=columns_for(batch_columns), merge=merge)
    return costs._replace(tile=WARPGROUP_TILE, least=WARPGROUP_TILE) if by_warpgroups else costs


def check_shared_costs(costs: object) -> SharedCosts:
    """`costs` as plain integers. Raises ValueError naming the field that is none, or out of range."""
    if not isinstance(costs, SharedCosts):
        raise ValueError(f"shared_costs: expected SharedCosts, got {costs!r}")
    return SharedCosts(
        columns=check_int("shared_costs.columns", costs.columns, 2, MAX_SHARED_COLUMNS),
        tile=check_int("shared_costs.tile", costs.tile, 0, MAX_SHARED_COST),
        least=check_int("shared_costs.least", costs.least, 1, MAX_SHARED_COST),
        segment=check_int("shared_costs.segment", costs.segment, 0, MAX_SHARED_COST),
        merge=check_int("shared_costs.merge", costs.merge, 0, MAX_SHARED_COST),
    )


def default_costs(compute_capability: tuple[int, int]) -> BalancedCosts:
    """The costs of a GPU that has no route of its own to say them."""
    return MEASURED_COSTS if compute_capability == PAIRS_MEASURED else MEASURED_COSTS._replace(pair=0)


def segment_of(segment: int, columns: int) -> int:
    """BalancedCosts.segment of a kernel whose CTA serves so many columns: its end merges a state of each."""
    return max(segment, MANY_COLUMNS_SEGMENT) if columns >= MANY_COLUMNS else segment


def paired(pair_cost: int, columns: int, v_head_dim: int, kv_element_bytes: float, page_size: int) -> int:
    """BalancedCosts.pair of a kernel: the full one where an SM reads twice as fast as it must, half of it where two
    warps share the columns, 0 for 8-bit pages and for pages of one token, whose SMs are busy with addresses."""
    if kv_element_bytes < 2 or page_size == 1:
        return 0
    return pair_cost if columns * v_head_dim <= MAX_ACCUMULATED else pair_cost // 2
