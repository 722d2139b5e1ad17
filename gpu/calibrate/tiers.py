"""Measures where KV may lie beyond the GPU and how fast it comes back, into a device file.

    python -m gpu.calibrate --tiers /mnt/nvme0 /mnt/nvme1 -o mygpu.json
    pkvsim whatif --device mygpu.json --tier host:64GiB --tier disk0 --tier disk1 ...

The link to host memory both ways, an arena on every NUMA node, and the disk behind every directory (as disk0, disk1 and
so on, or NAME=DIRECTORY), in about a minute. The device file is the one that `python -m gpu.calibrate` wrote; with
--device-base it is made from another or from one of pkvsim's catalogue. Capacities are half of what is free.
"""
from __future__ import annotations

import argparse
import datetime
import os
import sys
from dataclasses import replace
from pathlib import Path

from gpu.cache.dma import ask_for_queues
from gpu.cache.tiers.host_arena import numa_nodes
from gpu.cache.tiers.host_room import free_host_bytes
from gpu.calibrate.tier_rates import (
    BLOCK_BYTES,
    LATENCY_READS,
    MIB,
    RUN_BYTES,
    disk_rates,
    disk_tier,
    host_rates,
    host_tier,
    link_rates,
    make_device,
)
from gpu.measure.progress import note
from pkvsim.devices.device import DeviceSpec, NumberSource, get_device, load_device
from pkvsim.memory.tiers import HOST, Tier

TINY_BYTES = 64 * MIB  # of a measurement with --device cpu


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gpu.calibrate --tiers", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--tiers", nargs="*", default=[], metavar="DIR", help="directories, or NAME=DIRECTORY")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the device file to complete")
    parser.add_argument("--device-base", help="a GPU of pkvsim's catalogue or a device file, where --out is not there")
    parser.add_argument("--gib", type=float, default=2.0, help="bytes of each measurement")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                        help="cpu measures disks alone, on little data")  # fmt: skip
    args = parser.parse_args(argv)
    if args.out.suffix != ".json":
        parser.error(f"--out: expected a file name that ends in .json, got {args.out}")
    if not 0 < args.gib <= 64:
        parser.error(f"--gib: expected 0 to 64, got {args.gib:g}")
    args.places = {}
    for at, text in enumerate(args.tiers):
        name, named, directory = text.partition("=")
        if Path(text).is_dir() or not named:  # whose name may have an equals sign in it
            name, directory = "", text
        name, directory = name or f"disk{at}", os.path.expanduser(directory)
        if not Path(directory).is_dir():
            parser.error(f"--tiers: expected directories, got {directory}")
        if name in args.places or name.startswith(HOST) or ":" in name:
            parser.error(f"--tiers: expected distinct names without colons that do not begin with {HOST}, got {name}")
        args.places[name] = Path(directory)
    if args.device == "cpu" and not args.places:
        parser.error("--tiers: expected directories with --device cpu, which measures disks alone")
    if args.device_base is None and not args.out.exists():
        parser.error(f"--out: expected a device file, {args.out} is none: name a GPU by --device-base")
    return args


def measure(args: argparse.Namespace) -> tuple[dict[str, Tier], dict[str, float]]:
    """(tiers by name, the link's rates, none without a GPU)."""
    cuda = args.device == "cuda"
    num_bytes = int(args.gib * 2**30) if cuda else TINY_BYTES
    today = datetime.date.today().isoformat()
    device = make_device(max(LATENCY_READS + 1, num_bytes // BLOCK_BYTES), cuda=cuda)
    tiers: dict[str, Tier] = {}
    link: dict[str, float] = {}
    if cuda:
        link = link_rates(num_bytes // 2)
        note(f"link, one piece: {link['in_gb_s']:.1f} GB/s to the GPU, {link['out_gb_s']:.1f} back, "
             f"{link['both_gb_s']:.1f} each way at once")  # fmt: skip
        nodes = numa_nodes()
        for node in nodes:
            name = HOST if len(nodes) == 1 else f"{HOST}{node}"
            rates = host_rates(device, num_bytes // 2, node=node, pin=True)
            source = f"pinned, scattered runs of {RUN_BYTES // 2048} KiB through the GPU's link, {today}"
            tiers[name] = host_tier(name, rates, free_host_bytes(node if len(nodes) > 1 else None), source)
            _tell(tiers[name])
    for name, directory in args.places.items():
        rates, how = disk_rates(directory, device, num_bytes, pin=cuda)
        source = f"{directory}: random blocks of {BLOCK_BYTES // MIB} MiB, {how}, {today}"
        tiers[name] = disk_tier(name, rates, directory, source)
        _tell(tiers[name])
    return tiers, link


def completed(device: DeviceSpec, tiers: dict[str, Tier], link: dict[str, float]) -> DeviceSpec:
    """The device with these tiers in place of those of the same names, and the link's rates where measured."""
    sources = dict(device.sources)
    rates = {}
    if link:
        rates = {"host_read_gb_s": link["in_gb_s"], "host_write_gb_s": link["out_gb_s"]}
        for name in rates:
            sources[name] = NumberSource("calibrated", "cudaMemcpyAsync of one piece of pinned memory on this machine")
    return replace(device, tiers=device.tiers | tiers, sources=sources, **rates)


def _tell(tier: Tier) -> None:
    note(f"{tier.name}: {tier.read_bytes_per_s / 1e9:.2f} GB/s read, {tier.write_bytes_per_s / 1e9:.2f} written, "
         f"{tier.read_latency_s * 1e6:.0f} us to a block's first byte, {tier.capacity_bytes / 2**30:.0f} GiB; "
         f"{tier.source}")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    ask_for_queues()
    if args.device == "cuda":
        from gpu.measure.environment import lacks_gpu

        if lacks_gpu("calibration"):
            return 1
    try:
        base = load_device(args.out) if args.device_base is None else get_device(args.device_base)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        tiers, link = measure(args)
        if args.device_base is not None:
            base = replace(base, name=args.out.stem)
        args.out.write_text(completed(base, tiers, link).to_json(), encoding="utf-8")
    except (ValueError, OSError, RuntimeError) as error:  # of a directory, a disk or the GPU
        print(f"gpu.calibrate: error: {error}", file=sys.stderr)
        return 2
    note(f"wrote {len(tiers)} tiers to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
