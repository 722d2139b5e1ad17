"""A serving loop on a real model: pkvsim's scheduler decides every step, our kernels append and decode.

    python -m gpu.serve --model llama-3.1-8b --dummy-weights --input-tokens 1024 --output-tokens 128 --concurrency 32
    from gpu.serve import LLM; LLM("smollm2").generate(["The capital of France is"])

Read `step` (what a step is given, the record of one that ran, and how a request samples), `server` (the loop:
add_request, step, cancel) and `runner` (a step on the device: inputs, graphs). `decoder` takes tokens to logits, from
which `sampling` draws; its attention is one of two executors: `attention` says what one does and has PyTorch's own,
`gpu_attention` has our kernels. `model` has checkpoints and matrix products. `llm` and `async_llm` are the way in for
programs. `replay` serves a trace in real time, `report` shows what was measured beside what pkvsim predicts, and
`step_prices` has pkvsim's price of each step that ran, and fits constants to them. `tiers` keeps prompts' KV in host
memory and on disks.
"""
from __future__ import annotations

_HOMES = {
    "AsyncLLM": "gpu.serve.async_llm",
    "LLM": "gpu.serve.llm",
    "SamplingParams": "gpu.serve.step",
    "Server": "gpu.serve.server",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    """Imports torch only when what needs it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gpu.serve' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
