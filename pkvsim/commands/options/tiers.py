"""KV beyond HBM: the options of whatif and sweep that put tiers behind the simulated server's GPU."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from pkvsim.commands.options.group import OptionGroup

if TYPE_CHECKING:
    from pkvsim.devices.device import DeviceSpec
    from pkvsim.memory.tier_options import TierSetup
    from pkvsim.memory.tier_presets import NamedTiers


@dataclass(frozen=True, slots=True)
class TierChoices(OptionGroup):
    """The options as they are given; None or the default where they are not."""

    tier: Annotated[
        Optional[list[str]],
        typer.Option(
            help="A place of KV beyond HBM, NAME:CAPACITY:READ[:WRITE] with rates in GB/s, such as host:256GiB:50 or "
            "disk:2TiB:7:5; again for more. Or a tier that the device's file has measured, by name, or a whole "
            "machine: unified_pool (two host memories, two NVMe, read at once), serial_files (host memory, then an "
            "NVMe by files)."
        ),
    ] = None
    placement: Annotated[
        Optional[str],
        typer.Option(
            help="Where blocks go: in shares of bandwidth (by default, and in_order for serial_files), equal, "
            "capacity, or in_order."
        ),
    ] = None
    retention: Annotated[str, typer.Option(help="Which block of a full tier goes: lru, or the bound belady.")] = "lru"
    tier_admission: Annotated[
        str, typer.Option(help="Which block may take another's place: all, or tinylfu, those asked for more often.")
    ] = "all"
    tier_hold_cost: Annotated[
        Optional[float],
        typer.Option(
            help="Keep what a conversation's next turn will ask for as long as that pays by the gaps seen before: "
            "seconds that others lose for each second of it."
        ),
    ] = None
    load_or_recompute: Annotated[
        str, typer.Option(help="What of a prompt's blocks is loaded: by price, load (all that is there), or recompute.")
    ] = "price"
    serial_reads: Annotated[
        Optional[bool],
        typer.Option(
            "--serial-reads/--reads-at-once",
            help="Read one tier after another, or all at once, the default but for serial_files.",
        ),
    ] = None
    host_link: Annotated[
        Optional[float],
        typer.Option(
            help="GB/s of the link to one GPU; by default the device file's, else that of a whole machine, else no "
            "bound."
        ),
    ] = None

    def setup(self, device: DeviceSpec) -> TierSetup | None:
        """The tiers, None without any. Raises ValueError naming an option."""
        named = self.named()
        return named.setup(device.tiers, device.host_read_gb_s) if named.names else None

    def named(self, *, elsewhere: bool = False) -> NamedTiers:
        """The tiers before a GPU is known; elsewhere: their names come from an axis. Raises ValueError naming an option
        that says how tiers are used where there are none."""
        from pkvsim.memory.tier_presets import NamedTiers

        given = [name for name, is_given in self.given().items() if is_given]
        if given and not self.tier and not elsewhere:
            raise ValueError(f"{given[0]}: expected only with --tier")
        return NamedTiers(
            names=tuple(self.tier or ()), placement=self.placement, retention=self.retention,
            admission=self.tier_admission, load=self.load_or_recompute, serial=self.serial_reads,
            host_link_gb_s=self.host_link, hold_cost=self.tier_hold_cost,
        )  # fmt: skip

    def given(self) -> dict[str, bool]:
        return OptionGroup.given(self) | {"tier": bool(self.tier)}
