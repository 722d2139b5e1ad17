"""Tiers by name: presets come with the way that their machine uses them, and a sweep's cells have them behind their GPU."""
from __future__ import annotations

from dataclasses import replace

import pytest
from serving_cases import BLOCK_TOKENS, DEVICE, MODEL, make_trace

from pkvsim.devices.device import get_device
from pkvsim.memory.tier_presets import SERIAL_FILES, UNIFIED_POOL, NamedTiers
from pkvsim.memory.tiers import parse_tier
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.tiers.start import link_bytes_per_s
from pkvsim.studies.sweep import SERVING_AXES, serving_sweep
from pkvsim.studies.whatif import whatif

BLOCKS = 40
TRACE = make_trace([(at, BLOCKS * BLOCK_TOKENS + 1, 2, [0]) for at in (0.0, 9.0)], blocks=True)
CONFIG = ServingConfig(step_tokens=2048)


def setup(*names: str, link: float | None = None, **chosen: object):
    return NamedTiers(names=names, **chosen).setup({}, link)


def test_presets_are_used_as_their_machine_uses_them() -> None:
    pool, files = setup("unified_pool"), setup("serial_files")
    assert (pool.tiers, pool.placement, pool.serial) == (UNIFIED_POOL, "bandwidth", False)
    assert (files.tiers, files.placement, files.serial) == (SERIAL_FILES, "in_order", True)
    own = setup("serial_files", placement="bandwidth", serial=False, host_link_gb_s=9.0)
    assert (own.placement, own.serial, own.host_link_gb_s) == ("bandwidth", False, 9.0)
    mixed = setup("serial_files", "more:1TiB:7")
    assert (mixed.placement, mixed.serial, len(mixed.tiers)) == ("bandwidth", False, 3)


def test_loads_of_a_preset_pass_one_link() -> None:
    """Two host memories of 55.5 GB/s each and two disks are behind one PCIe 5.0 x16 link."""
    assert sum(tier.read_bytes_per_s for tier in UNIFIED_POOL) > 2 * 55.5e9
    assert [setup("unified_pool", link=link).host_link_gb_s for link in (None, 27.0)] == [55.5, None]
    assert setup("host:1GiB:50").host_link_gb_s is None
    config = replace(CONFIG, tiers=setup("unified_pool"))
    h100, h200 = get_device("h100_sxm"), get_device("h200")
    assert h100.host_read_gb_s is None and link_bytes_per_s(MODEL, h100, config) == 55.5e9
    assert link_bytes_per_s(MODEL, h100, replace(config, kv_parallel=2)) == 2 * 55.5e9  # each its part of every row
    measured = replace(config, tiers=setup("unified_pool", link=h200.host_read_gb_s))
    assert link_bytes_per_s(MODEL, h200, measured) == h200.host_read_gb_s * 1e9
    notes = "\n".join(whatif(TRACE, MODEL, h100, ["balanced"], config).notes)
    assert "55.5 GB/s to each GPU (assumed)" in notes


def test_every_choice_of_tiers_is_an_axis() -> None:
    axes = {"tiers": ("none", "disk:1TiB:2", "host:64GiB:50+disk:1TiB:2"), "serial_reads": ("on", "off"),
            "host_link": (1.0, 100.0)}  # fmt: skip
    assert {*axes, "placement", "retention", "tier_admission", "load_or_recompute"} <= {*SERVING_AXES}
    named = NamedTiers(names=(), load="load", placement="equal")
    sweep = serving_sweep(axes, TRACE, MODEL, DEVICE, "balanced", CONFIG, tiers=named)
    ttft = sweep.values("ttft_s.p99")
    assert (ttft[0] == ttft[0, 0, 0]).all()  # none
    assert (ttft[1:, :, 0] > ttft[1:, :, 1]).all()  # a slow link
    assert ttft[1, 0, 1] == ttft[1, 1, 1] and ttft[2, 0, 1] > ttft[2, 1, 1]  # one after another
    with pytest.raises(ValueError, match="serial_reads: expected on or off"):
        serving_sweep({"serial_reads": ("yes",)}, TRACE, MODEL, DEVICE, "balanced", CONFIG,
                      tiers=NamedTiers(names=("host:1GiB:50",)))
    with pytest.raises(ValueError, match="over: placement, host_link: expected only with --tier"):
        serving_sweep({"placement": ("equal",), "host_link": (1.0,)}, TRACE, MODEL, DEVICE, "balanced", CONFIG)
    with pytest.raises(ValueError, match="config: expected no tiers beside"):
        serving_sweep({"placement": ("equal",)}, TRACE, MODEL, DEVICE, "balanced",
                      replace(CONFIG, tiers=setup("host:1GiB:50")))


def test_a_tier_that_one_gpus_file_has_measured_is_that_gpus(tmp_path) -> None:
    for name, rate in (("slow", 1), ("fast", 10)):
        tier = replace(parse_tier(f"disk0:64GiB:{rate}"), assumed=False, source="measured")
        device = replace(get_device("l4"), name=name, tiers={"disk0": tier})
        (tmp_path / f"{name}.json").write_text(device.to_json())
    axes = {"device": (*(str(tmp_path / f"{name}.json") for name in ("slow", "fast")), "l4")}
    named = NamedTiers(names=("disk0",), load="load")
    sweep = serving_sweep(axes, TRACE, MODEL, DEVICE, "balanced", CONFIG, tiers=named)
    slow, fast, none = sweep.values("tiers.load_s.p50")
    assert slow > 5 * fast > 0 and none != none
    assert any("expected NAME:CAPACITY:READ[:WRITE], or one of unified_pool, serial_files, got 'disk0'" in note
               for note in sweep.notes)


def test_a_tier_without_room_for_a_block_is_named() -> None:
    def notes(*names: str) -> list[str]:
        told = whatif(TRACE, MODEL, DEVICE, ["balanced"], replace(CONFIG, tiers=setup(*names)))
        return [note for note in told.notes if "without room" in note]

    assert notes("host:1GiB:50") == []
    (said,) = notes("host:1GiB:50", "disk:1KiB:7")
    assert said.endswith("bytes: disk")
