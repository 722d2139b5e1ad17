"""New tokens into FlashAttention's caches: rotated where asked, by one launch of our append kernel."""
from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch

from gpu.drop_ins.flash_attn.cache_pages import CachePages
from gpu.drop_ins.flash_attn.checks import describe, expect
from pkvsim import DecodeShape
from pkvsim.reference.rope import HALF, INTERLEAVED, Rope

MAX_WRITERS = 64


class Rotation(NamedTuple):
    """FlashAttention's rotary arguments."""

    cos: torch.Tensor  # [max_positions, rotary_dim / 2]
    sin: torch.Tensor
    interleaved: bool

    def key(self) -> tuple:
        """Equal for equal tables. A table that was changed in place is another one, unless inference_mode made it."""
        return *((array.data_ptr(), array.shape, array.stride(), array.dtype,
                  0 if array.is_inference() else array._version) for array in (self.cos, self.sin)), self.interleaved

    def rope(self) -> Rope:
        table = torch.cat([self.cos.float(), self.sin.float()], -1).contiguous()
        return Rope(style=INTERLEAVED if self.interleaved else HALF, cos_sin=table)


def rotation_of(cos: torch.Tensor | None, sin: torch.Tensor | None, interleaved: bool) -> Rotation | None:
    """The tables checked, or None. Raises ValueError naming the argument."""
    if cos is None and sin is None:
        return None
    for name, array in (("rotary_cos", cos), ("rotary_sin", sin)):
        expect(name, "a tensor [max_positions, rotary_dim / 2] beside the other one", describe(array),
               isinstance(array, torch.Tensor) and array.dim() == 2 and array.is_floating_point())
    expect("rotary_sin", f"{list(cos.shape)}, as rotary_cos", describe(sin), sin.shape == cos.shape)
    return Rotation(cos, sin, interleaved)


class Writers:
    """One writer for each (device, shape, dtype, rotation), the MAX_WRITERS last used, and for good those of graphs.

    A writer has no workspace, so streams share it; it keeps the rotation's table, and its entry the tensors that the
    table was made of, whose address no other tensor can take meanwhile.
    """

    __slots__ = ("_make", "_writers", "_captured", "_lock")

    def __init__(self, make: Callable[[DecodeShape, str, int, Rope | None], object]) -> None:
        """make(shape, dtype, head_dim of V, rope): builds a writer of NHD pages on the current device."""
        self._make = make
        self._writers: OrderedDict[tuple, tuple] = OrderedDict()
        self._captured: dict[tuple, tuple] = {}
        self._lock = threading.Lock()

    def append(self, k: torch.Tensor, v: torch.Tensor, cache: CachePages, seq_lens: torch.Tensor,
               rotation: Rotation | None, q: torch.Tensor | None, *, capturing: bool) -> torch.Tensor | None:
        """Writes k, v [batch_size, new_tokens, num_kv_heads, head_dim] as the rows' last tokens, counted in seq_lens.

        With a rotation q [batch_size, new_tokens, num_q_heads, head_dim] comes back rotated, else it may be None.
        Raises ValueError naming the argument, RuntimeError where a capture would have to build a writer.
        """
        batch_size, new_tokens, kv_heads, head_dim = k.shape
        q_heads = kv_heads if q is None or rotation is None else q.shape[2]
        shape = DecodeShape(q_heads, kv_heads, head_dim, cache.k.shape[1])
        dtype, value_dim = str(k.dtype).removeprefix("torch."), v.shape[-1]
        key = k.device, shape, dtype, value_dim, None if rotation is None else rotation.key()
        offsets = None
        if new_tokens > 1:
            offsets = torch.arange(0, k.shape[0] * new_tokens + 1, new_tokens, dtype=torch.int32, device=k.device)
        turned = None if rotation is None or q is None else torch.empty_like(q).flatten(0, 1)
        with self._lock:  # a writer keeps what it checked last
            writer = self._find(key, shape, dtype, value_dim, rotation, capturing=capturing)
            writer.append(k.flatten(0, 1), v.flatten(0, 1), cache.k, cache.v, seq_lens=seq_lens,
                          block_table=cache.block_table, token_offsets=offsets,
                          q=None if turned is None else q.flatten(0, 1), q_out=turned)
        return None if turned is None else turned.unflatten(0, (batch_size, new_tokens))

    def _find(self, key: tuple, shape: DecodeShape, dtype: str, value_dim: int, rotation: Rotation | None, *,
              capturing: bool) -> object:
        entry = self._captured.get(key) or self._writers.get(key)
        if entry is None:
            if capturing:
                raise RuntimeError("flash_attn_with_kvcache: expected a call with these shapes and rotary tables "
                                   "before a CUDA graph captures it, as a writer cannot be built during a capture")
            rope = None if rotation is None else rotation.rope()
            entry = self._make(shape, dtype, value_dim, rope), rotation
        if capturing or key in self._captured:
            self._writers.pop(key, None)
            self._captured[key] = entry
        else:
            self._writers[key] = entry
            self._writers.move_to_end(key)
            if len(self._writers) > MAX_WRITERS:
                self._writers.popitem(last=False)
        return entry[0]


def make_writer(shape: DecodeShape, dtype: str, value_dim: int, rope: Rope | None) -> object:
    from gpu.cache.writer import CacheWriter

    if rope is not None:
        torch.cuda.current_stream().synchronize()  # the table is read on other streams too
    return CacheWriter(shape, dtype, layout="NHD", head_dim_v=value_dim, rope=rope)
