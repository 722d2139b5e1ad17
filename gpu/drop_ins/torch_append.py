"""torch.ops.pkv.append_tokens: CacheWriter as an operator that torch.compile and torch.export take whole.

Importing this module registers it. It is the other half of a decode step, beside gpu.drop_ins.torch_decode.
"""
from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

import torch

from pkvsim import DecodeShape

MAX_WRITERS = 64
SCHEMA = ("(Tensor k_new, Tensor v_new, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor block_table, Tensor seq_lens,"
          " Tensor? token_offsets=None) -> ()")


class WriterCache:
    """One writer for each (device, shape, dtype), the MAX_WRITERS last used; without a workspace, so streams share it.

    A captured graph needs no writer: kernels stay loaded for the life of the process.
    """

    __slots__ = ("_make", "_writers", "_lock")

    def __init__(self, make: Callable[[DecodeShape, str], object]) -> None:
        """make(shape, dtype): builds a writer on the current device."""
        self._make = make
        self._writers: OrderedDict[tuple, object] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._writers)

    def append(
        self, k_new: torch.Tensor, v_new: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor,
        block_table: torch.Tensor, seq_lens: torch.Tensor, token_offsets: torch.Tensor | None, *, capturing: bool,
    ) -> None:
        """Writes the tokens on the current stream."""
        if k_pages.dim() != 4:
            raise ValueError("k_pages: expected [num_pages, num_kv_heads, page_size, head_dim], "
                             f"got {list(k_pages.shape)}")
        key = k_pages.device, k_pages.shape[1:], k_new.dtype
        with self._lock:  # a writer keeps what it checked last
            writer = self._writers.get(key)
            if writer is None:
                if capturing:
                    raise RuntimeError("append_tokens: expected a call with these shapes before a CUDA graph captures "
                                       "it, as a writer cannot be built during a capture")
                _, heads, page_size, head_dim = k_pages.shape
                shape = DecodeShape(heads, heads, head_dim, page_size)
                writer = self._writers[key] = self._make(shape, str(k_new.dtype).removeprefix("torch."))
            self._writers.move_to_end(key)
            if len(self._writers) > MAX_WRITERS:
                self._writers.popitem(last=False)
            writer.append(k_new, v_new, k_pages, v_pages, seq_lens=seq_lens, block_table=block_table,
                          token_offsets=token_offsets)


def _make_writer(shape: DecodeShape, dtype: str) -> object:
    from gpu.cache.writer import CacheWriter

    return CacheWriter(shape, dtype)


WRITERS = WriterCache(_make_writer)  # of this process, as a kernel outlives the calls

torch.library.define("pkv::append_tokens", SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))


@torch.library.impl("pkv::append_tokens", "cuda")
def _append_tokens_cuda(
    k_new: torch.Tensor, v_new: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, token_offsets: torch.Tensor | None = None,
) -> None:
    with torch.cuda.device(k_pages.device):
        WRITERS.append(k_new, v_new, k_pages, v_pages, block_table, seq_lens, token_offsets,
                       capturing=torch.cuda.is_current_stream_capturing())


@torch.library.register_fake("pkv::append_tokens")
def _append_tokens_fake(
    k_new: torch.Tensor, v_new: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, token_offsets: torch.Tensor | None = None,
) -> None:
    return None


def append_tokens(
    k_new: torch.Tensor, v_new: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, token_offsets: torch.Tensor | None = None,
) -> None:
    """Writes new tokens' K and V into their pages, in place.

    k_new, v_new [num_tokens, num_kv_heads, head_dim]; k_pages, v_pages [num_pages, num_kv_heads, page_size, head_dim]
    of the same dtype, float16 or bfloat16; block_table [batch_size, max_pages], seq_lens [batch_size], the new tokens
    counted in, int32. token_offsets [batch_size + 1] int32: row r's tokens are those from token_offsets[r] to
    token_offsets[r + 1], and take its last positions; without them token i is row i's. All on one GPU.

    Raises ValueError naming the argument. The first call with a shape builds its kernel, and must not be under capture.
    """
    torch.ops.pkv.append_tokens(k_new, v_new, k_pages, v_pages, block_table, seq_lens, token_offsets)
