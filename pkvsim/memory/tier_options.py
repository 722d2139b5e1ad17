"""How a simulated server uses its tiers: which devices, where blocks go, which of them go first, what is loaded."""
from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from pkvsim.memory.memory_pool import MemoryPool
from pkvsim.memory.placement import BANDWIDTH, PLACEMENTS
from pkvsim.memory.restarts import check_flush_s
from pkvsim.memory.retention import ADMISSIONS, BELADY_NAME, LRU_NAME, RETENTIONS, Belady, Lru, TinyLfu
from pkvsim.memory.tiers import Tier, check_tiers

BY_PRICE, ALWAYS_LOAD, ALWAYS_COMPUTE = "price", "load", "recompute"
LOADS = (BY_PRICE, ALWAYS_LOAD, ALWAYS_COMPUTE)


@dataclass(frozen=True, slots=True, kw_only=True)
class TierOptions:
    """How tiers are used. Raises ValueError naming the field.

    serial: a request reads one device after another instead of all at once. link_bytes_per_s: what all loads share on
    their way to the GPU. num_layers: of the model, whose first layers are attended to while later ones arrive; 1 where
    nothing is computed before all is there. hold_cost: with prices and sessions, keeps a session's blocks after a turn
    for as long as retention.choose_ttl_s says by the gaps between turns seen so far; seconds that others lose for each
    second of it. None holds nothing. flush_s: most seconds of a restart in which disks write what host memory holds.
    """

    placement: str = BANDWIDTH
    retention: str = LRU_NAME
    admission: str = "all"
    serial: bool = False
    link_bytes_per_s: float = float("inf")
    num_layers: int = 1
    hold_cost: float | None = None
    flush_s: float = 0.0

    def __post_init__(self) -> None:
        for field, known in (("placement", PLACEMENTS), ("retention", RETENTIONS), ("admission", ADMISSIONS)):
            if getattr(self, field) not in known:
                raise ValueError(f"{field}: expected one of {', '.join(known)}, got {getattr(self, field)!r}")
        if not self.link_bytes_per_s > 0:
            raise ValueError(f"link_bytes_per_s: expected > 0, got {self.link_bytes_per_s!r}")
        if self.hold_cost is not None and not self.hold_cost >= 0:
            raise ValueError(f"hold_cost: expected >= 0 or None, got {self.hold_cost!r}")
        if not isinstance(self.num_layers, int) or self.num_layers < 1:
            raise ValueError(f"num_layers: expected an integer >= 1, got {self.num_layers!r}")
        check_flush_s(self.flush_s)

    def make_pool(
        self, tiers: Sequence[Tier], *, block_bytes: int, next_use: Callable[[Hashable], float]
    ) -> MemoryPool:  # fmt: skip
        """An empty pool. next_use: when a block is next asked for, as of its last use; Belady's retention alone asks
        for it."""
        return MemoryPool(
            tiers,
            block_bytes=block_bytes,
            placement=self.placement,
            retention=(lambda: Belady(next_use)) if self.retention == BELADY_NAME else Lru,
            admission=TinyLfu() if self.admission == "tinylfu" else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSetup:
    """The tiers behind a simulated server's GPU. Raises ValueError naming the field.

    load: what of a prompt's blocks is loaded: as many as give the first token soonest by the model's prices, all that
    are there, or none. host_link_gb_s: of one GPU, to it; None: as the device's file says. hold_cost: as TierOptions
    has it.
    """

    tiers: tuple[Tier, ...]
    placement: str = BANDWIDTH
    retention: str = LRU_NAME
    admission: str = "all"
    load: str = BY_PRICE
    serial: bool = False
    host_link_gb_s: float | None = None
    hold_cost: float | None = None

    def __post_init__(self) -> None:
        check_tiers(self.tiers)
        if self.load not in LOADS:
            raise ValueError(f"load_or_recompute: expected one of {', '.join(LOADS)}, got {self.load!r}")
        if self.host_link_gb_s is not None and not 0 < self.host_link_gb_s < float("inf"):
            raise ValueError(f"host_link: expected GB/s > 0, got {self.host_link_gb_s!r}")
        if self.hold_cost is not None and not self.hold_cost >= 0:
            raise ValueError(f"tier_hold_cost: expected >= 0 or None, got {self.hold_cost!r}")
        self.options(link_bytes_per_s=float("inf"), num_layers=1)

    def options(self, *, link_bytes_per_s: float, num_layers: int) -> TierOptions:
        """The same as pkvsim.memory.simulate_tiers takes it."""
        return TierOptions(
            placement=self.placement, retention=self.retention, admission=self.admission, serial=self.serial,
            link_bytes_per_s=link_bytes_per_s, num_layers=num_layers, hold_cost=self.hold_cost,
        )  # fmt: skip
