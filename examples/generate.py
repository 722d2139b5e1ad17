"""Text generation by Transformers on our kernels: a ragged batch under pkv, SDPA and Transformers' continuous batching.

    python examples/generate.py                              # a small random-weight Llama
    python examples/generate.py --model ~/Llama-3.2-1B       # a local checkpoint
    python examples/generate.py --rows 64 --prompts 512 8192 --new-tokens 256 --json generate.json

Every way decodes greedily from the same random prompts. Tokens are compared with SDPA's: a row may leave them only
where SDPA's two best logits lie so close that rounding decides, and what follows in that row is not compared.
"""
from __future__ import annotations

import argparse
import importlib.util
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bench.generate_ways import WAYS, Batch, compare, reference_logits, run_way
from bench.script import one_line_errors
from rich.console import Console
from rich.table import Table

from gpu.measure import memory
from gpu.measure.environment import environment, install_line, missing, options_of, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 16
WAYS_HELD = 4  # caches of a row that ways may hold at a time: one, its copy as it grows, and their pools'
NEAR_TIE = {"float16": 0.05, "bfloat16": 0.4}  # share of the logits' standard deviation that rounding may shift


def random_batch(model: PreTrainedModel, args: argparse.Namespace) -> Batch:
    import torch

    generator = torch.Generator().manual_seed(args.seed)
    lens = torch.randint(args.prompts[0], args.prompts[1] + 1, (args.rows,), generator=generator)
    width = int(lens.max())
    mask = torch.arange(width) >= width - lens[:, None]
    ids = torch.randint(3, model.config.vocab_size, mask.shape, generator=generator) * mask
    return Batch(ids.to(model.device), mask.long().to(model.device), args.new_tokens)


def fit_rows(model: PreTrainedModel, args: argparse.Namespace) -> bool:
    """Sets args.rows to ROWS, or to what memory has room for beside the model; whether that is fewer."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 2
    args.rows = memory.fitting(ROWS, bytes_each=WAYS_HELD * token * (args.prompts[1] + args.new_tokens))
    return args.rows < ROWS


def load_model(args: argparse.Namespace, device: str) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    dtype = getattr(torch, args.dtype)
    if args.model is not None:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, local_files_only=True)
    else:
        torch.manual_seed(args.seed)
        config = LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=12,
                             num_attention_heads=16, num_key_value_heads=4, head_dim=128, initializer_range=0.05,
                             max_position_embeddings=131072, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None  # rows of equal length, so that tokens per second mean the same
    model.generation_config.pad_token_id = 0
    return model.to(device).eval()


def run_all(model: PreTrainedModel, batch: Batch, ways: list[str], *, page_size: int, tolerance: float) -> list[dict]:
    """One record a way, SDPA's first."""
    from gpu.drop_ins.flash_attn.transformers_name import register_with_transformers
    from gpu.drop_ins.transformers_attention import register

    register()
    register_with_transformers()
    ways = [WAYS[0], *(way for way in ways if way != WAYS[0])]
    results = [run_way(way, model, batch, page_size=page_size) for way in ways]
    expected, records = results[0].tokens, []
    for result in results:
        agreement = compare(result.tokens, expected, partial(reference_logits, model, batch, expected), tolerance)
        speed = {"tokens_per_s": expected.numel() / result.total_s, "decode_tokens_per_s": result.decode_tokens_per_s()}
        times = {"prefill_s": result.prefill_s, "total_s": result.total_s}
        records.append({"way": result.way, **speed, **times, **asdict(agreement)})
    return records


def print_records(records: list[dict], batch: Batch, console: Console) -> None:
    lens = batch.attention_mask.sum(1)
    table = Table("attention", "tokens/s", "decode tokens/s", "prefill s", "whole s", "equal", "near ties", "wrong",
                  title=f"{len(lens)} rows, prompts of {int(lens.min())} to {int(lens.max())} tokens, "
                        f"{batch.new_tokens} new tokens each; the last three in rows")
    for record in records:
        numbers = (("tokens_per_s", 0), ("decode_tokens_per_s", 0), ("prefill_s", 3), ("total_s", 3))
        cells = ["-" if record[name] is None else f"{record[name]:.{digits}f}" for name, digits in numbers]
        table.add_row(record["way"], *cells, str(record["same_rows"]), str(record["near_ties"]),
                      str(len(record["wrong"])))
    console.print(table)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a local checkpoint; by default a small Llama of random weights")
    parser.add_argument("--dtype", choices=tuple(NEAR_TIE), default="float16")
    parser.add_argument("--rows", type=int, help=f"sequences in the batch, by default {ROWS} or what fits")
    parser.add_argument("--prompts", type=int, nargs=2, default=(64, 2048), metavar=("LEAST", "MOST"),
                        help="tokens of a prompt, drawn evenly (64 2048)")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens to generate for each row (128)")
    parser.add_argument("--page-size", type=int, default=16, help="tokens of a page of ours (16)")
    parser.add_argument("--ways", default=",".join(WAYS), help="comma-separated, of %(default)s; sdpa is always run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write what was measured, and on what")
    args = parser.parse_args(argv)
    args.ways = args.ways.split(",")
    for way in args.ways:
        if way not in WAYS:
            parser.error(f"--ways: expected some of {', '.join(WAYS)}, got {way!r}")
    for name, value in (("rows", args.rows), ("new-tokens", args.new_tokens), ("page-size", args.page_size),
                        ("prompts", args.prompts[0])):
        if value is not None and value < 1:
            parser.error(f"--{name}: expected at least 1, got {value}")
    if args.prompts[0] > args.prompts[1]:
        parser.error(f"--prompts: expected LEAST <= MOST, got {args.prompts[0]} {args.prompts[1]}")
    if args.model is not None and not args.model.is_dir():
        parser.error(f"--model: expected a folder, got {args.model}")
    return args


@one_line_errors("generate")
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    reason = missing()
    if reason is None and importlib.util.find_spec("transformers") is None:
        reason = f"transformers is not installed: {install_line('transformers')}"
    if reason is not None:
        print(f"generate needs a CUDA GPU with CuPy, PyTorch and Transformers; {reason}", file=sys.stderr)
        return 1
    model = load_model(args, "cuda")
    shrunk = args.rows is None and fit_rows(model, args)
    batch = random_batch(model, args)
    records = run_all(model, batch, args.ways, page_size=args.page_size, tolerance=NEAR_TIE[args.dtype])
    print_records(records, batch, Console())
    if shrunk:
        print(f"{args.rows} rows in place of {ROWS}, for which GPU memory has no room")
    print(memory.peak_line())
    if args.json is not None:
        write_json(args.json, {"environment": environment(), "options": options_of(args), "results": records,
                               "peak_gpu_bytes": memory.peak_bytes()})
    return 1 if any(record["wrong"] for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
