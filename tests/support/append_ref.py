"""Random appends and what pkvsim.reference.append makes of them: bit for bit, over the whole pool."""

from __future__ import annotations

from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import torch
from decode_ref import make_table

from pkvsim import DecodeShape
from pkvsim.reference import append as reference_append
from pkvsim.reference.rope import ROPE_STYLES, Rope, make_cos_sin

KV_DTYPES = (None, "float8_e4m3fn", "float8_e5m2", "int8")
ROPES = (None, *ROPE_STYLES)
# (head_dim of K, of V, rotary_dim, num_q_heads, num_kv_heads, page_size)
SHAPES = (
    (128, 128, 128, 32, 8, 16),
    (64, 64, 32, 6, 3, 1),
    (192, 128, 64, 8, 2, 3),
    (256, 256, 256, 4, 4, 64),
    (80, 80, 32, 5, 1, 7),
    (512, 64, 16, 2, 1, 16),
)
LENS = (1, 16, 17, 0, 900, 33, 2)  # with the new tokens
COUNTS = (
    1,
    5,
    0,
    3,
    70,
    33,
    2,
)  # new tokens of each row where they are ragged; the fourth row is out, its tokens with it
MAX_POSITIONS = 1024


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A copy with the same dtype, of ml_dtypes where NumPy has none."""
    name = str(tensor.dtype).removeprefix("torch.")
    if name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        plain = tensor.contiguous().view(torch.int16 if name == "bfloat16" else torch.uint8)
        return plain.cpu().numpy().view(getattr(ml_dtypes, name))
    return tensor.cpu().numpy()


def inv_freq(rotary_dim: int) -> np.ndarray:
    return 500000.0 ** (-np.arange(rotary_dim // 2) / (rotary_dim // 2))


@dataclass(frozen=True, slots=True)
class Step:
    """Everything that one append takes, on the GPU; pools full of random bytes."""

    shape: DecodeShape
    k_new: torch.Tensor
    v_new: torch.Tensor
    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    token_offsets: torch.Tensor | None
    options: dict = field(default_factory=dict)  # scales

    def where(self) -> dict:
        return {"seq_lens": self.seq_lens, "block_table": self.block_table, "token_offsets": self.token_offsets}


def random_pool(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(0, 100, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8, device="cuda").view(
        dtype
    )


def make_step(
    dims: tuple[int, ...],
    *,
    dtype: str = "float16",
    kv_dtype: str | None = None,
    layout: str = "HND",
    ragged: bool = False,
    combined: bool = False,
    lens: tuple[int, ...] = LENS,
    counts: tuple[int, ...] = COUNTS,
    seed: int = 0,
) -> Step:
    head_dim, head_dim_v, _, hq, hkv, page_size = dims
    shape = DecodeShape(num_q_heads=hq, num_kv_heads=hkv, head_dim=head_dim, page_size=page_size)
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    lens = np.array(lens, np.int32)
    counts = np.array(counts if ragged else np.ones(len(lens)), np.int64)
    pages = int((-(-lens.astype(np.int64) // page_size)).sum())
    num_pages = pages + 4
    table = make_table(lens, page_size, rng.permutation(num_pages).astype(np.int32), spare_columns=1)
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    tokens = int(offsets[-1]) + (3 if ragged else 0)  # more than the offsets tell of, as in a captured graph
    widths = (hq * head_dim, hkv * head_dim, hkv * head_dim_v)
    fused = torch.randn(tokens, sum(widths), device="cuda").to(getattr(torch, dtype))  # a projection's output
    q, k_new, v_new = (
        part.unflatten(1, (heads, -1)) for part, heads in zip(fused.split(widths, dim=1), (hq, hkv, hkv))
    )
    middle = (hkv, page_size) if layout == "HND" else (page_size, hkv)
    pool_dtype = getattr(torch, kv_dtype or dtype)
    if combined:
        both = random_pool((num_pages, 2, *middle, head_dim), pool_dtype)
        k_pages, v_pages = both[:, 0], both[:, 1]
    else:
        k_pages, v_pages = (random_pool((num_pages, *middle, dim), pool_dtype) for dim in (head_dim, head_dim_v))
    options = {}
    if kv_dtype == "int8":
        scales = torch.full((2, num_pages, *middle), 7.0, device="cuda")
        options = {"k_token_scales": scales[0], "v_token_scales": scales[1]}
    elif kv_dtype is not None:
        options = {"k_scale": 0.013, "v_scale": 0.7}
    return Step(
        shape,
        k_new,
        v_new,
        q,
        k_pages,
        v_pages,
        torch.from_numpy(lens).cuda(),
        torch.from_numpy(table).cuda(),
        torch.from_numpy(offsets).cuda() if ragged else None,
        options,
    )


def expected(step: Step, rope: Rope | None, layout: str, precision: type = np.float32) -> tuple[np.ndarray, ...]:
    """(k_pages, v_pages, q, scales of K, scales of V) after the append, by the reference on copies."""
    flip = (lambda pool: pool) if layout == "HND" else (lambda pool: pool.swapaxes(1, 2))
    pools = [to_numpy(pool).copy() for pool in (step.k_pages, step.v_pages)]
    options = {
        name: to_numpy(value).copy() if torch.is_tensor(value) else value for name, value in step.options.items()
    }
    flipped = {name: flip(value) if isinstance(value, np.ndarray) else value for name, value in options.items()}
    where = {name: None if array is None else to_numpy(array) for name, array in step.where().items()}
    q = reference_append.append(
        to_numpy(step.k_new),
        to_numpy(step.v_new),
        *map(flip, pools),
        q=to_numpy(step.q),
        rope=rope,
        precision=precision,
        **where,
        **flipped,
    )
    return *pools, q, options.get("k_token_scales"), options.get("v_token_scales")


def rope_of(style: str | None, rotary_dim: int, *, on_gpu: bool) -> Rope | None:
    if style is None:
        return None
    table = make_cos_sin(inv_freq(rotary_dim), MAX_POSITIONS, factor=1.1)
    return Rope(style=style, cos_sin=torch.from_numpy(table).cuda() if on_gpu else table)


def raw(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)


def assert_same_bits(step: Step, q: torch.Tensor, want: tuple[np.ndarray, ...]) -> None:
    torch.cuda.synchronize()
    found = (step.k_pages, step.v_pages, q, step.options.get("k_token_scales"), step.options.get("v_token_scales"))
    for name, array, expect in zip(("k_pages", "v_pages", "q", "k_token_scales", "v_token_scales"), found, want):
        if expect is not None:
            wrong = raw(to_numpy(array)) != raw(expect)
            assert not wrong.any(), (
                f"{name}: {int(wrong.sum())} bytes differ, first at {np.argwhere(wrong)[0].tolist()}"
            )
