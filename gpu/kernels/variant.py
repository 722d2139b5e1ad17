"""Which kernel variant a shape runs: the compile-time constants of cuda_src and what they cost in shared memory.

cuda_src/variant.cuh explains every constant.
"""
from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from gpu.kernels.tuned import tuned_choice
from pkvsim import DecodeShape
from pkvsim.devices import route_options
from pkvsim.devices.route_options import HEAD_DIMS, MAX_GROUP_SIZE, MAX_PAGE_SIZE
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.schedule.costs import MAX_ACCUMULATED

TILE_TOKENS = 16  # PKV_TILE in cuda_src/variant.cuh
BARRIER_BYTES = 8  # pkv::ArrivalBarrier in cuda_src/mma.cuh
TEAMS = (1, 2, 4)  # warps that may share their tiles
MOST_TEAMS = 15  # of a CTA: its barriers, less the one that is __syncthreads'
DTYPES = {"float16": 0, "bfloat16": 1}  # value of DTYPE_BF16
CACHE_TYPES = {"float8_e4m3fn": 1, "float8_e5m2": 2, "int8": 3}  # value of CACHE_TYPE; 0 is the queries' own dtype
RECORD_BYTES = 256  # pkv::PlanRecord in cuda_src/early_plan.cuh
STEP_PLAN_BYTES = 512  # pkv::StepPlan in cuda_src/shared_step.cuh
STEP_RECORD_WORDS = 64, 9  # of a CTA and of each thread of pkv::StepRecord there, 8 bytes each
READER_BYTES = 16  # of a row or a group: four ints of pkv::Readers in cuda_src/spans.cuh
LEAST_READERS = 512  # rows and groups that any variant which reads for groups has room for
READ_COLUMNS = 64  # columns that a read is made to serve, where they fit
QUERY_BLOCKS = 16  # blocks of 8 columns x steps of 16 elements whose queries stay in registers (pkv::Width)
GROUP_TILES = 4  # tiles that a warpgroup multiplies with at once
WARPGROUP = 4  # warps of one
MOST_READ_BYTES = 128 * 1024  # in flight, beyond which an H200 gained nothing
SCALES_BYTES = TILE_TOKENS * 2 * 4  # SCALE_BYTES in cuda_src/variant.cuh, with CACHE_SCALES

# Shared memory a CTA may use, bytes, by compute capability (CUDA C++ programming guide, table of technical
# specifications: 1 KiB less than the SM's maximum).
SHARED_LIMIT_BYTES = {80: 163 * 1024, 86: 99 * 1024, 87: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024,
                      100: 227 * 1024, 103: 227 * 1024, 120: 99 * 1024, 121: 99 * 1024}

# (warps, stages) by head_dim where no table was measured, stages being each warp's tiles, which a team puts together.
# The best comes first, and the first that fits is taken: as many bytes in flight as there is room for, up to 128 KiB,
# beyond which an H200 gained nothing.
CALCULATED = {64: ((8, 4), (8, 3), (8, 2), (4, 4), (4, 3), (4, 2), (2, 2)),
              128: ((8, 2), (4, 4), (4, 3), (4, 2), (2, 2), (2, 1), (4, 1)),
              192: ((8, 2), (4, 3), (4, 2), (2, 2), (2, 1), (4, 1)),
              256: ((4, 2), (2, 2), (2, 1), (1, 1), (4, 1))}
# The same for pages of 8 bits, whose tiles have half the bytes: a table is of 16-bit pages. Only 8 x 4 at head_dim 128
# was measured against others (examples/results/h200_decode.md).
CALCULATED_8BIT = {64: ((8, 8), (8, 6), (8, 4), (4, 8), (4, 4), (4, 2), (2, 2)),
                   128: ((8, 4), (8, 3), (8, 2), (4, 4), (4, 3), (4, 2), (2, 2), (2, 1), (4, 1)),
                   192: ((8, 3), (8, 2), (4, 3), (4, 2), (2, 2), (2, 1), (4, 1)),
                   256: ((8, 2), (4, 3), (4, 2), (2, 2), (2, 1), (1, 1), (4, 1))}


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """Compile-time constants of one kernel variant."""

    head_dim: int
    v_dim: int
    group_size: int  # query heads a CTA serves at a time: the shape's group_size / head_split
    query_tokens: int
    head_split: int  # parts of the group, each of which reads the pages for itself
    team: int  # warps that share a ring of tiles, and the columns
    page_size: int
    dtype: str
    warps: int
    stages: int  # tiles of K and V that each ring holds
    buffers: int  # segments whose states can wait for their merge
    windowed: bool
    soft_cap: bool
    sinks: bool
    kv_dtype: str | None  # of the pages; None: dtype
    tile_scales: bool  # tokens or pages have scales of their own, which travel with their tiles
    read_columns: int = 0  # that a read for several rows serves, a multiple of `columns`; 0: no such reads
    read_team: int = 1  # warps that share a ring of its tiles
    read_stages: int = 0  # of each such ring
    read_tiles: int = 0  # that a warpgroup multiplies with at once (wgmma); 0: mma.sync

    @property
    def columns(self) -> int:
        """Columns of the tensor-core product: query heads of each of the row's query tokens."""
        return self.group_size * self.query_tokens

    @property
    def streams(self) -> int:
        """Rings of a CTA, and states of each segment that it merges."""
        return self.warps // self.team

    @property
    def variant(self) -> tuple[int, int]:
        """(warps, stages) as kernel_config takes them."""
        return self.warps, -(-self.stages // self.team)

    @property
    def shared_bytes(self) -> int:
        """Bytes of pkv::SharedMemory: rings with their tiles' scales, the streams' states (rows padded by 4 floats), a
        kept one, barriers."""
        states = (self.buffers * self.streams + 1) * self.columns * self.state_row_bytes
        return self.streams * self.stages * self.slot_bytes + states + self.buffers * 2 * BARRIER_BYTES

    @property
    def slot_bytes(self) -> int:
        """Bytes of a ring's slot: a tile's K, V and scales."""
        element = 2 if self.kv_dtype is None else 1
        return TILE_TOKENS * (self.head_dim + self.v_dim) * element + self.tile_scales * SCALES_BYTES

    @property
    def state_row_bytes(self) -> int:
        """Bytes of a column's state in shared memory."""
        return (self.v_dim + 4) * 4

    @property
    def read_shared_bytes(self) -> int:
        """Bytes of pkv::SharedMemories and pkv::StepPlan; READER_BYTES of each row and group come on top."""
        streams = self.warps // self.read_team
        states = (streams * self.read_columns + 1) * self.state_row_bytes
        reads = streams * self.read_stages * self.slot_bytes + states + 2 * BARRIER_BYTES
        return max(self.shared_bytes, reads) + STEP_PLAN_BYTES

    @property
    def threads(self) -> int:
        return self.warps * 32

    @property
    def state_bytes(self) -> int:
        """Bytes of pkv::Slot: the partial state of one (row, KV head), acc and (m, l) of each column."""
        return self._state_bytes(self.columns)

    def _state_bytes(self, columns: int) -> int:
        return (columns * (self.v_dim * 4 + 8) + 15) // 16 * 16

    def workspace_bytes(self, num_ctas: int, row_heads: int = 0) -> int:
        """Bytes of the balanced kernel's workspace: a slot for each CTA, then a record of its plan. With reads for
        several rows a record of its plan with groups, and two slots for each of `row_heads` (row, KV head)s."""
        plain = self.slots_bytes(num_ctas) + num_ctas * RECORD_BYTES
        if not self.read_columns:
            return plain
        return plain + num_ctas * self.step_record_bytes + 2 * row_heads * self.state_bytes

    @property
    def step_record_bytes(self) -> int:
        """Bytes of pkv::StepRecord: what a CTA planned last of a step with groups."""
        of_cta, of_thread = STEP_RECORD_WORDS
        return 8 * (of_cta + of_thread * self.threads)

    def slots_bytes(self, num_ctas: int) -> int:
        """Bytes of all CTAs' slots, from which their records go on."""
        return num_ctas * self._state_bytes(self.read_columns or self.columns)

    def defines(self) -> dict[str, int]:
        return {"HEAD_DIM": self.head_dim, "V_DIM": self.v_dim, "QUERY_TOKENS": self.query_tokens,
                "WINDOWED": int(self.windowed), "SOFT_CAP": int(self.soft_cap), "SINKS": int(self.sinks),
                "GROUP_SIZE": self.group_size, "HEAD_SPLIT": self.head_split, "TEAM": self.team,
                "PAGE_SIZE": self.page_size, "DTYPE_BF16": DTYPES[self.dtype],
                "WARPS": self.warps, "STAGES": self.stages, "BUFFERS": self.buffers,
                "SHARED_BYTES": self.shared_bytes, "CACHE_TYPE": CACHE_TYPES.get(self.kv_dtype, 0),
                "CACHE_SCALES": int(self.tile_scales)}

    def selected_defines(self, *, selected: bool, page_lse: bool) -> dict[str, int]:
        """Those of the balanced kernels that read lists of pages, or write the mass of every page."""
        return self.defines() | {"SELECTED": int(selected), "PAGE_LSE": int(page_lse)}

    def read_defines(self) -> dict[str, int]:
        """Those of the kernel that reads for several rows."""
        return self.defines() | {"READ_COLUMNS": self.read_columns, "READ_TEAM": self.read_team,
                                 "READ_STAGES": self.read_stages, "READ_TILES": self.read_tiles,
                                 "READ_SHARED_BYTES": self.read_shared_bytes}


def shared_limit_bytes(compute_capability: int) -> int:
    """Shared memory a CTA may use. An architecture that is not listed gets the smallest limit of those that are."""
    return SHARED_LIMIT_BYTES.get(compute_capability, min(SHARED_LIMIT_BYTES.values()))


def divisions(group_size: int, v_dim: int, query_tokens: int = 1) -> list[tuple[int, int]]:
    """(head_split, team)s by which a group's columns fit the registers of warps, the best first: fewest splits, each of
    which reads the pages again, by the smallest team."""
    found = []
    for split in range(1, group_size + 1):
        if group_size % split == 0:
            columns = group_size // split * query_tokens
            shares = ((team, -(-columns // team)) for team in TEAMS)
            found += [(split, team) for team, share in shares
                      if share * v_dim <= MAX_ACCUMULATED][:1]
    return found or [(group_size, TEAMS[-1])]


def variants(shape: DecodeShape, dtype: str, choices: tuple[tuple[int, int], ...], limit_bytes: int,
             options: AttentionOptions = PLAIN) -> list[KernelConfig]:
    """The variants of a shape with these (warps, stages) that fit, of the fewest splits by which any does. Each has
    as many stages of those its team's warps have together, and as many buffers, as fit."""
    v_dim = options.value_dim(shape)
    for split, team in divisions(shape.group_size, v_dim, options.query_tokens):
        found: list[KernelConfig] = []
        for warps, stages in choices:
            rings = itertools.product(range(stages * team, (stages - 1) * team, -1), (2, 1))
            configs = (KernelConfig(
                head_dim=shape.head_dim, v_dim=v_dim, group_size=shape.group_size // split,
                query_tokens=options.query_tokens, head_split=split, team=team, page_size=shape.page_size, dtype=dtype,
                warps=warps, stages=tiles, buffers=buffers,
                windowed=options.window is not None, soft_cap=options.soft_cap is not None, sinks=options.sinks,
                kv_dtype=options.kv_dtype, tile_scales=options.kv_scales in ("page", "token"))
                for tiles, buffers in rings if team == 1 or (warps % team == 0 and warps // team <= MOST_TEAMS))
            found += itertools.islice((config for config in configs if config.shared_bytes <= limit_bytes), 1)
        if found:
            return found
    return []


def kernel_config(shape: DecodeShape, dtype: str, compute_capability: int, *,
                  variant: tuple[int, int] | None = None, options: AttentionOptions = PLAIN,
                  spare_bytes: int = 0) -> KernelConfig:
    """The variant for a shape on a GPU (compute capability as major * 10 + minor): (warps, stages of each) as asked
    for, as tuned, or by calculation. spare_bytes: shared memory that is left for something else.

    Raises ValueError naming the argument that no kernel serves.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype}")
    if shape.head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim: expected one of {HEAD_DIMS}, got {shape.head_dim}")
    v_dim = options.value_dim(shape)
    if v_dim not in HEAD_DIMS:
        raise ValueError(f"v_head_dim: expected one of {HEAD_DIMS}, got {v_dim}")
    if shape.group_size > MAX_GROUP_SIZE:
        raise ValueError(f"group_size: expected at most {MAX_GROUP_SIZE}, got {shape.group_size}")
    if shape.page_size > MAX_PAGE_SIZE:
        raise ValueError(f"page_size: expected 1 to {MAX_PAGE_SIZE}, got {shape.page_size}")
    if compute_capability < 80:
        raise ValueError(f"device: expected compute capability 8.0 or newer, got {compute_capability / 10:.1f}")
    choices: tuple[tuple[int, int], ...]
    if variant:
        choices = (variant,)
    elif options.kv_dtype is not None:
        choices = CALCULATED_8BIT[shape.head_dim]
    else:
        choices = tuned_choice(shape, dtype, compute_capability) + CALCULATED[shape.head_dim]
    limit_bytes = shared_limit_bytes(compute_capability) - spare_bytes
    fitting = variants(shape, dtype, choices, limit_bytes, options)
    if not fitting:
        raise ValueError(f"{'variant' if variant else 'shape'}: no kernel variant of head_dim {shape.head_dim} and "
                         f"group_size {shape.group_size} fits {limit_bytes} bytes of "
                         "shared memory")
    return fitting[0]


def reads_by_warpgroups(config: KernelConfig, compute_capability: int) -> bool:
    """Whether its reads are multiplied by wgmma."""
    return config.warps % WARPGROUP == 0 and route_options.reads_by_warpgroups(
        head_dim=config.head_dim, v_head_dim=config.v_dim, page_size=config.page_size, kv_dtype=config.kv_dtype,
        compute_capability=divmod(compute_capability, 10))


def read_config(config: KernelConfig, compute_capability: int, *, columns: int = READ_COLUMNS,
                stages: int | None = None, tiles: int | None = None) -> KernelConfig:
    """`config` with reads for several rows: as near `columns` as a team's registers hold, and as many stages as fit, or
    so many. tiles: of a warpgroup's products, where it makes them, or 0 for none.

    Raises ValueError naming the argument where a read cannot serve two rows, or a window may hide what it reads.
    """
    if config.windowed:
        raise ValueError("window: expected None with groups, of whose pages it may hide some")
    if config.head_split > 1:
        raise ValueError(f"groups: expected at most {config.columns} query columns of a row, got "
                         f"{config.columns * config.head_split} (group_size times query_tokens)")
    blocks = min(MAX_ACCUMULATED // config.v_dim // 8, QUERY_BLOCKS // (config.head_dim // 16))
    teams = [team for team in TEAMS if config.warps % team == 0 and config.warps // team <= MOST_TEAMS]
    if not reads_by_warpgroups(config, compute_capability):
        tiles = 0
    elif tiles is None:  # rings hold whole groups
        tiles = next((count for count in (GROUP_TILES, GROUP_TILES // 2) if (stages or count) % count == 0), 0)
    most = config.warps // WARPGROUP * READ_COLUMNS if tiles else teams[-1] * blocks * 8
    served = min(columns, most) // config.columns * config.columns
    if tiles:
        teams = [WARPGROUP] if served <= READ_COLUMNS else [2 * WARPGROUP]
    if served < 2 * config.columns:
        raise ValueError(f"groups: expected at most {min(columns, most) // 2} query columns of a row "
                         f"(group_size times query_tokens), so that a read serves two, got {config.columns}")
    limit = shared_limit_bytes(compute_capability) - LEAST_READERS * READER_BYTES
    # The rows' rings leave room for the plan: where they do not, with one buffer less, then with stages less.
    rows = itertools.product(range(config.stages, 0, -config.team), range(config.buffers, 0, -1))
    for row_stages, buffers in rows:
        found: list[KernelConfig] = []
        for team in (team for team in teams if tiles or team * blocks * 8 >= served):
            step = tiles or 1
            deepest = MOST_READ_BYTES // (config.warps // team * config.slot_bytes) // step * step
            found += itertools.islice((
                fitting for depth in ((stages,) if stages else range(deepest, 0, -step))
                if (fitting := replace(config, stages=row_stages, buffers=buffers, read_columns=served, read_team=team,
                                       read_stages=depth, read_tiles=tiles)).read_shared_bytes <= limit), 1)
        # A smaller team reads the tiles from shared memory less often, but its rings are more.
        if found:
            return next((fitting for fitting in found if fitting.read_stages > 1), found[0])
    raise ValueError(f"{'stages' if stages else 'groups'}: reads for {served} columns of head_dim {config.head_dim} do "
                     f"not fit {limit} bytes of shared memory")


def most_readers(config: KernelConfig, compute_capability: int) -> int:
    """Rows and groups together that a step with reads for several rows may have: their plan is in shared memory."""
    return (shared_limit_bytes(compute_capability) - config.read_shared_bytes) // READER_BYTES
