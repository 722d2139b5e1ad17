"""What a replica's steps and the ways out of a full memory cost, as plain rooflines.

    rest      max(weights read / beta, 2 x active weights x tokens / (0.6 x FP16 peak))
    attention KV bytes of the rows / beta; of borrowed pages the lender's, at the same time: a step takes the longer one
    exchange  of a step in which rows borrow: layers x pkvsim.pricing.kv_parallel.exchange_us of those rows
    prefill   (2 x weights x tokens + attention's products) / (0.6 x FP16 peak)
    move      KV bytes / link_gb_s + link_us; preempt: KV bytes / host_gb_s, out and in again
"""
from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.models.decode_groups import decode_groups
from pkvsim.models.model_costs import (
    decode_weight_bytes,
    flops_per_token,
    growing_kv_bytes_per_token,
    prefill_attention_flops,
)
from pkvsim.models.model_spec import ModelSpec
from pkvsim.pricing.kv_parallel import Link, exchange_us

PEAK_SHARE = 0.6  # of the FP16 peak that matrix products reach: an assumption
HOST_GB_S = 25.0  # between a GPU and pinned host memory: PCIe 4.0 x16, an assumption


@dataclass(frozen=True, slots=True)
class LendPrices:
    """Times in us."""

    model: ModelSpec
    device: DeviceSpec
    host_gb_s: float = HOST_GB_S
    token_bytes: float = field(init=False)  # KV of a token over all layers

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_bytes", growing_kv_bytes_per_token(self.model))

    def rest_us(self, rows: int, chunk_tokens: int) -> float:
        """A step's matrix products: of rows that decode, and of prompt tokens."""
        tokens = rows + chunk_tokens
        if tokens == 0:
            return 0.0
        read = float(np.asarray(decode_weight_bytes(self.model, tokens))) / (self.device.beta_gb_s * 1e3)
        return max(read, flops_per_token(self.model) * tokens / self._flops_per_us)

    def prefill_us(self, tokens: int) -> float:
        """The prompt's attention, beside its part of rest_us."""
        return prefill_attention_flops(self.model, 0, tokens) / self._flops_per_us

    def attention_us(self, tokens: int) -> float:
        """Decode attention over so many tokens of all rows together, all layers."""
        return tokens * self.token_bytes / (self.device.beta_gb_s * 1e3)

    def exchange_us(self, rows: int) -> float:
        """States of rows that borrow, all layers: to the lenders and back is one exchange of two ranks."""
        return sum(
            group.count * float(exchange_us(group.shape, rows, self.device, 2))
            for group in decode_groups(self.model, 16) if group.shape is not None)  # fmt: skip

    def move_us(self, tokens: int) -> float:
        link = Link.of(self.device)
        return tokens * self.token_bytes / (link.gb_s * 1e3) + link.us

    def swap_us(self, tokens: int) -> float:
        """To host memory, or back."""
        return tokens * self.token_bytes / (self.host_gb_s * 1e3)

    @property
    def _flops_per_us(self) -> float:
        return self.device.fp16_tflops * 1e6 * PEAK_SHARE
