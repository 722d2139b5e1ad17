"""Fixed routes, to compare policies with."""
from __future__ import annotations

from dataclasses import replace

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import ROUTES
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.policy.calibrated import HOST_ROUTES, CalibratedPolicy
from pkvsim.policy.decision import Decision
from pkvsim.shapes import DecodeShape


class FixedPolicy:
    """Always one route, priced by the calibrated model."""

    __slots__ = ("name", "route", "_priced")

    def __init__(self, route: str, *, split_splits: int | None = None, workqueue_splits: int | None = None) -> None:
        """route: one of ROUTES; the pinned splits as CalibratedPolicy's. Raises ValueError naming the argument."""
        if route not in ROUTES:
            raise ValueError(f"route: expected one of {', '.join(ROUTES)}, got {route!r}")
        self.name = self.route = route
        self._priced = CalibratedPolicy(split_splits=split_splits, workqueue_splits=workqueue_splits)

    def split_counts(
        self, route: str, shape: DecodeShape, seq_lens: np.ndarray, device: DeviceSpec, *,
        options: AttentionOptions = PLAIN,
    ) -> np.ndarray:  # fmt: skip
        """As CalibratedPolicy's."""
        return self._priced.split_counts(route, shape, seq_lens, device, options=options)

    def decide(
        self, shape: DecodeShape, seq_lens: np.ndarray, device: DeviceSpec, *, layers: int = 1,
        available: tuple[str, ...] = ROUTES, options: AttentionOptions = PLAIN,
    ) -> Decision:  # fmt: skip
        """The route, whatever the step; ValueError where it is not available."""
        cheapest = self._priced.decide(
            shape, seq_lens, device, layers=layers, available=available, options=options
        )
        if self.route not in cheapest.prices:
            raise ValueError(f"available: expected {self.route} among them, got {', '.join(cheapest.prices)}")
        splits = None
        if self.route in HOST_ROUTES:
            splits = self.split_counts(self.route, shape, seq_lens, device, options=options)
        return replace(cheapest, route=self.route, splits=splits, why=f"always {self.route}")
