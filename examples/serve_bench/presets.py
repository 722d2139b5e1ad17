"""Which model bench_serve takes where none is asked for, and shapes that it knows beside pkvsim's presets."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gpu.serve.model.config import ModelConfig, find_config
from pkvsim.models.presets import catalogue

# Small, with a head_dim of 128: FlashInfer's wheels of kernels have that size for prompt chunks, and seldom that of 64.
SOAKED = "qwen3-0.6b"
SHAPES = {SOAKED: str(Path(__file__).with_name(f"{SOAKED}.json"))}


def largest_preset(wanted: str, *, room: int, weights_bytes: Callable[[ModelConfig], int]) -> str:
    """`wanted`, or where its weights take more than `room` bytes the largest of pkvsim's presets that do not.

    Raises ValueError where the smallest of them does.
    """
    sizes: dict[str, int] = {}
    for name in catalogue():
        try:
            sizes[name] = weights_bytes(find_config(name))
        except ValueError:  # gpu.serve does not serve its architecture
            continue
    if sizes[wanted] <= room:
        return wanted
    fitting = {name: size for name, size in sizes.items() if size <= room}
    if not fitting:
        least = min(sizes, key=sizes.__getitem__)
        raise ValueError(f"model: expected memory for {sizes[least] / 2**30:.2f} GiB, the weights of {least}, which is "
                         f"the smallest preset, got {max(0, room) / 2**30:.2f} GiB")
    return max(fitting, key=fitting.__getitem__)
