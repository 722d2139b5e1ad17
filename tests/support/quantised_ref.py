"""Steps over 8-bit pages with poison in every byte that no row owns, and what those pages stand for."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from decode_ref import Case, make_table, pages_of

from pkvsim import AttentionOptions, DecodeShape, reference

NAN_CODES = {"float8_e4m3fn": 0x7F, "float8_e5m2": 0x7E, "int8": 0x7F}  # int8 has none: its largest number
UNITS = {"float8_e4m3fn": 1 / 8, "float8_e5m2": 1 / 8, "int8": 1 / 64}  # the scales' mean, about


@dataclass(frozen=True, slots=True)
class Quantised:
    """A decode step. k, v [num_pages, num_kv_heads, page_size, dim] of the 8-bit type; scales as DecodeEngine.run()."""

    shape: DecodeShape
    options: AttentionOptions
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor
    v_scale: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor

    def values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V as float64, NaN where no row owns a token."""
        return tuple(dequantised(*pair) for pair in ((self.k, self.k_scale), (self.v, self.v_scale)))

    def case(self) -> Case:
        """The same for decode_ref, where nothing but the cache is special."""
        return Case(self.shape, self.q, *self.values(), self.block_table, self.seq_lens)

    def expected(self, **more: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(out, lse) float64 with any options."""
        pools = (pool.nan_to_num().cpu().numpy() for pool in self.values())
        return reference.attention(self.shape, self.q.double().cpu().numpy(), *pools, self.block_table.cpu().numpy(),
                                   self.seq_lens.cpu().numpy(), options=self.options, **more)


def dequantised(pages: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Stored * scale as float64; scales of all, of pages and heads or of tokens."""
    factors = scales.double()
    if scales.numel() > 1:
        factors = factors.reshape(*scales.shape, *[1] * (4 - scales.dim()))
    return pages.float().double() * factors


def quantise(x: torch.Tensor, kv_dtype: str) -> torch.Tensor:
    return x.round().clamp(-128, 127).to(torch.int8) if kv_dtype == "int8" else x.to(getattr(torch, kv_dtype))


def make_quantised(shape: DecodeShape, seq_lens, options: AttentionOptions, *, dtype: str = "float16", seed: int = 0,
                   device: str = "cuda") -> Quantised:
    rng, slots, heads = np.random.default_rng(seed), shape.page_size, shape.num_kv_heads
    torch.manual_seed(seed)
    lens = np.asarray(seq_lens, dtype=np.int32)
    count = int(pages_of(lens, slots).sum()) + 5
    table = make_table(lens, slots, rng.permutation(count).astype(np.int32))
    owned = np.zeros((count, slots), bool)
    for row, length in enumerate(lens):
        at = np.arange(length)
        owned[table[row, at // slots], at % slots] = True
    owned = torch.from_numpy(owned).to(device)
    sized = {"tensor": (1,), "page": (count, heads), "token": (count, heads, slots)}[options.kv_scales]
    unit, pools = UNITS[options.kv_dtype], []
    for width, size in ((shape.head_dim, 1.0), (options.value_dim(shape), 0.4)):
        codes = quantise(torch.randn(count, heads, slots, width, device=device) * (size / unit), options.kv_dtype)
        codes.view(torch.uint8).transpose(1, 2)[~owned] = NAN_CODES[options.kv_dtype]
        scales = unit * torch.exp2(torch.rand(sized, device=device) - 0.5)
        if options.kv_scales == "page":
            scales[~owned.any(1)] = float("nan")
        if options.kv_scales == "token":
            scales.transpose(1, 2)[~owned] = float("nan")
        pools.append((codes, scales))
    (k, k_scale), (v, v_scale) = pools
    tokens = () if options.query_tokens == 1 else (options.query_tokens,)
    q = torch.randn(len(lens), *tokens, shape.num_q_heads, shape.head_dim, device=device).to(getattr(torch, dtype))
    return Quantised(shape, options, q, k, v, k_scale, v_scale, torch.from_numpy(table).to(device),
                     torch.from_numpy(lens).to(device))
