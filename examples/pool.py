"""Questions about long documents that come again and again, more of them than the GPU's pages hold, from the pool.

    python examples/pool.py                                     # a small random-weight Llama, 8 documents of 16K tokens
    python examples/pool.py --model ~/Llama-3.2-1B --tier host:8GiB:50 --tier disk:64GiB:2=/mnt/nvme/kv
    python -m gpu.as_card rtx3060 examples/pool.py              # within 12 GB
    python examples/pool.py --directory /tmp/kv --flush 30      # a later run finds it again

Each question computes its document, or loads what the pool has of it and computes the rest; decode steps are our
kernel's. Without the pool every question computes its document again: some are asked so, for the time and to compare
first tokens' logits. By default half of the documents fit the tier of host memory and the rest goes to a disk.
"""
from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.script import one_line_errors
from bench.tables import Table
from rich.console import Console

from gpu.cache.dma import ask_for_queues
from gpu.measure.environment import environment, install_line, lacks_gpu, options_of, write_json
from pkvsim.devices.device import get_device

if TYPE_CHECKING:
    from pool_bench.session import Answer
    from transformers import PreTrainedModel

NEAR = {"float16": 0.1, "bfloat16": 0.6, "float32": 1e-3}  # share of the logits' deviation that rounding may shift
HOST_RATE, DISK_RATE = 50, 2  # GB/s, assumed of the tiers where none is named; calibrate --tiers measures them


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a local checkpoint; by default a small Llama with random weights")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16384, help="of a document")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--answer-tokens", type=int, default=16)
    parser.add_argument("--compare", type=int, default=6, help="questions that are asked without the pool as well")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--tier", action="append", default=[], metavar="TIER",
                        help="host:CAPACITY:GB/s, or NAME:CAPACITY:GB/s=DIRECTORY; or a measured one's name")
    parser.add_argument("--device", help="a device file whose measured tiers --tier may name")
    parser.add_argument("--directory", type=Path, help="where the disk's tier is kept where no --tier is given")
    parser.add_argument("--flush", type=float, default=0.0,
                        help="most seconds at the end in which the disk writes what host memory holds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="writes all figures there")
    args = parser.parse_args(words)
    for name, least in (("documents", 1), ("tokens", 64), ("questions", 1), ("answer_tokens", 1), ("compare", 0),
                        ("page_size", 1), ("flush", 0)):  # fmt: skip
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(args, name)}")
    if args.tier and args.directory is not None:
        parser.error("--directory: expected only without --tier")
    return args


def token_bytes(model: PreTrainedModel) -> int:
    """KV of a token in all layers."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize


def default_tiers(args: argparse.Namespace, model: PreTrainedModel, directory: Path) -> list[str]:
    """Host memory for half of the documents, a disk for twice all of them."""
    whole = args.documents * (args.tokens + 64 + args.answer_tokens) * token_bytes(model)
    return [f"host:{whole // 2}:{HOST_RATE}", f"disk:{2 * whole}:{DISK_RATE}={directory}"]


def summary(answers: Sequence[Answer], prompt_tokens: int) -> dict[str, Any]:
    """Medians of some answers."""
    return {
        "questions": len(answers),
        "ttft_s": statistics.median(one.ttft_s for one in answers) if answers else None,
        "token_s": statistics.median(one.token_s for one in answers) if answers else None,
        "loaded_share": sum(one.loaded for one in answers) / (prompt_tokens * len(answers)) if answers else None,
    }


def session(model: PreTrainedModel, args: argparse.Namespace, tiers: Sequence[str], *, pin: bool) -> dict[str, Any]:
    """Asks all questions with the pool and some without. RuntimeError where first tokens' logits differ."""
    from pool_bench.session import Shape, largest_difference, order_of, run

    from gpu.cache.prompts.prompt_pool import PromptPool
    from gpu.cache.tiers.stores import parse_stores
    from gpu.drop_ins.transformers_prompts import contents_of

    shape = Shape(documents=args.documents, document_tokens=args.tokens, answer_tokens=args.answer_tokens,
                  page_size=args.page_size)  # fmt: skip
    order = order_of(args.documents, args.questions, args.seed)
    measured = {} if args.device is None else get_device(args.device).tiers
    host, disks = parse_stores(tiers, measured, pin=pin)
    run(model, shape, None, order[:1], seed=args.seed)  # kernels are compiled and libraries loaded before times count
    without = run(model, shape, None, order[: args.compare], seed=args.seed)
    with PromptPool(host=host, disks=disks, contents=contents_of(model, args.page_size),
                    flush_s=args.flush) as pool:
        answers = run(model, shape, pool, order, seed=args.seed)
        stats = pool.stats()
    difference = largest_difference(answers, without) if without else None
    limit = NEAR[str(model.dtype).removeprefix("torch.")]
    if difference is not None and not difference <= limit:  # which NaN is not either
        raise RuntimeError(f"first tokens' logits with the pool differ by {difference:.3f} of their deviation")
    prompt = shape.document_tokens + shape.question_tokens
    return {
        "without": summary(without, prompt),
        "first": summary([one for one in answers if not one.loaded], prompt),
        "again": summary([one for one in answers if one.loaded], prompt),
        "logits_differ_by": difference,
        "block_bytes": args.page_size * token_bytes(model),
        "pool": stats,
        "host": [one.tier.name for one in host],
        "disks": [one.tier.name for one in disks],
    }


def tables(found: dict[str, Any]) -> list[Table]:
    """What a reader wants to see."""
    rows = []
    for name, label in (("without", "without the pool"), ("first", "with it, computed"), ("again", "with it, loaded")):
        one = found[name]
        if one["questions"]:
            rows.append((label, str(one["questions"]), f"{one['ttft_s'] * 1e3:.0f}", f"{one['token_s'] * 1e3:.1f}",
                         f"{one['loaded_share']:.1%}"))  # fmt: skip
    note = "" if found["logits_differ_by"] is None else (
        f"First tokens' logits differ by at most {found['logits_differ_by']:.4f} of their deviation.")
    if found["without"]["questions"] and found["again"]["questions"]:
        ratio = found["without"]["ttft_s"] / found["again"]["ttft_s"]
        note += f" A loaded document answers {ratio:.1f} times sooner."
    times = Table("Questions about documents", ("", "questions", "TTFT ms", "ms a token", "prompt loaded"),
                  tuple(rows), note)  # fmt: skip
    pool = found["pool"]
    hits = [("all", str(pool["hits"]), str(pool["stored"]), "", "")]
    if found["host"]:  # all of it together: what no disk gave
        disks = sum(pool[name]["read"] for name in found["disks"])
        hits.append((", ".join(found["host"]), str(pool["hits"] - disks), "", "", ""))
    for name in found["disks"]:
        tier = pool[name]
        rate = f"{tier['read_bytes'] / tier['busy_s'] / 1e9:.2f}" if tier["busy_s"] else "-"
        hits.append((name, str(tier["read"]), str(tier["written"]), rate, str(tier["faults"])))
    return [times, Table("Blocks by tier", ("tier", "hits", "stored", "GB/s while busy", "faults"), tuple(hits),
                         f"Blocks of {found['block_bytes'] / 2**10:.0f} KiB; evicted {pool['evicted']}.")]  # fmt: skip


@one_line_errors("pool")
def main(words: list[str] | None = None) -> int:
    args = parse_args(words)
    ask_for_queues()
    if lacks_gpu("pool"):
        return 1
    if importlib.util.find_spec("transformers") is None:
        print(f"pool needs Transformers; it is not installed: {install_line('transformers')}", file=sys.stderr)
        return 1
    from generate import load_model

    from gpu.drop_ins.transformers_attention import register

    register()
    model = load_model(args, "cuda")
    model.set_attn_implementation("pkv")
    with tempfile.TemporaryDirectory(prefix="pool-") as place:
        tiers = args.tier or default_tiers(args, model, args.directory or Path(place))
        found = session(model, args, tiers, pin=True)
    console = Console(width=120)
    for table in tables(found):
        table.print(console)
    if args.json is not None:
        write_json(args.json, {"environment": environment(), "options": options_of(args), **found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
