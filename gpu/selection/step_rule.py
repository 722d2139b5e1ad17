"""Which steps select pages: the decision of pkvsim.policy.selecting, on what the host knows of a step."""
from __future__ import annotations

import numpy as np

from pkvsim import DecodeShape
from pkvsim.devices.device import DeviceSpec
from pkvsim.policy.selecting import SelectionPrices, selection_prices
from pkvsim.selection.setup import SelectionSetup

ROUNDED_TO = 64  # tokens: bounds that grow by one a step are priced once in so many steps
MOST_KNOWN = 1024  # decisions that are remembered


class StepRule:
    """Whether a step of rows of so many tokens at most selects, by price on one GPU. It needs no GPU itself."""

    __slots__ = ("device", "setup", "_prices", "_known")

    def __init__(self, device: DeviceSpec | None, setup: SelectionSetup) -> None:
        """device: by whose prices; None: nobody knows them, and every step selects."""
        self.device, self.setup = device, setup
        self._prices: dict[DecodeShape, SelectionPrices] = {}
        self._known: dict[tuple[DecodeShape, bytes], bool] = {}

    def pays(self, shape: DecodeShape, bounds: np.ndarray) -> bool:
        """bounds [batch_size] integers: tokens that each row has at most. ValueError naming what no kernel serves."""
        if self.device is None:
            return True
        rounded = (-(-np.asarray(bounds, np.int64) // ROUNDED_TO) * ROUNDED_TO).astype(np.int32)
        key = shape, np.sort(rounded).tobytes()
        if key not in self._known:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            if shape not in self._prices:
                self._prices[shape] = selection_prices(shape, self.device, self.setup)
            self._known[key] = self._prices[shape].of(rounded).pays
        return self._known[key]
