"""Fixed routes, to compare policies with."""
from __future__ import annotations

from dataclasses import replace

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import ROUTES
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.policy.calibrated import CalibratedPolicy
from pkvsim.policy.decision import Decision
from pkvsim.shapes import DecodeShape

FLASHINFER_ROUTES = ("flashinfer_cuda_core", "flashinfer_tensor_core")


class FixedPolicy:
    """Always one route, or always the cheapest of FlashInfer's two kernels (flashinfer), priced by the calibrated
    model."""

    __slots__ = ("name", "_priced")

    def __init__(self, name: str, *, split_splits: int | None = None, workqueue_splits: int | None = None) -> None:
        """name: one of ROUTES or "flashinfer"; the pinned splits as CalibratedPolicy's. Raises ValueError naming the
        argument."""
        if name not in (*ROUTES, "flashinfer"):
            raise ValueError(f"route: expected one of {', '.join(ROUTES)} or flashinfer, got {name!r}")
        self.name = name
        self._priced = CalibratedPolicy(
            allowed=FLASHINFER_ROUTES if name == "flashinfer" else (name,),
            split_splits=split_splits,
            workqueue_splits=workqueue_splits,
        )

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
        """The route, whatever the step; ValueError where it is not available or does not serve the options."""
        decision = self._priced.decide(
            shape, seq_lens, device, layers=layers, available=available, options=options
        )
        return replace(decision, why=f"always {self.name}")
