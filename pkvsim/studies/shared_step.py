"""A step whose rows share leading pages: what the words of a command say of it, and the GPU that reads rows apart."""
from __future__ import annotations

from dataclasses import replace

import numpy as np

from pkvsim.devices.derive import all_routes
from pkvsim.devices.device import DeviceSpec
from pkvsim.pricing.shared import apart_gb_s
from pkvsim.schedule.groups import PrefixGroups
from pkvsim.shapes import MAX_TOKENS, check_int


def parse_shared(text: str, seq_lens: np.ndarray, page_size: int) -> PrefixGroups:
    """Groups from `8192x48,4096x16`: the first 48 rows have 8192 tokens in common, the next 16 another 4096.

    Tokens are cut to whole pages. seq_lens [batch_size]: rows that are left over share nothing. Raises ValueError
    naming the part.
    """
    group_of_row, row = np.full(len(seq_lens), -1, np.int32), 0
    pages: list[int] = []
    for part in text.split(","):
        tokens, times, count = part.strip().lower().partition("x")
        try:
            prefix, rows = int(tokens), int(count)
        except ValueError:
            raise ValueError(f"shared: expected TOKENSxROWS, got {part.strip()!r}") from None
        check_int("shared", prefix, 1, MAX_TOKENS)
        check_int("shared: rows", rows, 1, MAX_TOKENS)
        if row + rows > len(seq_lens):
            raise ValueError(f"shared: expected at most the {len(seq_lens)} rows of seq_lens, got {row + rows}")
        short = seq_lens[row : row + rows] < prefix
        if short.any():
            at = row + int(np.flatnonzero(short)[0])
            raise ValueError(f"shared: expected at most the {seq_lens[at]} tokens of row {at}, got {prefix}")
        group_of_row[row : row + rows] = len(pages)
        pages.append(prefix // page_size)
        row += rows
    return PrefixGroups(group_of_row, np.array(pages, np.int32))


def apart_device(device: DeviceSpec, kv_bytes: int, distinct_bytes: int) -> DeviceSpec:
    """The GPU as routes find it that read every row for itself, kv_bytes of which only distinct_bytes are distinct."""
    routes = {}
    for name, entry in all_routes(device).items():
        speed = apart_gb_s(entry.model.bandwidth_gb_s, float(kv_bytes), float(distinct_bytes))
        routes[name] = replace(entry, model=replace(entry.model, bandwidth_gb_s=speed))
    return replace(device, calibration=routes)
