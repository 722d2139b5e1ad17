"""Which constants a GPU has outside attention: its own, or another's shares on its own numbers."""
from __future__ import annotations

from dataclasses import replace

from pkvsim.devices.device import DEVICES, DeviceSpec
from pkvsim.devices.outside_constants import OutsideEntry

# How far a derived step is expected to lie from a measured one, nine times of ten, by what was carried over: another
# engine's constants on the same GPU, a GPU of the same architecture, one of another. The first two are the errors seen
# when the H100 is priced from the H200 (tests/outside/test_points.py), the third that of the RTX 4090 from it.
SAME_GPU_BAND, SAME_ARCHITECTURE_BAND, OTHER_ARCHITECTURE_BAND = 20.0, 20.0, 35.0
REFERENCE = "h200"
MOST_OF_PEAK = 0.95
FALLBACK_ENGINES = ("vllm", "pytorch")
# Engines whose own constants hold on the GPU that they were fitted on alone, and whose are taken elsewhere: kernels of
# this project that nobody has timed on another GPU cost no less there than PyTorch's, which were.
STAND_INS = {"pkv": "pytorch"}


def outside_entry(device: DeviceSpec, engine: str) -> OutsideEntry:
    """The constants of an engine's kernels on a GPU, in this order: its own; the same engine's on the GPU of the
    catalogue that is most like it (a GeForce card for a GeForce card, then the same compute capability, then the
    H200); another engine's on the GPU itself, or on the H200. Of an engine in STAND_INS its own, else its stand-in's.

    Shares, which are fractions of a GPU's own bandwidth and rates, and latencies are carried over as they are, but for
    reads, which reach at most MOST_OF_PEAK of the bandwidth on paper. ValueError where nobody measured any engine.
    """
    if engine in device.outside:
        return device.outside[engine]
    if engine in STAND_INS:
        return outside_entry(device, STAND_INS[engine])
    for name in (engine, *FALLBACK_ENGINES):
        if name in device.outside:
            return _carried(device, device, name, engine)
        owners = [other for other in DEVICES.values() if name in other.outside and other.name != device.name]
        if owners:
            return _carried(min(owners, key=lambda other: _distance(other, device)), device, name, engine)
    raise ValueError(f"device: {device.name}: no constants outside attention for {engine}, nor any to derive them from")


def _distance(other: DeviceSpec, device: DeviceSpec) -> tuple[bool, bool, bool, bool]:
    return (
        ("GeForce" in other.label) != ("GeForce" in device.label),
        other.compute_capability != device.compute_capability,
        other.compute_capability[0] != device.compute_capability[0],
        other.name != REFERENCE,
    )


def _carried(other: DeviceSpec, device: DeviceSpec, name: str, engine: str) -> OutsideEntry:
    entry = other.outside[name]
    c = entry.constants
    band = OTHER_ARCHITECTURE_BAND
    if other.compute_capability == device.compute_capability:
        band = SAME_GPU_BAND if other.name == device.name else SAME_ARCHITECTURE_BAND
    bandwidth, most = device.beta_gb_s, max(1.0, MOST_OF_PEAK * device.peak_gb_s / device.beta_gb_s)
    constants = replace(
        c,
        weight_share=min(c.weight_share, most),
        decode_share=min(c.decode_share, most),
        decode_cta_gb_s=min(c.decode_cta_gb_s, bandwidth),
        mixed_cta_gb_s=min(c.mixed_cta_gb_s, bandwidth),
    )
    whose = f"{other.name}'s" if other.name != device.name else "its own"
    what = "constants" if name == engine else f"constants of {name}"
    return OutsideEntry(
        constants=constants,
        status="estimated",
        source=f"{whose} {what} on this GPU's numbers (pkvsim.outside.derive): {entry.source}",
        date=entry.date,
        basis=dict.fromkeys(entry.basis, "assumed"),
        band_percent=max(band, entry.band_percent),
    )
