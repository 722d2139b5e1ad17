"""What a reader must know of the tiers behind a simulated server."""
from __future__ import annotations

from pkvsim.devices.device import DeviceSpec
from pkvsim.memory.tier_options import ALWAYS_COMPUTE, BY_PRICE, TierSetup
from pkvsim.memory.tiers import UNITS, Tier

ASSUMPTIONS = "reads and writes of a tier do not slow each other, nor decode"


def tier_notes(setup: TierSetup, device: DeviceSpec, block_bytes: int) -> tuple[str, ...]:
    """Of a server with tiers. block_bytes: of a block of its trace."""
    link = setup.host_link_gb_s or device.host_read_gb_s
    behind = "no bound of the link to the GPU" if link is None else f"{link:g} GB/s to each GPU"
    if setup.host_link_gb_s is not None:
        behind += " (assumed)"
    notes = [
        f"KV beyond HBM: {'; '.join(map(_tier, setup.tiers))}; {behind}; placed by {setup.placement}, "
        f"{'one after another' if setup.serial else 'all at once'}; assumed: {ASSUMPTIONS}"
    ]
    small = [tier.name for tier in setup.tiers if tier.slots(block_bytes) == 0]
    if small:
        notes.append(f"tiers without room for one of the trace's blocks of {block_bytes:,} bytes: {', '.join(small)}")
    if setup.load != BY_PRICE:
        told = "nothing is loaded" if setup.load == ALWAYS_COMPUTE else "all that is there is loaded"
        notes.append(f"tiers: {told}")
    if setup.hold_cost is not None:
        notes.append("tiers keep a conversation's blocks for as long as its next turn is worth that by the gaps seen")
    if setup.retention == "belady":
        notes.append("belady of tiers looks ahead in trace order: a bound, no policy")
    return tuple(notes)


def _tier(tier: Tier) -> str:
    rates = f"{tier.read_bytes_per_s / 1e9:g} GB/s read, {tier.write_bytes_per_s / 1e9:g} written"
    source = f" ({'assumed, ' if tier.assumed else ''}{tier.source})" if tier.source else ""
    return f"{tier.name} {tier.capacity_bytes / UNITS['GiB']:g} GiB at {rates}{source}"
