"""pkvsim devices."""
from __future__ import annotations


def devices() -> None:
    """Lists the GPUs with their numbers, and where each number comes from."""
    from pkvsim.device import DEVICES
    from pkvsim.report import print_devices

    print_devices(list(DEVICES.values()))
