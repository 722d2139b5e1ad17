"""What a policy is, and what it decides."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import ROUTES
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.shapes import DecodeShape


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """The route of one step. splits [batch_size] int64 for split and workqueue, None for the others."""

    route: str
    splits: np.ndarray | None
    prices: dict[str, float]  # us by route for the step by the wall clock; every route, candidate or not
    why: str | Callable[[], str]  # the reason, or what builds it
    # Where a policy knows them, by route:
    host_us: dict[str, float] = field(default_factory=dict)  # of prices, what is not the GPU's: planning, issuing
    layer_us: dict[str, float] = field(default_factory=dict)  # kernel time of a layer that follows another

    @property
    def reason(self) -> str:
        """Why this route, in words; built when asked for, because a step has no time for it."""
        return self.why if isinstance(self.why, str) else self.why()


class Policy(Protocol):
    """Chooses a step's route from its lengths alone."""

    @property
    def name(self) -> str:
        """As `make_policy` takes it."""
        ...

    def decide(
        self, shape: DecodeShape, seq_lens: np.ndarray, device: DeviceSpec, *, layers: int = 1,
        available: tuple[str, ...] = ROUTES, options: AttentionOptions = PLAIN,
    ) -> Decision:  # fmt: skip
        """The route among `available` for seq_lens [batch_size] integers (zero-length rows are not active), planned
        once for `layers` layers of attention with these options."""
