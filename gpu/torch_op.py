"""torch.ops.pkv.decode_attention: the engine as an operator that torch.compile and torch.export take whole.

Importing this module registers it. A call plans and runs the balanced schedule, so nothing is left on the host between
steps: lengths and tables may change in place under a captured CUDA graph.
"""
from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from pkvsim import DecodeShape

SCHEMA = ("(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor seq_lens, float? scale=None)"
          " -> (Tensor out, Tensor lse)")


class EngineCache:
    """One engine for each (device, stream, shape, dtype, scale): an engine's runs share its workspace."""

    __slots__ = ("_make", "_engines", "_lock")

    def __init__(self, make: Callable[[DecodeShape, str, float], object]) -> None:
        """make(shape, dtype, scale): builds an engine on the current device."""
        self._make = make
        self._engines: dict[tuple, object] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._engines)

    def run(
        self, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, block_table: torch.Tensor,
        seq_lens: torch.Tensor, scale: float | None, *, stream: int, capturing: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention on `stream`, which must be the current one of q's device. (out, lse) are new tensors."""
        key = q.device, stream, q.shape[1:], k_pages.shape[1:], q.dtype, scale
        with self._lock:  # between plan() and run() no other thread may plan
            engine = self._engines.get(key)
            if engine is None:
                if capturing:
                    raise RuntimeError("decode_attention: expected a call with these shapes on this stream before a "
                                       "CUDA graph captures it, as an engine cannot be built during a capture")
                engine = self._engines[key] = self._build(q, k_pages, scale)
            engine.plan(seq_lens, block_table)
            found = engine.run(q.contiguous(), k_pages, v_pages)
            engine.release_arrays()  # else they would outlive their call, in a pool that a captured graph owns
            return found

    def _build(self, q: torch.Tensor, k_pages: torch.Tensor, scale: float | None) -> object:
        check_shapes(q, k_pages)
        shape = DecodeShape(q.shape[1], k_pages.shape[1], q.shape[2], k_pages.shape[2])
        return self._make(shape, str(q.dtype).removeprefix("torch."), shape.head_dim**-0.5 if scale is None else scale)


def check_shapes(q: torch.Tensor, k_pages: torch.Tensor) -> None:
    """ValueError unless a head shape can be told; the engine checks everything else."""
    if q.dim() != 3:
        raise ValueError(f"q: expected [batch_size, num_q_heads, head_dim], got {list(q.shape)}")
    if k_pages.dim() != 4:
        raise ValueError(f"k_pages: expected [num_pages, num_kv_heads, page_size, head_dim], got {list(k_pages.shape)}")


def _make_engine(shape: DecodeShape, dtype: str, scale: float) -> object:
    from gpu.engine import DecodeEngine

    return DecodeEngine(shape, dtype, "balanced", scale=scale)


ENGINES = EngineCache(_make_engine)  # of this process, as a stream's engine outlives the calls

torch.library.define("pkv::decode_attention", SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))


@torch.library.impl("pkv::decode_attention", "cuda")
def _decode_attention_cuda(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.cuda.device(q.device):
        return ENGINES.run(q, k_pages, v_pages, block_table, seq_lens, scale,
                           stream=torch.cuda.current_stream().cuda_stream,
                           capturing=torch.cuda.is_current_stream_capturing())


@torch.library.register_fake("pkv::decode_attention")
def _decode_attention_fake(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_shapes(q, k_pages)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)


def decode_attention(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode attention over a paged KV cache: (out like q, lse [batch_size, num_q_heads] float32, natural log).

    q [batch_size, num_q_heads, head_dim] float16 or bfloat16; k_pages, v_pages [num_pages, num_kv_heads, page_size,
    head_dim]; block_table [batch_size, max_pages], seq_lens [batch_size], int32; all on one GPU. scale: of the logits,
    by default head_dim ** -0.5. Rows of length 0 give zeros and -inf. There is no backward.

    Raises ValueError naming the argument. The first call with a shape on a stream builds its engine, and must not be
    under capture.
    """
    return torch.ops.pkv.decode_attention(q, k_pages, v_pages, block_table, seq_lens, scale)
