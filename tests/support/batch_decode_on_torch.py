"""FlashInfer's wrapper over an engine of torch on the CPU, and steps for it."""
from __future__ import annotations

import math

import numpy as np
import torch
from torch_paged import TorchEngine, paged_attention

from gpu.drop_ins.flashinfer import wrapper as batch_decode
from pkvsim import DecodeShape
from pkvsim.options import AttentionOptions

HEADS = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 8, "page_size": 4}
SHAPE = DecodeShape(4, 2, 8, 4)
WORKSPACE = torch.empty(0, dtype=torch.uint8)


class Wrapper(batch_decode.BatchDecodeWithPagedKVCacheWrapper):
    def _make_engine(self, shape: DecodeShape, dtype: str, options: AttentionOptions) -> TorchEngine:
        return TorchEngine(shape, dtype, options)


class Step:
    """Random rows of given lengths, their pages and table in both forms."""

    def __init__(self, lens: list[int], *, dtype: torch.dtype = torch.float16, seed: int = 0) -> None:
        rng, page_size = np.random.default_rng(seed), SHAPE.page_size
        torch.manual_seed(seed)
        pages = [-(-length // page_size) for length in lens]
        ids = rng.permutation(sum(pages) + 2).astype(np.int32)
        ends = np.cumsum([0, *pages]).astype(np.int32)
        last = np.array([(length - 1) % page_size + 1 if length else 0 for length in lens], np.int32)
        self.csr = torch.from_numpy(ends), torch.from_numpy(ids[:ends[-1]].copy()), torch.from_numpy(last)
        table = np.zeros((len(lens), max(1, *pages)), np.int32)
        for row, (begin, end) in enumerate(zip(ends, ends[1:])):
            table[row, :end - begin] = ids[begin:end]
        self.tables = torch.from_numpy(table), torch.tensor(lens, dtype=torch.int32)
        page = (len(ids), SHAPE.num_kv_heads, page_size, SHAPE.head_dim)
        self.k, self.v = torch.randn(page).to(dtype), torch.randn(page).to(dtype)
        self.q = torch.randn(len(lens), SHAPE.num_q_heads, SHAPE.head_dim).to(dtype)

    def expected(self, scale: float = 8**-0.5, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse of base 2)."""
        out, lse = paged_attention(self.q, self.k, self.v, *self.tables, scale, **options)
        return out, lse / math.log(2)


def planned(step: Step, **options: object) -> Wrapper:
    wrapper = Wrapper(WORKSPACE, "HND")
    wrapper.plan(*step.csr, *HEADS.values(), **options)
    return wrapper
