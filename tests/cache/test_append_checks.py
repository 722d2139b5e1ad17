"""The append kernel's launch: its chunks, and what is refused before it."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import POISON_PAGE

from gpu.cache import append_checks
from gpu.cache.append_variant import WARPS_PER_SM, AppendViews, chunks_per_token, lanes_per_head
from gpu.inputs.arrays import ArrayView
from pkvsim import DecodeShape


@given(
    widest=st.integers(1, 32).map(lambda n: 16 * n),
    heads=st.integers(1, 200),
    tokens=st.integers(1, 100000),
    num_sms=st.integers(1, 200),
)
def test_warps_cover_a_token_and_then_the_gpu(widest: int, heads: int, tokens: int, num_sms: int) -> None:
    lanes = lanes_per_head(widest)
    assert lanes in (1, 2, 4, 8, 16, 32) and lanes * 16 >= widest > lanes * 8
    steps_of_token = -(-heads // (32 // lanes))
    chunks = chunks_per_token(heads, widest, tokens, num_sms)
    assert 1 <= chunks <= steps_of_token
    assert chunks == steps_of_token or tokens * chunks >= num_sms * WARPS_PER_SM


SHAPE = DecodeShape(num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16)


def view(dtype: str, *shape: int, **fields: object) -> ArrayView:
    strides = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
    return replace(ArrayView(4096, "torch", 0, dtype, shape, strides), **fields)


GOOD = AppendViews(
    k_new=view("float16", 5, 2, 128, strides=(1536, 128, 1)),
    v_new=view("float16", 5, 2, 128, strides=(1536, 128, 1)),
    k_pages=view("int8", 9, 2, 16, 128),
    v_pages=view("int8", 9, 2, 16, 128),
    seq_lens=view("int32", 3),
    block_table=view("int32", 3, 4),
    token_offsets=view("int32", 4),
    q=view("float16", 5, 8, 128),
    q_out=view("float16", 5, 8, 128),
    k_scales=view("float32", 9, 2, 16),
    v_scales=view("float32", 9, 2, 16),
)


def check(views: AppendViews, **options: object) -> None:
    append_checks.check_append(
        views,
        **{
            "shape": SHAPE,
            "dtype": "float16",
            "head_dim_v": 128,
            "kv_dtype": "int8",
            "layout": "HND",
            "rotates": True,
            "max_positions": 64,
            "device": 0,
        }
        | options,
    )


@pytest.mark.parametrize(
    ("name", "change", "options"),
    [
        ("k_new", {"k_new": view("bfloat16", 5, 2, 128)}, {}),
        ("k_new", {"k_new": view("float16", 5, 2, 64)}, {}),
        ("k_new", {"k_new": view("float16", 5, 2, 128, strides=(1540, 128, 1))}, {}),
        ("k_new", {"k_new": view("float16", 5, 2, 128, pointer=4104)}, {}),
        ("k_new", {"token_offsets": None}, {}),
        ("v_new", {"v_new": view("float16", 4, 2, 128)}, {}),
        ("v_new", {}, {"head_dim_v": 64}),
        ("k_pages", {}, {"kv_dtype": "float8_e4m3fn"}),
        ("k_pages", {}, {"layout": "NHD"}),
        ("k_pages", {"k_pages": view("int8", 9, 2, 16, 128, strides=(4100, 2048, 128, 1))}, {}),
        ("v_pages", {"v_pages": view("int8", 8, 2, 16, 128)}, {}),
        ("v_pages", {"v_pages": view("int8", 9, 2, 16, 128, device=-1)}, {}),
        ("k_token_scales", {"k_scales": None}, {}),
        ("v_token_scales", {"v_scales": view("float32", 9, 16, 2)}, {}),
        ("v_token_scales", {"v_scales": view("float32", 9, 2, 16, strides=(64, 32, 1))}, {}),
        (
            "k_token_scales",
            {"k_scales": view("float32", 9, 2, 16, library="cupy"), "v_scales": view("float32", 9, 2, 16)},
            {},
        ),
        ("seq_lens", {"seq_lens": view("int64", 3)}, {}),
        ("seq_lens", {"seq_lens": view("int32", 3, strides=(2,))}, {}),
        ("block_table", {"block_table": view("int32", 2, 4)}, {}),
        ("block_table", {"block_table": view("int32", 3, 4, strides=(1, 3))}, {}),
        ("block_table", {"block_table": view("int32", 3, 5)}, {}),
        ("token_offsets", {"token_offsets": view("int32", 3)}, {}),
        ("q", {"q": view("float16", 5, 4, 128)}, {}),
        ("q_out", {"q_out": view("float16", 5, 8, 128, strides=(1024, 128, 2))}, {}),
        ("q", {}, {"rotates": False, "max_positions": None}),
        ("q_out", {"q": None}, {}),
    ],
)
def test_a_bad_array_is_named(name: str, change: dict, options: dict) -> None:
    check(GOOD)
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        check(replace(GOOD, **change), **options)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("seq_lens", {"seq_lens": [20, -1]}),
        ("seq_lens", {"seq_lens": [20, 33]}),
        ("block_table", {"seq_lens": [20, 20]}),
        ("token_offsets", {"token_offsets": [0, 3, 2]}),
        ("token_offsets", {"token_offsets": [0, 3, 9]}),
        (r"seq_lens\[1\]", {"token_offsets": [0, 1, 4]}),
    ],
)
def test_bad_contents_are_named(name: str, change: dict) -> None:
    good = {"seq_lens": [20, 2], "token_offsets": [0, 3, 4], "block_table": [[0, 1], [2, POISON_PAGE]]}
    sizes = {"num_tokens": 4, "page_size": 16, "num_pages": 3}
    append_checks.check_contents(**{key: np.array(value, np.int32) for key, value in good.items()}, **sizes)
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        append_checks.check_contents(
            **{key: np.array(value, np.int32) for key, value in (good | change).items()}, **sizes
        )
