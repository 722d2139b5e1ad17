"""KV beyond HBM: the options of whatif and sweep that put tiers behind the simulated server's GPU."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from pkvsim.commands.options.group import OptionGroup

if TYPE_CHECKING:
    from pkvsim.devices.device import DeviceSpec
    from pkvsim.memory.tier_options import TierSetup


@dataclass(frozen=True, slots=True)
class TierChoices(OptionGroup):
    """The options as they are given; None or the default where they are not."""

    tier: Annotated[
        Optional[list[str]],
        typer.Option(
            help="A place of KV beyond HBM, NAME:CAPACITY:READ[:WRITE] with rates in GB/s, such as host:256GiB:50 or "
            "disk:2TiB:7:5; again for more. Or a tier that the device's file has measured, by name, or all of "
            "unified_pool or serial_files."
        ),
    ] = None
    placement: Annotated[
        str, typer.Option(help="Where blocks go: in shares of bandwidth, equal, capacity, or in_order.")
    ] = "bandwidth"
    retention: Annotated[str, typer.Option(help="Which block of a full tier goes: lru, or the bound belady.")] = "lru"
    tier_admission: Annotated[
        str, typer.Option(help="Which block may take another's place: all, or tinylfu, those asked for more often.")
    ] = "all"
    load_or_recompute: Annotated[
        str, typer.Option(help="What of a prompt's blocks is loaded: by price, load (all that is there), or recompute.")
    ] = "price"
    serial_reads: Annotated[
        bool, typer.Option("--serial-reads", help="Read one tier after another instead of all at once.")
    ] = False
    host_link: Annotated[
        Optional[float], typer.Option(help="GB/s of the link to one GPU; by default the device file's, or no bound.")
    ] = None

    def setup(self, device: DeviceSpec) -> TierSetup | None:
        """The tiers, None without any. Raises ValueError naming an option."""
        from pkvsim.memory.tier_options import TierSetup
        from pkvsim.memory.tier_presets import find_tiers

        if not self.tier:
            given = [name for name, is_given in self.given().items() if is_given]
            if given:
                raise ValueError(f"{given[0]}: expected only with --tier")
            return None
        return TierSetup(
            tiers=find_tiers(self.tier, device.tiers), placement=self.placement, retention=self.retention,
            admission=self.tier_admission, load=self.load_or_recompute, serial=self.serial_reads,
            host_link_gb_s=self.host_link,
        )  # fmt: skip

    def given(self) -> dict[str, bool]:
        return OptionGroup.given(self) | {"tier": bool(self.tier)}
