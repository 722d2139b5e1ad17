"""The oracle: what the closed form of CalibratedPolicy is measured against."""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pkvsim.devices.derive import device_routes
from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import ROUTES
from pkvsim.devices.route_options import as_read
from pkvsim.options import AttentionOptions
from pkvsim.policy.calibrated import CalibratedPolicy, Prepared
from pkvsim.policy.choose import cheapest, choose
from pkvsim.pricing.step_times import step_times
from pkvsim.shapes import DecodeShape
from pkvsim.timeline.timeline import makespan_us


@dataclass(frozen=True, slots=True, kw_only=True)
class OraclePolicy(CalibratedPolicy):
    """The cheapest route by the simulated timeline of every one; options as in CalibratedPolicy."""

    name: ClassVar[str] = "oracle"

    def _choose(
        self, shape: DecodeShape, seq_lens: np.ndarray, ordered: np.ndarray, device: DeviceSpec, ready: Prepared,
        layers: int, options: AttentionOptions,
    ) -> int:  # fmt: skip
        routing, prices = ready.routing, ready.prices
        choose(ordered, layers, routing, prices)  # the splits are the closed form's
        for index, route in enumerate(ROUTES):
            if np.isfinite(prices.layer_us[index]):
                prices.layer_us[index] = makespan_us(
                    device_routes(device)[route], shape, seq_lens, num_sms=device.num_sms,
                    splits=self.pinned_splits(route), options=as_read(route, options),
                )  # fmt: skip
        step_times(ordered, layers, routing.candidates.constants, prices.layer_us, prices.gpu_us, prices.host_us)
        return cheapest(routing.allowed, prices)
