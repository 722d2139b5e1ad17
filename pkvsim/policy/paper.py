"""The paper's policy (arXiv 2606.26666): gates, split counts and roofline prices."""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.route_model import ROUTES
from pkvsim.devices.route_options import asked
from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.policy.decision import Decision
from pkvsim.policy.paper_rules import (
    MAX_SPLITS,
    MIN_WORKQUEUE_ROWS,
    PAPER_GROUP_SIZE,
    PAPER_TILE_TOKENS,
    paper_time_us,
    split_splits,
    workqueue_splits,
)
from pkvsim.pricing.counters import merge_bytes, useful_kv_bytes
from pkvsim.shapes import MAX_TOKENS, DecodeShape, check_int, check_seq_lens

PAPER_ROUTES = ("flashinfer", "split", "workqueue")


def paper_price_us(
    *, kv_bytes: int, merge_bytes: int, launches: int, ctas_per_sm: float, device: DeviceSpec
) -> float:
    """The paper's price of a step, as pkvsim.policy.paper_rules.paper_time_us."""
    return paper_time_us(
        kv_bytes, merge_bytes, launches, ctas_per_sm, device.beta_gb_s, device.launch_us, device.min_ctas_per_sm
    )


@dataclass(frozen=True, slots=True)
class PaperPolicy:
    """The paper's gates and roofline prices.

    min_context: steps whose longest row is shorter (tokens) go to FlashInfer; 0 reproduces the paper's
    B1 logs, which contradict its stated gate. split_splits, workqueue_splits: pinned split counts, as
    in the paper's timed runs; None takes the paper's own formulas.
    """

    name: ClassVar[str] = "paper"
    min_context: int = 16384
    split_splits: int | None = None
    workqueue_splits: int | None = None

    def __post_init__(self) -> None:
        check_int("min_context", self.min_context, 0, MAX_TOKENS)
        for name in ("split_splits", "workqueue_splits"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1, MAX_TOKENS)

    def split_counts(self, route: str, shape: DecodeShape, seq_lens: np.ndarray) -> np.ndarray:
        """Splits to ask of each row [batch_size] int64; make_schedule cuts them down to a row's tiles."""
        tiles = -(-seq_lens.astype(np.int64) // PAPER_TILE_TOKENS)
        pinned = self.split_splits if route == "split" else self.workqueue_splits
        if pinned is not None:
            return np.full(len(tiles), pinned, np.int64)
        rows, heads = int(np.count_nonzero(tiles)), shape.num_kv_heads
        if route == "workqueue":
            return np.array([workqueue_splits(count, rows, heads) for count in tiles.tolist()], np.int64)
        used = tiles[tiles > 0]
        shortest = int(used.min(initial=MAX_SPLITS))
        return np.full(len(tiles), split_splits(int(used.max(initial=0)), shortest, rows, heads), np.int64)

    def price_us(self, route: str, shape: DecodeShape, seq_lens: np.ndarray, device: DeviceSpec) -> float:
        """The paper's price of one step on a route, gates aside."""
        lens = seq_lens[seq_lens > 0]
        kv_bytes = useful_kv_bytes(shape, lens)
        ctas_per_split = len(lens) * shape.num_kv_heads
        if route == "flashinfer" or not len(lens):
            return paper_price_us(
                kv_bytes=kv_bytes, merge_bytes=0, launches=1, ctas_per_sm=ctas_per_split / device.num_sms, device=device
            )
        # The paper's model knows one S per step: the largest row's, within its tiles.
        asked = self.split_counts(route, shape, lens)
        splits = int(np.minimum(asked, -(-lens.astype(np.int64) // PAPER_TILE_TOKENS)).max())
        return paper_price_us(
            kv_bytes=kv_bytes,
            merge_bytes=merge_bytes(shape, ctas_per_split * splits),
            launches=2 * len(np.unique(lens)) if route == "split" else 2,
            ctas_per_sm=ctas_per_split * splits / device.num_sms,
            device=device,
        )

    def decide(
        self, shape: DecodeShape, seq_lens: np.ndarray, device: DeviceSpec, *, layers: int = 1,
        available: tuple[str, ...] = ROUTES, options: AttentionOptions = PLAIN,
    ) -> Decision:  # fmt: skip
        """The cheapest candidate route for seq_lens [batch_size] (zero-length rows are not active).

        The paper's formula knows no planning, so `layers` multiplies every price alike; and it knows one FlashInfer,
        without which (none of its routes in `available`) the cheaper of split and workqueue is taken. Nor does it know
        attention options: a ValueError names them.
        """
        if asked(shape, options):
            raise ValueError(f"options: expected plain attention with the policy {self.name}, got {options}")
        lens = check_seq_lens(seq_lens)
        prices = {route: layers * self.price_us(route, shape, lens, device) for route in PAPER_ROUTES}
        active, longest = int(np.count_nonzero(lens)), int(lens.max(initial=0))
        if not any(name.startswith("flashinfer") for name in available):
            route = min(PAPER_ROUTES[1:], key=prices.__getitem__)
            return Decision(route, self.split_counts(route, shape, lens), prices, "FlashInfer is not available")
        if shape.group_size != PAPER_GROUP_SIZE:
            return Decision("flashinfer", None, prices, f"group size {shape.group_size}, not {PAPER_GROUP_SIZE}")
        if active == 0:
            return Decision("flashinfer", None, prices, "no active row")
        if longest < self.min_context:
            return Decision("flashinfer", None, prices, f"longest row {longest} under {self.min_context} tokens")
        candidates = ["flashinfer"]
        if active == 1:
            candidates.append("split")
        if active >= MIN_WORKQUEUE_ROWS:
            candidates.append("workqueue")
        route = min(candidates, key=prices.__getitem__)
        reason = "cheapest of " + ", ".join(f"{name} {prices[name]:.0f} us" for name in candidates)
        splits = None if route == "flashinfer" else self.split_counts(route, shape, lens)
        return Decision(route, splits, prices, reason)
