"""A stack of Llama-3.1-8B's layers in PyTorch, timed whole: steps that no constant is fitted to.

Attention is timed beside it in the same way, so that what stands outside can be held to the model without it.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpu.calibrate.outside_attention import Heads, chunk_attention, rows_attention, runs
from gpu.calibrate.outside_kernels import FAILURES, Say, call_us

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Sizes of the stack; Llama-3.1-8B's by default."""

    hidden: int = 4096
    mlp_width: int = 14336
    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    layers: int = 4  # distinct weights, more than any L2 holds


@dataclass(frozen=True, slots=True)
class StackCell:
    """One step: rows that decode at a context, or one chunk behind past tokens."""

    rows: int = 0
    context: int = 0
    chunk: int = 0
    past: int = 0

    @property
    def tokens(self) -> int:
        return self.rows or self.chunk


@dataclass(frozen=True, slots=True)
class StackTime:
    """Times of one layer: all of it, and its attention alone."""

    cell: StackCell
    attention: str  # which kernel
    layer_us: float
    attention_us: float


STACK_COLUMNS = ("rows", "context", "chunk", "past", "attention", "layer_us", "attention_us")
ROWS, CONTEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256), (1024, 8192, 65536)
STACK_CHUNKS, STACK_PASTS = (256, 512, 1024, 2048, 4096, 8192), (0, 8192, 57344)
MOST_CACHED_TOKENS = 512 * 1024  # of a layer: 2 GiB of K and V


def stack_cells() -> list[StackCell]:
    """Decode steps of up to MOST_CACHED_TOKENS, and chunks up to 64K tokens of context."""
    decode = [StackCell(rows=r, context=c) for c in CONTEXTS for r in ROWS if r * c <= MOST_CACHED_TOKENS]
    return decode + [StackCell(chunk=chunk, past=past) for past in STACK_PASTS for chunk in STACK_CHUNKS]


class Stack:
    """The weights, and what a step through them runs."""

    __slots__ = ("shape", "_device", "_weights", "_norm")

    def __init__(self, shape: LayerShape, device: str) -> None:
        import torch

        def matrix(out: int, into: int) -> torch.Tensor:
            return torch.randn(out, into, device=device, dtype=torch.float16) * into**-0.5

        s = shape
        self.shape, self._device = shape, device
        wide = (s.query_heads + 2 * s.kv_heads) * s.head_dim
        self._weights = [
            (
                matrix(wide, s.hidden), matrix(s.hidden, s.query_heads * s.head_dim),
                matrix(2 * s.mlp_width, s.hidden), matrix(s.hidden, s.mlp_width),
            )
            for _ in range(s.layers)
        ]  # fmt: skip
        self._norm = torch.ones(s.hidden, device=device, dtype=torch.float16)

    def layer(self, index: int, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor,
              attend: Callable[[int, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """x [tokens, hidden] through one layer. attend(index, queries [tokens, Hq, d]) -> [tokens, Hq, d]."""
        from torch.nn.functional import rms_norm, silu

        s = self.shape
        into, out, gate_up, down = self._weights[index]
        mixed = rms_norm(x, (s.hidden,), self._norm) @ into.t()
        heads = mixed.view(x.shape[0], -1, s.head_dim)
        turned = heads[:, : s.query_heads + s.kv_heads]
        half = s.head_dim // 2
        low, high = turned[..., :half], turned[..., half:]
        turned = _joined(low * cosine - high * sine, high * cosine + low * sine)
        attended = attend(index, turned[:, : s.query_heads].contiguous())
        x = x + attended.reshape(x.shape[0], -1) @ out.t()
        gate, up = (rms_norm(x, (s.hidden,), self._norm) @ gate_up.t()).chunk(2, dim=1)
        return x + (silu(gate) * up) @ down.t()

    def inputs(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x [tokens, hidden], cosine, sine [tokens, 1, head_dim / 2])"""
        import torch

        x = torch.randn(tokens, self.shape.hidden, device=self._device, dtype=torch.float16)
        angles = torch.rand(tokens, 1, self.shape.head_dim // 2, device=self._device)
        return x, angles.cos().half(), angles.sin().half()


def _joined(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.cat((low, high), dim=-1)


def stack_times(
    cells: list[StackCell], *, device: str, say: Say, shape: LayerShape = LayerShape()
) -> Iterator[StackTime]:
    """Whole layers and their attention alone, cell by cell; what does not run is noted and left out."""
    import torch

    stack = Stack(shape, device)
    heads = Heads(shape.query_heads, shape.kv_heads, shape.head_dim)
    kernels = {
        attention: runs(attention, heads=heads, device=device, say=say)
        for attention in (chunk_attention, rows_attention)
    }
    for cell in cells:
        try:
            attention = chunk_attention if cell.chunk else rows_attention
            first, second = (cell.chunk, cell.past) if cell.chunk else (cell.rows, cell.context)
            kernel = kernels[attention]
            attend = attention(first, second, heads, layers=shape.layers, device=device, kernel=kernel)
            x, cosine, sine = stack.inputs(cell.tokens)
            q = torch.randn(
                cell.tokens, shape.query_heads, shape.head_dim, device=device, dtype=torch.float16
            )


            def layer(index: int) -> torch.Tensor:
                return stack.layer(index, x, cosine, sine, attend)  # noqa: B023

            def attention_alone(index: int) -> torch.Tensor:
                return attend(index, q)  # noqa: B023

            layer_us = call_us(layer, device=device, variants=shape.layers)
            attention_us = call_us(attention_alone, device=device, variants=shape.layers)
        except FAILURES as error:
            say(f"left out {cell}: {type(error).__name__}: {str(error)[:160]}")
            continue
        yield StackTime(cell, kernel, layer_us, attention_us)
