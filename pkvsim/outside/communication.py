"""All-reduces of tensor parallel layers."""
from __future__ import annotations

from typing import Any

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.outside_constants import OutsideConstants

DEFAULT_LINK_GB_S = 25.0  # of a GPU whose file names no link: PCIe 4.0 x16, an assumption


def all_reduce_us(num_bytes: Any, ranks: int, device: DeviceSpec, constants: OutsideConstants) -> Any:
    """Time of one all-reduce of num_bytes (number or array) on each of `ranks` GPUs of one host; 0 on one GPU.

    Latency that grows with the ranks, and 2 (ranks - 1) / ranks of the bytes in and out of every GPU over its link
    (the ring's bound: NVIDIA, nccl-tests doc/PERFORMANCE.md).
    """
    size = np.asarray(num_bytes, np.float64)
    if ranks == 1:
        return np.zeros_like(size)[()]
    link = (device.link_gb_s or DEFAULT_LINK_GB_S) * constants.all_reduce_share
    latency_us = constants.all_reduce_us + (ranks - 2) * constants.all_reduce_rank_us
    us = latency_us + 2 * (ranks - 1) / ranks * size / (link * 1e3)
    return np.where(size > 0, us, 0.0)[()]
