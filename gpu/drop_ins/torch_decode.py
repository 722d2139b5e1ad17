"""torch.ops.pkv.decode_attention: the engine as an operator that torch.compile and torch.export take whole.

Importing this module registers it. A call plans and runs the balanced schedule, so nothing is left on the host between
steps: lengths and tables may change in place under a captured CUDA graph.
"""
from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch

from pkvsim import DecodeShape
from pkvsim.options import AttentionOptions

MAX_ENGINES = 64  # a model's layers share a few; each holds some MB of workspace
SCHEMA = ("(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor seq_lens, float? scale=None,"
          " int? window=None, float? soft_cap=None, Tensor? sinks=None, Tensor? group_of_row=None,"
          " Tensor? prefix_pages=None) -> (Tensor out, Tensor lse)")


class Groups(NamedTuple):
    """gpu.PrefixGroups, which needs CuPy, as the engine reads them."""

    group_of_row: torch.Tensor
    prefix_pages: torch.Tensor


class EngineCache:
    """One engine for each (device, stream, shape, dtype, kind of table, options): its runs share its workspace.

    The MAX_ENGINES last used are kept, and for good those that a captured graph uses.
    """

    __slots__ = ("_make", "_engines", "_captured", "_spares", "_lock")

    def __init__(self, make: Callable[[DecodeShape, str, AttentionOptions], object], *, spares: bool = False) -> None:
        """make(shape, dtype, options): builds an engine on the current device. spares: a call outside of any capture
        leaves an engine behind that the first capture on any other stream may take."""
        self._make = make
        self._spares: dict[tuple, object] | None = {} if spares else None  # by key without the stream
        self._engines: OrderedDict[tuple, object] = OrderedDict()
        self._captured: dict[tuple, object] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._engines) + len(self._captured) + len(self._spares or ())

    def run(
        self, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, block_table: torch.Tensor,
        seq_lens: torch.Tensor, scale: float | None = None, window: int | None = None, soft_cap: float | None = None,
        sinks: torch.Tensor | None = None, group_of_row: torch.Tensor | None = None,
        prefix_pages: torch.Tensor | None = None, *, stream: int, capturing: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention on `stream`, which must be the current one of q's device. (out, lse) are new tensors."""
        if (group_of_row is None) != (prefix_pages is None):
            raise ValueError("group_of_row, prefix_pages: expected both of them or neither")
        groups = None if group_of_row is None else Groups(group_of_row, prefix_pages)
        step = block_table, seq_lens, scale, sinks, groups
        sizes = q.shape[1:], k_pages.shape[1:], v_pages.shape[-1]
        key = q.device, stream, sizes, q.dtype, block_table.dtype, window, soft_cap, sinks is None, groups is None
        with self._lock:  # between plan() and run() no other thread may plan
            engine = self._captured.get(key) or self._engines.get(key)
            if engine is None and capturing and self._spares:
                engine = self._spares.pop((key[0], *key[2:]), None)
            if engine is None:
                if capturing:
                    raise RuntimeError("decode_attention: expected a call with these shapes on this stream before a "
                                       "CUDA graph captures it, as an engine cannot be built during a capture")
                engine = self._build(q, k_pages, v_pages, window, soft_cap, sinks)
            self._keep(key, engine, capturing)
            q = q.contiguous()
            if self._spares is not None and not capturing and (spare_key := (key[0], *key[2:])) not in self._spares:
                spare = self._build(q, k_pages, v_pages, window, soft_cap, sinks)
                _step(spare, q, k_pages, v_pages, *step)  # compiles its kernels
                spare.drain()
                self._spares[spare_key] = spare
            return _step(engine, q, k_pages, v_pages, *step)

    def _keep(self, key: tuple, engine: object, capturing: bool) -> None:
        if capturing or key in self._captured:
            self._engines.pop(key, None)
            self._captured[key] = engine
            return
        self._engines[key] = engine
        self._engines.move_to_end(key)
        if len(self._engines) > MAX_ENGINES:
            _, oldest = self._engines.popitem(last=False)
            oldest.drain()  # its last run may be under way on another stream

    def _build(self, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, window: int | None,
               soft_cap: float | None, sinks: torch.Tensor | None) -> object:
        check_shapes(q, k_pages, v_pages)
        shape = DecodeShape(q.shape[-2], k_pages.shape[1], q.shape[-1], k_pages.shape[2])
        value_dim = v_pages.shape[-1]
        options = AttentionOptions(window=window, soft_cap=soft_cap, sinks=sinks is not None,
                                   query_tokens=q.shape[1] if q.dim() == 4 else 1,
                                   v_head_dim=None if value_dim == shape.head_dim else value_dim)
        return self._make(shape, str(q.dtype).removeprefix("torch."), options)


def _step(engine: object, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, block_table: torch.Tensor,
          seq_lens: torch.Tensor, scale: float | None, sinks: torch.Tensor | None,
          groups: Groups | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Plans and runs."""
    engine.plan(seq_lens, block_table, groups=groups)
    found = engine.run(q, k_pages, v_pages, scale=scale, sinks=sinks)
    engine.release_arrays()  # else they would outlive their call, in a pool that a captured graph owns
    return found


def check_shapes(q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor) -> None:
    """ValueError unless a head shape can be told; the engine checks everything else."""
    if q.dim() not in (3, 4) or q.dim() == 4 and q.shape[1] == 1:
        raise ValueError("q: expected [batch_size, num_q_heads, head_dim], or [batch_size, query_tokens, ..] of "
                         f"several tokens, got {list(q.shape)}")
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if pages.dim() != 4:
            raise ValueError(f"{name}: expected [num_pages, num_kv_heads, page_size, head_dim], "
                             f"got {list(pages.shape)}")


def make_engine(shape: DecodeShape, dtype: str, options: AttentionOptions) -> object:
    from gpu.decode_engine import DecodeEngine

    return DecodeEngine(shape, dtype, "balanced", options=options)


ENGINES = EngineCache(make_engine)  # of this process, as a stream's engine outlives the calls

torch.library.define("pkv::decode_attention", SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))


@torch.library.impl("pkv::decode_attention", "cuda")
def _decode_attention_cuda(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor,
    scale: float | None = None, window: int | None = None, soft_cap: float | None = None,
    sinks: torch.Tensor | None = None, group_of_row: torch.Tensor | None = None,
    prefix_pages: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.cuda.device(q.device):
        return ENGINES.run(q, k_pages, v_pages, block_table, seq_lens, scale, window, soft_cap, sinks, group_of_row,
                           prefix_pages,
                           stream=torch.cuda.current_stream().cuda_stream,
                           capturing=torch.cuda.is_current_stream_capturing())


@torch.library.register_fake("pkv::decode_attention")
def _decode_attention_fake(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor,
    scale: float | None = None, window: int | None = None, soft_cap: float | None = None,
    sinks: torch.Tensor | None = None, group_of_row: torch.Tensor | None = None,
    prefix_pages: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_shapes(q, k_pages, v_pages)
    out = torch.empty((*q.shape[:-1], v_pages.shape[-1]), dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)


def decode_attention(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor,
    scale: float | None = None, window: int | None = None, soft_cap: float | None = None,
    sinks: torch.Tensor | None = None, group_of_row: torch.Tensor | None = None,
    prefix_pages: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode attention over a paged KV cache: (out like q, lse [batch_size, num_q_heads] float32, natural log).

    q [batch_size, num_q_heads, head_dim] float16 or bfloat16, or [batch_size, query_tokens, ..]: the rows' last tokens;
    k_pages, v_pages [num_pages, num_kv_heads, page_size, head_dim], views too, so NHD pages are transpose(1, 2);
    block_table [batch_size, max_pages] int32 or int64, seq_lens [batch_size] int32; all on one GPU. scale: of the
    logits, by default head_dim ** -0.5. window, soft_cap, sinks [num_q_heads] float32: see pkvsim.options. Rows of
    length 0 give zeros and -inf. group_of_row [batch_size], prefix_pages [num_groups] int32: rows that begin with the
    same pages read these once, as gpu.PrefixGroups says; not under a window. There is no backward.

    Raises ValueError naming the argument. The first call with a shape on a stream builds its engine, and must not be
    under capture.
    """
    return torch.ops.pkv.decode_attention(q, k_pages, v_pages, block_table, seq_lens, scale, window, soft_cap, sinks,
                                          group_of_row, prefix_pages)
