"""vLLM's decode steps with our backend against its own: Llama-3.1-8B's shape, dummy weights, CUDA graphs, one GPU.

    python examples/bench_vllm.py --json vllm.json                        # CUSTOM, FLASH_ATTN, TRITON_ATTN
    python examples/bench_vllm.py --backends CUSTOM,FLASH_ATTN --groups 32.8K,120K
    python examples/bench_vllm.py --eight-bit                             # 8 x 32.8K with FP8 and INT8 caches too
    python examples/bench_vllm.py --check                                 # greedy tokens against FLASH_ATTN's
    python examples/bench_vllm.py --check --kv-cache-dtype fp8            # against TRITON_ATTN's with the same cache
    python examples/bench_vllm.py --check --model smollm2                 # of a model on disk: serving/gguf_to_hf.py

Needs vLLM 0.24; not that this package is installed, as every process finds its entry point in a temporary folder on
PYTHONPATH. Each backend runs in a process of its own, which prefills a group of rows once and times steps that do
nothing but decode, for fewer and fewer of them. What was measured is kept whatever happens later: --json is written
anew after every process, and a process that ends early leaves its shapes.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.script import one_line_errors
from bench.vllm_cases import GROUPS, LLAMA_8B, SMALL, Job, environment, write_model, write_plugin
from bench.vllm_report import compare, times_table

BACKENDS = ("CUSTOM", "FLASH_ATTN", "TRITON_ATTN")
EIGHT_BIT = ("fp8", "int8_per_token_head")
TIE = 0.05  # of log-probability: what backends that round differently may swap


@one_line_errors("bench_vllm")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default=",".join(BACKENDS), help="of vLLM's names, and CUSTOM; one after another")
    parser.add_argument("--groups", default=",".join(group.name for group in GROUPS), help="of rows to prefill")
    parser.add_argument("--eight-bit", nargs="?", const=",".join(EIGHT_BIT), default="", metavar="DTYPES",
                        help="CUSTOM with 8-bit caches too, on the 32.8K group; by default " + " and ".join(EIGHT_BIT))
    parser.add_argument("--steps", type=int, default=60, help="steps timed for each shape")
    parser.add_argument("--seconds", type=float, default=540.0, help="after which nothing more is begun")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs and torch.compile: starts faster")
    parser.add_argument("--check", action="store_true", help="compare greedy tokens in place of times")
    parser.add_argument("--kv-cache-dtype", default="auto", help="of --check")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder for --check; a random model by default")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        from bench import vllm_child

        vllm_child.run(Job.read(args.child))
        return
    with tempfile.TemporaryDirectory(prefix="bench-vllm-") as folder:
        (check if args.check else measure)(args, Path(folder))


def run_job(job: Job, folder: Path, seconds: float) -> dict[str, Any] | None:
    """The results of a job in a process of its own; what there is of them where it failed, None where nothing is."""
    spec = job.write(folder / "job.json")
    command = [sys.executable, str(Path(__file__).resolve()), "--child", str(spec)]
    results = Path(job.results)
    try:
        code = subprocess.run(command, env=environment(write_plugin(folder / "plugin"), job.backend),
                              timeout=max(1.0, seconds)).returncode
    except subprocess.TimeoutExpired:
        code = -1
    if code:
        print(f"{job.name}: ended with {code}" if code > 0 else f"{job.name}: out of time", flush=True)
    return json.loads(results.read_text()) if results.exists() else None


def measure(args: argparse.Namespace, folder: Path) -> None:
    from rich.console import Console

    end = time.perf_counter() + args.seconds
    model = str(write_model(folder / "model", LLAMA_8B))
    groups = tuple(args.groups.split(","))
    runs = [(backend, "auto", groups) for backend in args.backends.split(",")]
    if args.eight_bit:
        runs[1:1] = [("CUSTOM", kind, ("32.8K",)) for kind in args.eight_bit.split(",")]
    found: list[dict[str, Any]] = []
    for number, (backend, kind, wanted) in enumerate(runs):
        left = end - time.perf_counter()
        if left < 60:
            print(f"{backend} {kind}: not begun, {left:.0f} s are left", flush=True)
            continue
        job = Job(backend, kind, model, str(folder / f"results-{number}.json"), wanted, args.steps, left - 20,
                  args.eager)
        one = run_job(job, folder, left)
        if one is not None:
            found.append(one)
            write_json(args.json, found)
    Console(width=160).print(times_table(found))


def check(args: argparse.Namespace, folder: Path) -> None:
    """Greedy tokens of CUSTOM against those of the backend it builds on; ends with 1 where they part but at ties."""
    end = time.perf_counter() + args.seconds
    model = args.model
    if model is None:
        model = folder / "model"
        write_random_weights(write_model(model, SMALL))
    backends = ("FLASH_ATTN", "CUSTOM", "TRITON_ATTN") if args.kv_cache_dtype == "auto" else ("TRITON_ATTN", "CUSTOM")
    rows: dict[str, list[dict[str, Any]]] = {}
    for backend in backends:
        job = Job(backend, args.kv_cache_dtype, str(model), str(folder / f"{backend}.json"), eager=args.eager,
                  tokens=True)
        one = run_job(job, folder, end - time.perf_counter())
        if one is None or "rows" not in one:
            raise SystemExit(f"{backend}: no tokens")
        rows[backend] = one["rows"]
        write_json(args.json, [rows])
    wrong = False
    for backend in backends[1:]:
        found = compare(rows[backend], rows[backends[0]])
        print(f"{backend} against {backends[0]}: {found.compared} tokens agree, log-probabilities within "
              f"{found.largest_difference:.4f}; {len(found.parted)} of {len(rows[backend])} rows part, at (row, place, "
              f"gap) {list(found.parted)}", flush=True)
        wrong |= backend == "CUSTOM" and not found.within(TIE)
    sys.exit(int(wrong))


def write_random_weights(folder: Path) -> None:
    """Weights of the folder's config, scaled so that attention matters and the most likely token stands out."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((folder / "config.json").read_text())
    hidden, width, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale / shape[-1] ** 0.5).bfloat16()

    weights = {"model.embed_tokens.weight": drawn(config["vocab_size"], hidden, scale=hidden**0.5),
               "model.norm.weight": torch.ones(hidden).bfloat16(),
               "lm_head.weight": drawn(config["vocab_size"], hidden, scale=4.0)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes = {"self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
                  "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries),
                  "mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden), "mlp.down_proj": (hidden, width)}
        weights |= {f"{at}.{name}.weight": drawn(*shape) for name, shape in shapes.items()}
        weights |= {f"{at}.{name}.weight": torch.ones(hidden).bfloat16()
                    for name in ("input_layernorm", "post_attention_layernorm")}
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})


def write_json(path: Path | None, found: list[dict[str, Any]]) -> None:
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
