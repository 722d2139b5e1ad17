"""vLLM's decode steps with our backend against its own: Llama-3.1-8B's shape, dummy weights, CUDA graphs, one GPU.

    python examples/bench_vllm.py --json vllm.json                        # CUSTOM, FLASH_ATTN, TRITON_ATTN
    python examples/bench_vllm.py --backends CUSTOM,FLASH_ATTN --groups 32.8K,120K
    python examples/bench_vllm.py --eight-bit                             # 8 x 32.8K with FP8 and INT8 caches too
    python examples/bench_vllm.py --shared --backends CUSTOM,FLASH_ATTN   # rows of one prompt, prefix caching
    python examples/bench_vllm.py --check                                 # greedy tokens against FLASH_ATTN's
    python examples/bench_vllm.py --check --kv-cache-dtype fp8            # of CUSTOM and TRITON_ATTN with that cache
    python examples/bench_vllm.py --check --model smollm2                 # of a model on disk: serving/gguf_to_hf.py
    python examples/bench_vllm.py --plan timings --requests FILE.csv      # CUSTOM, FLASH_ATTN, 8 bits; served cases
    python examples/bench_vllm.py --plan others --requests FILE.csv       # TRITON_ATTN, FLASHINFER; the long cases
    python examples/bench_vllm.py --plan checks --model smollm2           # tokens with each cache; a mix of lengths
    python examples/bench_vllm.py --plan mix --seconds 1200 --seed 1      # nothing but the mix
    python examples/bench_vllm.py --report vllm.json                      # tables and verdicts of an earlier --json

Needs vLLM 0.24 or 0.33; not that this package is installed, as every process finds its entry point in a temporary
folder on PYTHONPATH. vLLM is imported once and each backend runs in a fork, which writes keys and values of a group of
rows once, without attention, and times steps that do nothing but decode, for fewer and fewer of the rows. Engines that
are timed run alone, those whose tokens are compared side by side. What was measured is kept whatever happens later:
--json is written anew every second, and vLLM's own output goes to a file beside it.

Tokens of ours are held against FLASH_ATTN's by what TRITON_ATTN with the same type of cache differs from it by, on the
same prompts (vllm_bench/agreement.py); the exit code is 1 where ours differ by more.

FILE.csv has the columns case, arrived_at (s), num_prefill_tokens, num_decode_tokens and, of another run to hold ours
against, measured_ttft_s, measured_tpot_ms and measured_e2e_s.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.script import one_line_errors
from vllm_bench import plans
from vllm_bench.agreement import TIE, compare, judge
from vllm_bench.cases import GROUPS, LLAMA_8B, SMALL, Job, environment, write_model, write_plugin
from vllm_bench.report import name_of, served_table, times_table
from vllm_bench.serving import read_cases

BACKENDS = ("CUSTOM", "FLASH_ATTN", "TRITON_ATTN")


@one_line_errors("bench_vllm")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default=",".join(BACKENDS), help="of vLLM's names, and CUSTOM; one after another")
    parser.add_argument("--groups", default=",".join(group.name for group in GROUPS), help="of rows to prefill")
    parser.add_argument("--eight-bit", nargs="?", const=",".join(plans.EIGHT_BIT), default="", metavar="DTYPES",
                        help="CUSTOM with 8-bit caches too, on the 32.8K group; by default " +
                             " and ".join(plans.EIGHT_BIT))
    parser.add_argument("--vllm-append", action="store_true",
                        help="CUSTOM with vLLM's kernel that stores keys and values too")
    parser.add_argument("--shared", action="store_true",
                        help="rows of one prompt in place of the groups, with prefix caching: CUSTOM with and without "
                             "shared_prefixes, FLASH_ATTN with and without vLLM's cascade attention")
    parser.add_argument("--steps", type=int, default=60, help="steps timed for each shape")
    parser.add_argument("--seconds", type=float, default=540.0, help="after which nothing more is begun")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs and torch.compile: starts faster")
    parser.add_argument("--check", action="store_true", help="compare greedy tokens in place of times")
    parser.add_argument("--plan", choices=plans.PLANS, help="several measurements in as little time as they need")
    parser.add_argument("--seed", type=int, default=0, help="of the requests that --plan checks and mix draw")
    parser.add_argument("--requests", type=Path, help="a CSV file whose cases --plan serves")
    parser.add_argument("--kv-cache-dtype", default="auto", help="of --check")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder for --check; a random model by default")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    parser.add_argument("--report", type=Path, metavar="JSON", help="print what an earlier run's --json holds, no more")
    parser.add_argument("--serve-stages", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve_stages:
        from vllm_bench.start import serve_stages

        serve_stages(*args.serve_stages)
        return
    if args.report:
        sys.exit(report(read_json(args.report)))
    check(args)
    with tempfile.TemporaryDirectory(prefix="bench-vllm-") as folder:
        sys.exit(run(args, Path(folder)))


def check(args: argparse.Namespace) -> None:
    """ValueError of what would end engines only after minutes, naming the option."""
    known = [group.name for group in GROUPS]
    for name in args.groups.split(","):
        if name not in known:
            raise ValueError(f"--groups: expected names among {', '.join(known)}, got {name!r}")
    if not all(args.backends.split(",")):
        raise ValueError(f"--backends: expected names of backends, got {args.backends!r}")
    for option, least in (("steps", 1), ("seed", 0)):
        if getattr(args, option) < least:
            raise ValueError(f"--{option}: expected {least} or more, got {getattr(args, option)}")
    if not args.seconds > 0:
        raise ValueError(f"--seconds: expected a number above 0, got {args.seconds}")
    if args.model is not None and not (args.model / "config.json").is_file():
        raise ValueError(f"--model: expected a folder with a config.json, got {args.model}")
    if args.json is not None and not args.json.parent.is_dir():
        raise ValueError(f"--json: expected a file in a folder that exists, got {args.json}")
    if args.requests is not None:
        try:
            cases = read_cases(args.requests)
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise ValueError("--requests: expected a CSV file with the columns case, arrived_at, num_prefill_tokens "
                             f"and num_decode_tokens, got {args.requests} ({type(error).__name__}: {error})") from None
        if not cases:
            raise ValueError(f"--requests: expected a CSV file with at least one request, got {args.requests}")


def run(args: argparse.Namespace, folder: Path) -> int:
    """Measures what was asked for; 1 where tokens differ by more than rounding, or a request went wrong."""
    begin = time.monotonic()
    end = begin + args.seconds
    llama = str(write_model(folder / "model", LLAMA_8B))
    checked = args.model
    if checked is None and (args.check or args.plan == "checks"):
        checked = write_model(folder / "small", SMALL)
        write_random_weights(checked)
    if args.plan:
        requests = "" if args.requests is None else str(args.requests.resolve())
        given = plans.Given(llama, str(checked), folder, requests, begin, end, args.seed)
        stages = plans.plan(args.plan, given)
    elif args.shared:
        given = plans.Given(llama, str(checked), folder, "", begin, end)
        stages = plans.shared(given, args.backends.split(","), args.steps)
    elif args.check:
        stages = [plans.checks(str(checked), folder, end, (args.kv_cache_dtype,), args.eager)]
    else:
        groups = tuple(args.groups.split(","))
        wanted = [(backend, "auto", groups, False) for backend in args.backends.split(",")]
        wanted += [("CUSTOM", "auto", groups, True)] * args.vllm_append
        if args.eight_bit:
            wanted[1:1] = [("CUSTOM", kind, ("32.8K",), False) for kind in args.eight_bit.split(",")]
        stages = [[Job(backend, kind, llama, str(folder / f"{number}.json"), groups, args.steps, end, eager=args.eager,
                       vllm_append=vllms)] for number, (backend, kind, groups, vllms) in enumerate(wanted)]
    found = run_stages(stages, folder, args.json)
    without = sum(job.tokens for stage in stages for job in stage) - sum("rows" in one for one in found)
    if without:
        print(f"{without} engines made no tokens")
    return max(report(found), int(without > 0))


def run_stages(stages: Sequence[Sequence[Job]], folder: Path, kept: Path | None) -> list[dict[str, Any]]:
    """What jobs found, of those that failed what they had by then. kept: JSON of it, written while they run."""
    specs = [[str(job.write(folder / f"job-{number}-{at}.json")) for at, job in enumerate(stage)]
             for number, stage in enumerate(stages)]
    (folder / "stages.json").write_text(json.dumps(specs))
    log = folder / "log" if kept is None else kept.with_suffix(".log")
    jobs = [job for stage in stages for job in stage]
    command = [sys.executable, str(Path(__file__).resolve()), "--serve-stages", str(folder / "stages.json"), str(log)]
    process = subprocess.Popen(command, env=environment(write_plugin(folder / "plugin")))
    while True:
        try:
            ended = process.wait(timeout=1.0) is not None
        except subprocess.TimeoutExpired:
            ended = False
        found = [json.loads(Path(job.results).read_text()) for job in jobs if Path(job.results).exists()]
        write_json(kept, found)
        if ended:
            return found


def report(found: Sequence[dict[str, Any]]) -> int:
    """Prints tables of what was found; 1 where something is wrong."""
    from rich.console import Console

    console = Console(width=160)
    timed = [one for one in found if one["shapes"]]
    if timed:
        console.print(times_table(timed))
    if any(one["cases"] for one in found):
        console.print(served_table(found))
    wrong = False
    for one in found:
        if "mix" in one:
            print(f"{name_of(one)}: mix of lengths: {one['mix']}")
            wrong |= one["mix"]["wrong"] > 0
        if "error" in one:
            print(f"{name_of(one)}: {one['error']}")
            wrong = True
    rows = {name_of(one): one["rows"] for one in found if "rows" in one}
    if rows and "FLASH_ATTN" not in rows:
        print(f"nothing to hold the tokens of {', '.join(rows)} against: FLASH_ATTN made none")
        wrong = True
    for pair in plans.comparisons(rows):
        agreed = compare(rows[pair.own], rows[pair.other])
        print(f"{pair.own} against {pair.other}: {agreed}", flush=True)
        if pair.peer:
            peers = compare(rows[pair.peer], rows[pair.other]) if pair.peer in rows else None
            verdict = judge(agreed, peers, TIE if pair.own in plans.SIXTEEN_BIT else None)
            print(f"    {verdict}", flush=True)
            wrong |= verdict.whether is False
    return int(wrong or not found)


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


def read_json(path: Path) -> list[dict[str, Any]]:
    """What write_json wrote. ValueError for another file."""
    try:
        found = json.loads(path.read_text())
    except ValueError:  # also of text that is no UTF-8
        found = None
    needed = {"backend", "kv_cache_dtype", "shapes", "cases"}
    if not isinstance(found, list) or not all(isinstance(one, dict) and needed <= one.keys() for one in found):
        raise ValueError(f"--report: expected a file that --json wrote, a list of engines, got {path}")
    return found


def write_json(path: Path | None, found: list[dict[str, Any]]) -> None:
    if path is not None:
        whole = path.with_suffix(".new")
        whole.write_text(json.dumps(found, indent=1) + "\n")
        whole.replace(path)


if __name__ == "__main__":
    main()
