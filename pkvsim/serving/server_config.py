"""How a simulated server is set up."""
from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pkvsim.kv_types import KV_DTYPES
from pkvsim.memory.prefix_cache import KINDS
from pkvsim.memory.tier_options import TierSetup
from pkvsim.options import MAX_QUERY_TOKENS
from pkvsim.outside.engine_profile import EngineProfile, get_profile
from pkvsim.schedule.shares import MAX_RANKS
from pkvsim.selection.setup import SelectionSetup
from pkvsim.serving.orders import ORDERS
from pkvsim.shapes import MAX_TOKENS, check_int

ROUTERS = ("round-robin", "least-tokens", "prefix")
MAX_DRAFT_SEED = (1 << 62) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingConfig:
    """How the server is set up. Raises ValueError naming the field."""

    engine: str = "pkv"  # what serves, one of pkvsim.outside.engine_profile.PROFILES
    page_size: int = 16  # tokens
    max_batch: int = 256  # most requests running at once
    step_tokens: int = 2048  # most tokens of a step, at least max_batch
    kv_gib: float | None = None  # GiB of KV pages; None: what the model leaves of memory_fraction
    memory_fraction: float = 0.9  # of the GPU's memory that the server may use
    workspace_gib: float | None = None  # activations, CUDA context and graphs, taken from that; None: the engine's
    keep_free_fraction: float | None = None  # of the pages, that an admission leaves; None: the engine's
    kv_dtype: str | None = None  # of the cache, one of pkvsim.kv_types.KV_DTYPES; None: 16 bits
    graphs: bool | None = None  # decode in captured graphs, for which no layer waits for the host; None: as the engine
    steps_in_flight: int | None = None  # 2: a step is planned when the one before starts; None: as the engine
    prefix_cache: str = "none"  # one of prefix_cache.KINDS
    shared_reads: bool = True  # rows that hit the same blocks read them once, where the engine can: shares_reads
    order: str = "fcfs"  # who runs first, one of orders.ORDERS
    kv_ttl_s: float = 10.0  # continuum: how long a request's KV is kept for the one that follows it
    replicas: int = 1  # equal servers behind a router
    kv_parallel: int = 1  # GPUs of a server that hold every row's KV together, each with all weights
    prefill_replicas: int = 0  # servers that compute prompts for the replicas, which decode alone; 0: each does both
    transfer_gb_s: float | None = None  # at which a prompt's KV goes over; None: the GPU's link
    router: str = "round-robin"  # one of ROUTERS, see pkvsim.serving.replicas
    splits: int | None = None  # splits of every row on the routes that take them; None: each route's own rule
    tiers: TierSetup | None = None  # of KV beyond HBM
    select: SelectionSetup | None = None  # decode steps read selected pages where that pays
    query_tokens: int = 1  # of a row that decodes: one, and the drafts that a step checks (speculative decoding)
    acceptance: float | None = None  # probability that a draft is accepted where those before it were
    # Time of drafting one token for all rows, as a part of their step without drafts (Leviathan's c); None: what the
    # model's prediction heads read, or nothing where it has none.
    draft_cost: float | None = None
    draft_seed: int = 0  # of which drafts are accepted

    def __post_init__(self) -> None:
        check_int("page_size", self.page_size, 1, MAX_TOKENS)
        check_int("max_batch", self.max_batch, 1, 1 << 16)
        check_int("step_tokens", self.step_tokens, self.max_batch, 1 << 20)
        check_int("query_tokens", self.query_tokens, 1, MAX_QUERY_TOKENS)
        check_int("draft_seed", self.draft_seed, 0, MAX_DRAFT_SEED)
        if self.max_batch * self.query_tokens > self.step_tokens:
            raise ValueError(
                f"step_tokens: expected at least max_batch {self.max_batch} x query_tokens {self.query_tokens}, "
                f"got {self.step_tokens}"
            )
        if (self.acceptance is None) != (self.query_tokens == 1):
            given = "None" if self.acceptance is None else f"{self.acceptance:g}"
            raise ValueError(
                f"acceptance: expected a number with query_tokens > 1 and None with 1, got {given} with "
                f"{self.query_tokens}"
            )
        if self.acceptance is not None and not 0 <= self.acceptance <= 1:
            raise ValueError(f"acceptance: expected a number in [0, 1], got {self.acceptance!r}")
        if self.draft_cost is not None and (self.query_tokens == 1 or not 0 <= self.draft_cost < np.inf):
            raise ValueError(
                f"draft_cost: expected a number >= 0 with query_tokens > 1, got {self.draft_cost!r} with "
                f"{self.query_tokens}"
            )
        get_profile(self.engine)
        if not 0 < self.memory_fraction <= 1:
            raise ValueError(f"memory_fraction: expected a number in (0, 1], got {self.memory_fraction!r}")
        if self.keep_free_fraction is not None and not 0 <= self.keep_free_fraction < 1:
            raise ValueError(f"keep_free_fraction: expected a number in [0, 1), got {self.keep_free_fraction!r}")
        if self.kv_dtype is not None and self.kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype: expected None or one of {', '.join(KV_DTYPES)}, got {self.kv_dtype!r}")
        if self.steps_in_flight is not None:
            check_int("steps_in_flight", self.steps_in_flight, 1, 2)
        check_int("replicas", self.replicas, 1, 1024)
        check_int("kv_parallel", self.kv_parallel, 1, MAX_RANKS)
        check_int("prefill_replicas", self.prefill_replicas, 0, 1024)
        if self.transfer_gb_s is not None and not 0 < self.transfer_gb_s < np.inf:
            raise ValueError(f"transfer_gb_s: expected a number > 0, got {self.transfer_gb_s!r}")
        if self.router not in ROUTERS:
            raise ValueError(f"router: expected one of {', '.join(ROUTERS)}, got {self.router!r}")
        if self.order not in ORDERS:
            raise ValueError(f"order: expected one of {', '.join(ORDERS)}, got {self.order!r}")
        for name in ("workspace_gib", "kv_ttl_s"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)!r}")
        if self.kv_gib is not None and not 0 < self.kv_gib < np.inf:
            raise ValueError(f"kv_gib: expected a number > 0, got {self.kv_gib!r}")
        if self.splits is not None:
            check_int("splits", self.splits, 1, MAX_TOKENS)
        if self.prefix_cache not in KINDS:
            raise ValueError(f"prefix_cache: expected one of {', '.join(KINDS)}, got {self.prefix_cache!r}")
        if self.select is not None:
            self._check_select()

    def _check_select(self) -> None:
        for name, served, got in (
            ("engine", self.engine == "pkv", self.engine), ("kv_parallel", self.kv_parallel == 1, self.kv_parallel),
            ("kv_dtype", self.kv_dtype is None, self.kv_dtype), ("tiers", self.tiers is None, "some"),
            ("query_tokens", self.query_tokens == 1, self.query_tokens),
        ):  # fmt: skip
            if not served:
                wanted = {"engine": "pkv", "kv_dtype": "16 bits", "tiers": "none"}.get(name, "1")
                raise ValueError(f"{name}: expected {wanted} where pages are selected, got {got}")

    @property
    def profile(self) -> EngineProfile:
        """The engine's habits, those that are set here as they are set."""
        profile = get_profile(self.engine)
        if self.graphs is not None:
            profile = profile.with_graphs(self.graphs)
        if self.workspace_gib is not None:
            profile = replace(profile, workspace_gib=self.workspace_gib)
        if self.keep_free_fraction is not None:
            profile = replace(profile, keep_free_fraction=self.keep_free_fraction)
        if self.steps_in_flight is not None:
            profile = replace(profile, steps_in_flight=self.steps_in_flight)
        return profile

    @property
    def shares_reads(self) -> bool:
        """Whether rows may read together: of one copy of their blocks, on one GPU, by our own kernels, whose columns
        a row's drafts would take."""
        alone = self.kv_parallel == 1 and self.query_tokens == 1
        return self.shared_reads and self.prefix_cache != "none" and self.engine == "pkv" and alone

    def to_dict(self) -> dict[str, Any]:
        """Every setting, what the engine decides included."""
        profile = self.profile
        decided = {
            "workspace_gib": profile.workspace_gib, "keep_free_fraction": profile.keep_free_fraction,
            "graphs": bool(profile.graph_sizes), "steps_in_flight": profile.steps_in_flight,
        }  # fmt: skip
        select = None if self.select is None else self.select.to_dict()
        return asdict(self) | decided | {"select": select}
