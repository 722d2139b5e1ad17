"""Long contexts from one pool over host memory and SSDs, simulated, beside what Unified KV Pooling published.

    python examples/unified_pool.py                     # the tables
    python examples/unified_pool.py --markdown examples/results/unified_pool.md
    python examples/unified_pool.py --json pool.json   # the tables there too

A request's context is stored already; its last chunk is computed. The pool reads all devices at once in shares of their
bandwidth; the baseline reads host memory and then one SSD through the kernel's file system. pkvsim.memory decides in
both, and its presets say where each rate comes from. arXiv 2606.14779v1 (10 June 2026) gives three figures in its
abstract: TTFT of about 30.7 s in the baseline at long contexts, under 10 s and about 4.1 x with the pool, and 84 % of
SSD retrieval spent in the file system. Its tables and rates were not at hand.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
from bench.script import one_line_errors
from bench.tables import Table
from rich.console import Console

from pkvsim.devices.device import get_device
from pkvsim.memory.placement import BANDWIDTH, EQUAL, IN_ORDER
from pkvsim.memory.simulate_tiers import BlockRequests, TierLoads, simulate_tiers
from pkvsim.memory.tier_options import TierOptions
from pkvsim.memory.tier_presets import FILE_SYSTEM_SHARE, HOST_READ, SERIAL_FILES, UNIFIED_POOL
from pkvsim.memory.tiers import Tier
from pkvsim.models.model_costs import growing_kv_bytes_per_token
from pkvsim.models.model_spec import ModelSpec
from pkvsim.models.presets import get_model
from pkvsim.outside.step_costs import StepCosts
from pkvsim.serving.costs import outside_costs
from pkvsim.serving.server_config import ServingConfig
from pkvsim.serving.tiers.prompt_prices import chunk_table_us, prompt_us

MODELS = ("llama-3.1-8b", "gpt-oss-20b", "qwen3-30b-a3b")
CONTEXTS = tuple(1024 * 2**i for i in range(8))  # 1K to 128K
LONG = CONTEXTS[-1]
BLOCK_TOKENS = 16
CHUNK_TOKENS = 256  # computed once the rest is loaded
DEVICE = "h100_sxm"
HOST_SHARE = 0.25  # of a context that the baseline finds in host memory; the rest is on its SSD
PUBLISHED_BASELINE_S, PUBLISHED_POOL_S, PUBLISHED_RATIO = 30.7, 10.0, 4.1
SOURCE = "https://arxiv.org/abs/2606.14779v1"


def chunk_s(model: ModelSpec, context: int) -> float:
    """Seconds to compute the last chunk of a context, by whatif's prices."""
    costs, table_us = chunk_prices(model)
    return float(prompt_us(costs, table_us, np.array([context - CHUNK_TOKENS]), context)[0]) / 1e6


@cache
def chunk_prices(model: ModelSpec) -> tuple[StepCosts, np.ndarray]:
    """What prompt_us computes from."""
    costs = outside_costs(model, get_device(DEVICE), "calibrated", ServingConfig(step_tokens=CHUNK_TOKENS))
    return costs, chunk_table_us(costs, CHUNK_TOKENS)


def block_bytes(model: ModelSpec) -> int:
    """Of a block of BLOCK_TOKENS tokens in all layers that keep a whole context. A sliding layer's last window is
    computed again with the chunk."""
    return int(growing_kv_bytes_per_token(model) * BLOCK_TOKENS)


def loads(model: ModelSpec, context: int, tiers: Sequence[Tier], options: TierOptions) -> TierLoads:
    """A document is asked for, and asked for again when the tiers hold it."""
    blocks = (context - CHUNK_TOKENS) // BLOCK_TOKENS
    requests = BlockRequests(np.array([0.0, 1e6]), np.arange(3) * blocks, np.tile(np.arange(blocks), 2))
    last = chunk_s(model, context)

    def compute_s(request: int, loaded: np.ndarray) -> np.ndarray:
        return np.where(loaded == blocks, last, 1e9)  # what is there is loaded, however long that takes

    return simulate_tiers(requests, tiers, block_bytes=block_bytes(model), options=options, compute_s=compute_s)


def serial_tiers(
    model: ModelSpec, context: int, disk_bytes_per_s: float, host_share: float = HOST_SHARE
) -> tuple[Tier, ...]:  # fmt: skip
    """The baseline's host memory, with room for host_share of the context, and its SSD."""
    whole = (context - CHUNK_TOKENS) // BLOCK_TOKENS * block_bytes(model)
    host, disk = SERIAL_FILES
    return (replace(host, capacity_bytes=int(whole * host_share)), replace(disk, read_bytes_per_s=disk_bytes_per_s))


def pooled(
    model: ModelSpec, context: int, tiers: Sequence[Tier], placement: str = BANDWIDTH
) -> tuple[float, TierLoads]:  # fmt: skip
    """(TTFT in seconds, loads) with all tiers read at once, from host memory alone layer by layer."""
    loaded = loads(model, context, tiers, TierOptions(
        placement=placement, link_bytes_per_s=HOST_READ, num_layers=len(model.layers)
    ))  # fmt: skip
    return float(loaded.ttft_s[-1]), loaded


def serial(model: ModelSpec, context: int, tiers: Sequence[Tier]) -> tuple[float, TierLoads]:
    """(TTFT in seconds, loads) with one tier read after the other and nothing computed before all is there."""
    options = TierOptions(placement=IN_ORDER, serial=True, link_bytes_per_s=HOST_READ)
    loaded = loads(model, context, tiers, options)
    return float(loaded.ttft_s[-1]), loaded


def by_context(pool: Sequence[Tier], disk_bytes_per_s: float, title: str) -> Table:
    """TTFT of every model and context."""
    rows = []
    for name in MODELS:
        model = get_model(name)
        for context in CONTEXTS:
            pool_s, pool_loads = pooled(model, context, pool)
            serial_s, serial_loads = serial(model, context, serial_tiers(model, context, disk_bytes_per_s))
            disk = [at for at, tier in enumerate(pool) if tier.kind == "disk"]
            rows.append((
                name, f"{context // 1024}K", f"{pool_loads.bytes_by_tier[-1].sum() / 1e9:.2f}",
                f"{chunk_s(model, context) * 1e3:.1f}", f"{pool_s * 1e3:.1f}", f"{serial_s * 1e3:.1f}",
                f"{serial_s / pool_s:.1f}", f"{pool_loads.blocked_s[-1, disk].max() * 1e3:.1f}",
                f"{(serial_loads.blocked_s[-1, 1] - serial_loads.blocked_s[-1, 0]) * 1e3:.1f}",
            ))  # fmt: skip
    columns = ("model", "context", "GB loaded", "chunk ms", "pool TTFT ms", "serial TTFT ms", "x", "pool SSD ms",
               "serial SSD ms")  # fmt: skip
    return Table(title, columns, tuple(rows))


def placements(pool: Sequence[Tier]) -> Table:
    """What the shares are worth: 128K tokens of Llama, in shares of bandwidth and in equal parts."""
    model = get_model(MODELS[0])
    sets = {"2 host memories, 2 SSDs": pool, "1 host memory, 2 SSDs": (pool[0], *pool[2:]), "2 SSDs": pool[2:],
            "1 SSD": pool[3:]}  # fmt: skip
    rows = []
    for name, tiers in sets.items():
        by_rate, equal = (pooled(model, LONG, tiers, how)[0] for how in (BANDWIDTH, EQUAL))
        rows.append((name, f"{by_rate * 1e3:.0f}", f"{equal * 1e3:.0f}", f"{equal / by_rate:.2f}"))
    columns = ("devices", "by bandwidth ms", "equal parts ms", "x")
    note = "Two host memories behind one PCIe 5.0 x16 link already fill it: SSDs beside them add room, not speed."
    return Table("Where 128K tokens of Llama-3.1-8B lie", columns, tuple(rows), note)


def implied(pool: Sequence[Tier]) -> Table:
    """The rates that the published times ask for, and the ratio they give."""
    model = get_model(MODELS[0])
    num_bytes = (LONG - CHUNK_TOKENS) // BLOCK_TOKENS * block_bytes(model)
    rows = []
    for share in (0.0, 0.25, 0.5):
        left = PUBLISHED_BASELINE_S - chunk_s(model, LONG) - num_bytes * share / HOST_READ
        files = num_bytes * (1 - share) / left
        device = files / (1 - FILE_SYSTEM_SHARE)
        unlike = tuple(replace(tier, read_bytes_per_s=device) if tier.kind == "disk" else tier for tier in pool)
        disks, one_host = (pooled(model, LONG, tiers)[0] for tiers in (unlike[2:], (unlike[0], *unlike[2:])))
        rows.append((f"{share:.0%}", f"{files / 1e9:.2f}", f"{device / 1e9:.1f}", f"{disks:.2f}", f"{one_host:.2f}",
                     f"{PUBLISHED_BASELINE_S / disks:.1f}", f"{PUBLISHED_BASELINE_S / one_host:.0f}"))  # fmt: skip
    columns = ("in host memory", "GB/s through files", "GB/s past them", "2 SSDs s", "host + 2 SSDs s", "x, SSDs alone",
               "x, with host")  # fmt: skip
    return Table(f"If one 128K request of Llama took the published {PUBLISHED_BASELINE_S} s", columns, tuple(rows))


def host_shares(pool: Sequence[Tier], disk_bytes_per_s: float) -> Table:
    """What the baseline's host memory decides: 128K tokens of Llama."""
    model = get_model(MODELS[0])
    in_pool = pooled(model, LONG, pool)[0]
    rows = []
    for share in (0.0, 0.25, 0.5, 0.75, 0.9, 1.0):
        files = serial(model, LONG, serial_tiers(model, LONG, disk_bytes_per_s, share))[0]
        rows.append((f"{share:.0%}", f"{files:.2f}", f"{in_pool:.2f}", f"{files / in_pool:.1f}"))
    return Table("128K tokens of Llama-3.1-8B by the baseline's share in host memory",
                 ("in host memory", "serial TTFT s", "pool TTFT s", "x"), tuple(rows))  # fmt: skip


ASSUMPTIONS = f"""\
Assumed, since the paper's text was not at hand beyond its abstract:

- the GPU: H100 SXM; a chunk of {CHUNK_TOKENS} tokens is computed, at the prices of `pkvsim whatif`, and the rest of the
  context is loaded;
- one PCIe 5.0 x16 link to the GPU at {HOST_READ / 1e9:g} GB/s (measured on an H200 host), which every load passes; each
  host memory module alone could fill it;
- each NVMe reads {UNIFIED_POOL[2].read_bytes_per_s / 1e9:g} GB/s (datasheet of a PCIe 5.0 x4 drive), 100 us to the
  first byte;
- through files the same drive delivers {1 - FILE_SYSTEM_SHARE:.0%} of that, as 84 % of the time is the file system's
  (the abstract); nothing else of the baseline's software costs time;
- the baseline finds {HOST_SHARE:.0%} of a context in host memory and reads it first and the SSD after it; both begin to
  compute when all is there, since a disk's blocks come with all layers;
- KV is FP16, {BLOCK_TOKENS} tokens a block; a sliding layer's window (GPT-OSS) is computed again and not stored.
"""
VERDICT = """\
## What this says of the published figures

By datasheet rates both systems are far below the published seconds: {bytes_gb:.1f} GB over 55.5 GB/s take a third of a
second, and the baseline's SSD at 16 % of 14 GB/s some 6 s, not 30.7. The ratio is then the share of a context that the
baseline reads from its SSD, divided by what the pool's devices read together. To take 30.7 s for one request, the
baseline must read at about half a GB/s, which is a cost of software for every chunk rather than of a device; the SSDs
alone, past the file system, would then give a ratio above the published 4.1, and the published pool (30.7 / 4.1 =
7.5 s) reads at 2.3 GB/s in all, less than one drive of this kind. So either several requests shared the devices, or the
pool's software costs time that this simulation does not have. A measurement on real tiers decides that, not this table:
`examples/bench_pool.py` makes it.
"""


def tables() -> list[Table]:
    """All of them, in the order of the page."""
    files = SERIAL_FILES[1].read_bytes_per_s
    return [
        by_context(UNIFIED_POOL, files, "A context in the pool, or in host memory and one SSD behind files"),
        by_context(UNIFIED_POOL[2:], files, "The same with the pool's two SSDs alone"),
        placements(UNIFIED_POOL),
        host_shares(UNIFIED_POOL, files),
        implied(UNIFIED_POOL),
    ]


def page(shown: Sequence[Table]) -> str:
    """The page of results."""
    model = get_model(MODELS[0])
    head = f"""# Unified KV pooling, simulated

`python examples/unified_pool.py --markdown examples/results/unified_pool.md`

Published ({SOURCE}): TTFT at long contexts about {PUBLISHED_BASELINE_S} s in the baseline, under
{PUBLISHED_POOL_S:g} s and about {PUBLISHED_RATIO} x with the pool, over LLaMA 3.1-8B, GPT-OSS-20B and Qwen3-30B-A3B;
blocked I/O time down by up to 23.2 x. Nothing below is a measurement: `pkvsim.memory.simulate_tiers` with the presets
of `pkvsim.memory.tier_presets`.

"""
    num_bytes = LONG // BLOCK_TOKENS * block_bytes(model)
    return (head + ASSUMPTIONS + "\n" + "\n".join(table.markdown(level=2) for table in shown) + "\n"
            + VERDICT.format(bytes_gb=num_bytes / 1e9))  # fmt: skip


@one_line_errors("unified_pool")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="writes the page there instead of printing the tables")
    parser.add_argument("--json", type=Path, help="writes the tables there too: title, columns, rows, note")
    args = parser.parse_args()
    shown = tables()
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(table) for table in shown], indent=1) + "\n", encoding="utf-8")
    if args.markdown is not None:
        args.markdown.write_text(page(shown), encoding="utf-8")
        return
    console = Console(width=140)
    console.print(ASSUMPTIONS, markup=False, highlight=False)
    for table in shown:
        table.print(console)


if __name__ == "__main__":
    main()
