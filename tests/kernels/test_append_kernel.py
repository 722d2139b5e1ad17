"""cuda_src/append.cu itself, built for the CPU, against pkvsim.reference.append: bit for bit over whole pools."""
from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import cpp
import ml_dtypes
import numpy as np
import pytest
from paths import SUPPORT
from slow import slow_unless

from gpu.cache import append_checks
from gpu.cache.append_variant import AppendViews, defines, launch_sizes
from gpu.inputs.arrays import ArrayView
from gpu.kernels import fields
from gpu.kernels.compile import SOURCE_DIR
from gpu.kernels.launch import Arguments
from pkvsim import DecodeShape
from pkvsim.reference.append import append
from pkvsim.reference.rope import Rope, make_cos_sin, turns_per_position
from pkvsim.shapes import MAX_TOKENS

HARNESS = SUPPORT / "append_harness.cpp"
LENS = np.array((1, 16, 17, 0, 90, 9, 2), np.int32)
COUNTS = (1, 5, 0, 3, 7, 9, 2)  # the fourth row is out, its tokens with it
# dtype, pages, RoPE style and angles, layout, (dims of K, V, rotation), (query heads, KV heads, page size)
VARIANTS = (
    ("float16", "float16", "half", "cos_sin", "HND", (128, 128, 128), (32, 8, 16)),
    ("bfloat16", "float8_e4m3fn", "interleaved", "cos_sin", "NHD", (80, 80, 32), (5, 1, 7)),
    ("float16", "int8", "half", "cos_sin", "NHD", (192, 128, 64), (4, 1, 3)),
    ("bfloat16", "float8_e5m2", None, None, "HND", (64, 64, 0), (6, 3, 1)),
    ("float16", "float16", "interleaved", "inv_freq", "HND", (64, 64, 64), (4, 4, 64)),
)


def build(folder: Path, constants: dict[str, int]) -> ctypes.CDLL:
    for path in SOURCE_DIR.glob("*.cu*"):
        shutil.copy(path, folder)
    for name in ("mma.cuh", "vectors.cuh"):
        (folder / name).write_text("")
    # No contraction: the reference rounds each operation, and so must the kernel's own _rn intrinsics.
    return cpp.build(HARNESS, folder / "append.so", "-std=c++20", "-O1", "-ffp-contract=off", "-pthread", f"-I{folder}",
                     *(f"-D{name}={value}" for name, value in constants.items()))


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros on a 16-byte boundary."""
    size = int(np.prod(shape)) * dtype.itemsize
    whole = np.zeros(size + 16, np.uint8)
    start = -whole.ctypes.data % 16
    return whole[start:start + size].view(dtype).reshape(shape)


def view(array: np.ndarray | None) -> ArrayView | None:
    """As if it were on a GPU."""
    if array is None:
        return None
    return ArrayView(array.ctypes.data, "cupy", 0, array.dtype.name, array.shape,
                     tuple(stride // array.itemsize for stride in array.strides))


def dtype_of(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def random_step(dtype: str, kv_dtype: str, layout: str, dims: tuple[int, ...], heads: tuple[int, ...], *, ragged: bool,
                seed: int) -> dict[str, np.ndarray | None]:
    """Arrays by the names of AppendViews, tokens as slices of one projection, pools full of random bytes."""
    rng, (num_q_heads, num_kv_heads, page_size) = np.random.default_rng(seed), heads
    counts = np.array(COUNTS if ragged else np.ones(len(LENS)), np.int64)
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    pages = -(-LENS // page_size)
    num_pages = int(pages.sum()) + 3
    table = np.full((len(LENS), int(pages.max()) + 1), 0x7FFFFFFF, np.int32)
    table[np.arange(table.shape[1]) < pages[:, None]] = rng.permutation(num_pages)[:pages.sum()]
    tokens = int(offsets[-1]) + (3 if ragged else 0)
    widths = np.cumsum([num_q_heads * dims[0], num_kv_heads * dims[0], num_kv_heads * dims[1]])
    fused = aligned((tokens, int(widths[-1])), dtype_of(dtype))
    fused[...] = rng.standard_normal(fused.shape).astype(fused.dtype)
    parts = zip(np.split(fused, widths[:-1], axis=1), (num_q_heads, num_kv_heads, num_kv_heads))
    q, k_new, v_new = (np.lib.stride_tricks.as_strided(part, (tokens, count, part.shape[1] // count),
                                                       (fused.strides[0], part.shape[1] // count * 2, 2))
                       for part, count in parts)
    middle = (num_kv_heads, page_size) if layout == "HND" else (page_size, num_kv_heads)
    pools = [aligned((num_pages, *middle, dim), dtype_of(kv_dtype)) for dim in dims[:2]]
    for pool in pools:
        pool.view(np.uint8)[...] = rng.integers(0, 100, pool.view(np.uint8).shape)
    scales = [np.full((num_pages, *middle), 7, np.float32) if kv_dtype == "int8" else None for _ in "kv"]
    return {"k_new": k_new, "v_new": v_new, "k_pages": pools[0], "v_pages": pools[1], "seq_lens": LENS,
            "block_table": table, "token_offsets": offsets if ragged else None, "q": q, "q_out": q,
            "k_scales": scales[0], "v_scales": scales[1]}


def make_rope(style: str | None, angles: str | None, rotary_dim: int) -> Rope | None:
    if style is None:
        return None
    inv_freq = 10000.0 ** (-np.arange(rotary_dim // 2) / (rotary_dim // 2))
    if angles == "inv_freq":
        return Rope(style=style, inv_freq=inv_freq, factor=0.9)
    table = aligned((256, rotary_dim), np.dtype(np.float32))
    table[...] = make_cos_sin(inv_freq, 256, factor=1.1)
    return Rope(style=style, cos_sin=table)


@pytest.mark.parametrize("variant", slow_unless(lambda variant: variant == VARIANTS[0], VARIANTS), ids=lambda variant: "-".join(map(str, variant[:5])))
def test_the_kernel_is_the_reference(variant: tuple, tmp_path: Path) -> None:
    dtype, kv_dtype, style, angles, layout, dims, heads = variant
    shape, rope = DecodeShape(*heads[:2], dims[0], heads[2]), make_rope(style, angles, dims[2])
    library = build(tmp_path, defines(shape, dtype, kv_dtype=kv_dtype, head_dim_v=dims[1], rope=rope))
    turns = None if angles != "inv_freq" else turns_per_position(rope.inv_freq)
    angles_at = 0 if rope is None else (rope.cos_sin if turns is None else turns).ctypes.data
    max_positions, rope_stride = (256, dims[2]) if angles == "cos_sin" else (MAX_TOKENS, 0)
    k_scale, v_scale = (0.013, 0.7) if "float8" in kv_dtype else (1.0, 1.0)
    for ragged, num_sms in ((True, 132), (False, 132), (True, 1)):  # one SM: a warp takes all steps of its token
        step = random_step(dtype, kv_dtype, layout, dims, heads, ragged=ragged, seed=num_sms)
        if rope is None:
            step |= {"q": None, "q_out": None}
        want = {name: None if array is None else array.copy() for name, array in step.items()}
        flip = (lambda pool: pool) if layout == "HND" else (lambda pool: None if pool is None else pool.swapaxes(1, 2))
        want_q = append(want["k_new"], want["v_new"], flip(want["k_pages"]), flip(want["v_pages"]), seq_lens=LENS,
                        block_table=want["block_table"], token_offsets=want["token_offsets"], q=want["q"], rope=rope,
                        k_scale=k_scale, v_scale=v_scale, k_token_scales=flip(want["k_scales"]),
                        v_token_scales=flip(want["v_scales"]), precision=np.float32)
        views = AppendViews(*map(view, step.values()))
        append_checks.check_append(views, shape=shape, dtype=dtype, head_dim_v=dims[1], kv_dtype=kv_dtype,
                                   layout=layout, rotates=rope is not None, max_positions=None, device=0)
        num_ctas, sizes = launch_sizes(views, shape, head_dim_v=dims[1], layout=layout, max_positions=max_positions,
                                       rope_stride=rope_stride, num_sms=num_sms)
        order = ("k_new", "v_new", "q", "q_out", "k_pages", "v_pages", "k_scales", "v_scales", "seq_lens",
                 "block_table", "token_offsets")
        pointers = [0 if step[name] is None else step[name].ctypes.data for name in order]
        written = Arguments(fields.signature("pkv_append", {}))
        written.write(*pointers, angles_at, *sizes, 1.0 if rope is None else rope.factor, k_scale, v_scale)
        assert library.arguments_bytes() == written.num_bytes
        library.run(num_ctas, ctypes.c_void_p(*written.starts))
        for name, expect in (("k_pages", want["k_pages"]), ("v_pages", want["v_pages"]), ("q", want_q),
                             ("k_scales", want["k_scales"]), ("v_scales", want["v_scales"])):
            if expect is not None and angles == "inv_freq":  # not the same sine
                np.testing.assert_allclose(step[name].astype(float), expect.astype(float), rtol=2e-3, atol=1e-6)
            elif expect is not None:
                found, expect = (np.ascontiguousarray(array).view(np.uint8) for array in (step[name], expect))
                np.testing.assert_array_equal(found, expect, err_msg=name)
