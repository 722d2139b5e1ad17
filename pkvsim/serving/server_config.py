"""How a simulated server is set up."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pkvsim.memory.prefix_cache import KINDS
from pkvsim.schedule.shares import MAX_RANKS
from pkvsim.serving.orders import ORDERS
from pkvsim.shapes import MAX_TOKENS, check_int

ROUTERS = ("round-robin", "least-tokens", "prefix")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingConfig:
    """How the server is set up. Fractions are of what the GPU could do. Raises ValueError naming the field."""

    page_size: int = 16  # tokens
    max_batch: int = 256  # most requests running at once
    step_tokens: int = 2048  # most tokens of a step, at least max_batch
    kv_gib: float | None = None  # GiB of KV pages; None: what the model leaves of memory_fraction
    memory_fraction: float = 0.9  # of the GPU's memory that the server may use
    workspace_gib: float = 1.0  # activations, CUDA context and graphs, taken from that
    keep_free_fraction: float = 0.01  # of the pages, that an admission leaves while other requests run
    compute_efficiency: float = 0.6  # of fp16_tflops that matrix products reach
    prefill_attention_efficiency: float = 0.45  # of fp16_tflops that prefill attention reaches
    host_us: float = 0.0  # host time of a step that the GPU waits for, beside attention's
    graphs: bool = False  # decode in captured graphs: attention waits for no host but its planning
    prefix_cache: str = "none"  # one of prefix_cache.KINDS
    order: str = "fcfs"  # who runs first, one of orders.ORDERS
    kv_ttl_s: float = 10.0  # continuum: how long a request's KV is kept for the one that follows it
    replicas: int = 1  # equal servers behind a router
    kv_parallel: int = 1  # GPUs of a server that hold every row's KV together, each with all weights
    router: str = "round-robin"  # one of ROUTERS, see pkvsim.serving.replicas
    splits: int | None = None  # splits of every row on the routes that take them; None: each route's own rule

    def __post_init__(self) -> None:
        check_int("page_size", self.page_size, 1, MAX_TOKENS)
        check_int("max_batch", self.max_batch, 1, 1 << 16)
        check_int("step_tokens", self.step_tokens, self.max_batch, 1 << 20)
        for name in ("memory_fraction", "compute_efficiency", "prefill_attention_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number in (0, 1], got {getattr(self, name)!r}")
        if not 0 <= self.keep_free_fraction < 1:
            raise ValueError(f"keep_free_fraction: expected a number in [0, 1), got {self.keep_free_fraction!r}")
        check_int("replicas", self.replicas, 1, 1024)
        check_int("kv_parallel", self.kv_parallel, 1, MAX_RANKS)
        if self.router not in ROUTERS:
            raise ValueError(f"router: expected one of {', '.join(ROUTERS)}, got {self.router!r}")
        if self.order not in ORDERS:
            raise ValueError(f"order: expected one of {', '.join(ORDERS)}, got {self.order!r}")
        for name in ("workspace_gib", "host_us", "kv_ttl_s"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)!r}")
        if self.kv_gib is not None and not 0 < self.kv_gib < np.inf:
            raise ValueError(f"kv_gib: expected a number > 0, got {self.kv_gib!r}")
        if self.splits is not None:
            check_int("splits", self.splits, 1, MAX_TOKENS)
        if self.prefix_cache not in KINDS:
            raise ValueError(f"prefix_cache: expected one of {', '.join(KINDS)}, got {self.prefix_cache!r}")
