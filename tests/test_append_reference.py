"""What the append kernel is held to: addresses, RoPE and rounding of pkvsim.reference_append, and the kernel's own
arithmetic."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import POISON_PAGE

from gpu import append_checks
from gpu.append_config import CACHE_TYPES, SIGNATURE, WARPS_PER_SM, AppendViews, chunks_per_token, lanes_per_head
from gpu.arrays import ArrayView
from gpu.kernels import SOURCE_DIR
from pkvsim import DecodeShape
from pkvsim.reference_append import FP8_DTYPES, append, quantize_fp8, quantize_int8, rotate, token_slots
from pkvsim.rope import ROPE_STYLES, Rope, make_cos_sin, turns_per_position

HARNESS = Path(__file__).with_name("quantize_harness.cpp")
COMPILER = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
INV_FREQ = 10000.0 ** (-np.arange(16) / 16)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@st.composite
def steps(draw: st.DrawFn) -> dict:
    """Rows that append 0 to 5 tokens each, some empty, in a pool with poisoned entries for what no row owns."""
    page_size = draw(st.sampled_from([1, 3, 16]))
    rows = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5), st.booleans()), min_size=1, max_size=6))
    counts = np.array([new for _, new, _ in rows])
    lens = np.array([0 if empty else old + new for old, new, empty in rows], np.int32)
    pages = -(-lens // page_size)
    num_pages = int(pages.sum()) + draw(st.integers(1, 3))
    ids = iter(draw(st.permutations(range(num_pages))))
    table = np.full((len(rows), int(pages.max()) + 1), POISON_PAGE, np.int32)
    for row, count in enumerate(pages):
        table[row, :count] = [next(ids) for _ in range(count)]
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    return {
        "seq_lens": lens,
        "block_table": table,
        "token_offsets": offsets,
        "num_pages": num_pages,
        "page_size": page_size,
        "num_tokens": int(offsets[-1]) + draw(st.integers(0, 2)),
    }


@settings(max_examples=150, deadline=None)
@given(step=steps())
def test_tokens_take_the_last_positions_of_their_rows(step: dict) -> None:
    slots = token_slots(**step)
    lens, table, offsets = step["seq_lens"], step["block_table"], step["token_offsets"]
    found = {
        token: (page, slot, position)
        for token, page, slot, position in zip(
            slots.token.tolist(), slots.page.tolist(), slots.slot.tolist(), slots.position.tolist()
        )
    }
    expected = {}
    for row, length in enumerate(lens):
        new = range(offsets[row], offsets[row + 1])
        for token, position in zip(new, range(length - len(new), length)):
            if length:
                expected[token] = (table[row, position // step["page_size"]], position % step["page_size"], position)
    assert found == expected
    assert len({(page, slot) for page, slot, _ in found.values()}) == len(found), "two tokens in one place"


def test_one_token_per_row_by_default_and_nothing_out_of_reach() -> None:
    table = np.array([[3, 1], [0, POISON_PAGE], [2, -1], [0, 0], [POISON_PAGE, 0]], np.int32)
    lens = np.array([20, 16, 17, 0, 1], np.int32)
    slots = token_slots(lens, table, num_tokens=5, num_pages=4, page_size=16)
    assert slots.token.tolist() == [0, 1] and slots.position.tolist() == [19, 15]
    assert slots.page.tolist() == [1, 0] and slots.slot.tolist() == [3, 15]
    assert token_slots(lens, table, num_tokens=5, num_pages=4, page_size=16, max_positions=19).token.tolist() == [1]
    long = token_slots(np.array([33], np.int32), table[:1], num_tokens=1, num_pages=4, page_size=16)
    assert len(long.token) == 0, "beyond the block table"


@settings(max_examples=60, deadline=None)
@given(
    style=st.sampled_from(ROPE_STYLES),
    dim=st.sampled_from([32, 48, 128]),
    seed=st.integers(0, 2**32 - 1),
    positions=st.lists(st.integers(0, 2**20), min_size=1, max_size=4),
    shift=st.integers(0, 2**20),
)
def test_rope_turns_pairs_and_scores_depend_on_distance(style, dim, seed, positions, shift) -> None:
    rng = np.random.default_rng(seed)
    rope = Rope(style=style, inv_freq=INV_FREQ)  # rotary_dim 32
    position = np.array(positions)
    q, k = rng.standard_normal((2, len(position), 2, dim))
    turned = rotate(q, position, rope)
    np.testing.assert_array_equal(turned[..., 32:], q[..., 32:])
    first, second = (
        (np.arange(16), np.arange(16, 32)) if style == "half" else (np.arange(0, 32, 2), np.arange(1, 32, 2))
    )
    as_complex = (q[..., first] + 1j * q[..., second]) * np.exp(1j * position[:, None, None] * INV_FREQ)
    np.testing.assert_allclose(turned[..., first] + 1j * turned[..., second], as_complex, atol=1e-9)
    here = rotate(q, position + 5, rope) * rotate(k, position, rope)
    there = rotate(q, position + shift + 5, rope) * rotate(k, position + shift, rope)
    np.testing.assert_allclose(here.sum(-1), there.sum(-1), atol=1e-6)


def test_styles_differ_by_the_order_of_elements_alone() -> None:
    x = np.random.default_rng(0).standard_normal((3, 2, 32))
    order = np.arange(32).reshape(2, 16).T.ravel()  # 0, 16, 1, 17, ..: halves interleaved
    position = np.array([1, 100, 7000])
    half = rotate(x, position, Rope(style="half", inv_freq=INV_FREQ))
    interleaved = rotate(x[..., order], position, Rope(style="interleaved", inv_freq=INV_FREQ))
    np.testing.assert_array_equal(half[..., order], interleaved)


def test_tables_and_frequencies_agree() -> None:
    x = np.random.default_rng(0).standard_normal((4, 2, 32))
    position = np.array([0, 1, 77, 4095])
    table = Rope(style="half", cos_sin=make_cos_sin(INV_FREQ, 4096, factor=1.25))
    frequencies = Rope(style="half", inv_freq=INV_FREQ, factor=1.25)
    np.testing.assert_allclose(rotate(x, position, table), rotate(x, position, frequencies), atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(frequency=st.floats(1e-9, 10.0), position=st.integers(0, 2**31 - 1))
def test_turns_overflow_into_the_right_angle(frequency: float, position: int) -> None:
    """The kernel's arithmetic: a 64-bit product, its high half in half turns, sines of that."""
    product = (int(turns_per_position(np.array([frequency]))[0]) * position) % 2**64
    high = product >> 32
    angle = (high - 2**32 if high >= 2**31 else high) * 2.0**-31 * np.pi
    exact = frequency * position  # float64, good to about 1e-16 of it
    assert abs(np.exp(1j * angle) - np.exp(1j * exact)) < 2e-9 + 1e-15 * exact


@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_fp8_is_the_nearest_code(dtype: str) -> None:
    codes = np.arange(256, dtype=np.uint8).view(FP8_DTYPES[dtype]).astype(np.float64)
    codes = np.sort(codes[np.isfinite(codes)])
    x = np.random.default_rng(0).standard_normal(4000) * np.exp2(np.random.default_rng(1).integers(-20, 20, 4000))
    for precision, scale in itertools.product((np.float64, np.float32), (1.0, 0.125, 3.7)):
        stored = quantize_fp8(x.astype(precision), scale, dtype).astype(np.float64)
        best = np.abs(codes[None, :] - x[:, None] / scale).min(axis=1)
        np.testing.assert_allclose(np.abs(stored - x / scale), best, rtol=1e-5, atol=1e-12)
    assert quantize_fp8(np.array([1e9, -np.inf]), 1.0, dtype).astype(float).tolist() == [codes[-1], codes[0]]


@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-20, 15))
def test_int8_is_within_half_a_step(seed: int, exponent: int) -> None:
    x = np.random.default_rng(seed).standard_normal((3, 2, 16)) * 2.0**exponent
    x[0, 0] = 0.0
    stored, scale = quantize_int8(x)
    assert stored.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == (3, 2)
    assert (np.abs(stored).max(axis=-1) == np.where(scale > 0, 127, 0)).all() and scale[0, 0] == 0
    assert (np.abs(stored * scale[..., None].astype(np.float64) - x) <= 0.5001 * scale[..., None]).all()
    narrow, narrow_scale = quantize_int8(x.astype(np.float32))
    assert np.abs(narrow.astype(int) - stored).max() <= 1
    np.testing.assert_allclose(narrow_scale, scale, rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    step=steps(),
    kind=st.sampled_from(["float16", "bfloat16", *CACHE_TYPES]),
    style=st.sampled_from([None, *ROPE_STYLES]),
    nhd=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_append_changes_the_new_tokens_places_and_nothing_else(step, kind, style, nhd, seed) -> None:
    rng = np.random.default_rng(seed)
    tokens = BFLOAT16 if kind == "bfloat16" else np.dtype(np.float16)
    cache = FP8_DTYPES.get(kind, tokens if kind != "int8" else np.dtype(np.int8))
    k_new, v_new, q = (rng.standard_normal((step["num_tokens"], 2, 32)).astype(tokens) for _ in range(3))
    pages = (step["num_pages"], step["page_size"], 2) if nhd else (step["num_pages"], 2, step["page_size"])

    def heads_first(pool: np.ndarray) -> np.ndarray:
        return pool.swapaxes(1, 2) if nhd else pool

    before = rng.integers(0, 100, (2, *pages, 32)).astype(np.int8).astype(cache)
    after, scales = before.copy(), np.full((2, *pages), np.nan, np.float32)
    rope = None if style is None else Rope(style=style, inv_freq=INV_FREQ)
    where = {name: step[name] for name in ("seq_lens", "block_table", "token_offsets")}
    given_scales = {"k_scale": 0.5, "v_scale": 0.25} if kind in FP8_DTYPES else {}
    if kind == "int8":
        given_scales = {"k_token_scales": heads_first(scales[0]), "v_token_scales": heads_first(scales[1])}
    q_out = append(k_new, v_new, heads_first(after[0]), heads_first(after[1]), q=q, rope=rope, **where, **given_scales)
    slots = token_slots(**step)
    written = np.zeros((2, *pages), bool)
    heads_first(written[0])[slots.page, :, slots.slot] = heads_first(written[1])[slots.page, :, slots.slot] = True
    assert (after[~written].view(np.uint8) == before[~written].view(np.uint8)).all()
    step_of = {"float16": 2**-10, "bfloat16": 2**-7, "float8_e4m3fn": 2**-3, "float8_e5m2": 2**-2, "int8": 2**-5}[kind]
    turned = (
        rotate(k_new[slots.token].astype(np.float64), slots.position, rope)
        if rope
        else k_new[slots.token].astype(np.float64)
    )
    for side, expected, scale in ((0, turned, 0.5), (1, v_new[slots.token].astype(np.float64), 0.25)):
        stored = heads_first(after[side])[slots.page, :, slots.slot].astype(np.float64)
        if kind == "int8":
            stored = stored * heads_first(scales[side])[slots.page, :, slots.slot][..., None]
        elif kind in FP8_DTYPES:
            stored = stored * scale
        np.testing.assert_allclose(stored, expected, rtol=step_of, atol=step_of)
    assert np.isnan(scales).all() if kind != "int8" else (np.isnan(scales) == ~written).all()
    passed_over = np.setdiff1d(np.arange(step["num_tokens"]), slots.token)
    assert (q_out[passed_over] == q[passed_over]).all() and q_out.dtype == tokens


@pytest.fixture(scope="session")
def encode(tmp_path_factory):
    """(float32 values, dtype) -> codes, by the header."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    built = tmp_path_factory.mktemp("quantize") / "quantize_harness.so"
    subprocess.run(
        [
            COMPILER,
            "-std=c++17",
            "-O2",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-shared",
            "-fPIC",
            f"-I{SOURCE_DIR}",
            "-o",
            built,
            HARNESS,
        ],
        check=True,
    )
    library = ctypes.CDLL(str(built))

    def call(values: np.ndarray, dtype: str) -> np.ndarray:
        values, codes = np.ascontiguousarray(values, np.float32), np.zeros(len(values), np.uint8)
        function = library.encode_e4m3 if dtype == "float8_e4m3fn" else library.encode_e5m2
        function(ctypes.c_void_p(values.ctypes.data), len(values), ctypes.c_void_p(codes.ctypes.data))
        return codes

    return call


@pytest.mark.parametrize("dtype", FP8_DTYPES)
def test_the_kernels_own_fp8_is_the_references(encode, dtype: str) -> None:
    """Every FP16 and BF16 number, and the neighbours of every tie and code."""
    every = np.arange(2**16, dtype=np.uint16)
    values = np.concatenate([every.view(np.float16).astype(np.float32), every.view(BFLOAT16).astype(np.float32)])
    codes = np.arange(256, dtype=np.uint8).view(FP8_DTYPES[dtype]).astype(np.float32)
    codes = np.sort(codes[np.isfinite(codes)])
    edges = np.concatenate([codes, (codes[1:] + codes[:-1]) / 2])
    values = np.concatenate(
        [values, edges, np.nextafter(edges, np.float32(np.inf)), np.nextafter(edges, np.float32(-np.inf))]
    )
    numbers = values[~np.isnan(values)]
    np.testing.assert_array_equal(encode(numbers, dtype), quantize_fp8(numbers, 1.0, dtype).view(np.uint8))
    assert np.isnan(encode(np.array([np.nan, -np.nan]), dtype).view(FP8_DTYPES[dtype]).astype(float)).all()


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


def test_the_signature_is_the_kernels() -> None:
    source = (SOURCE_DIR / "append.cu").read_text()
    parameters = re.search(r"pkv_append\(([^)]*)\)", source)[1].split(",")
    letters = [
        "p"
        if "*" in p
        else "q"
        if "long long" in p
        else "i"
        if " int " in f" {p.strip()} " or p.strip().startswith("int")
        else "f"
        for p in parameters
    ]
    assert "".join(letters) == SIGNATURE


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"style": "llama", "inv_freq": INV_FREQ}, "style"),
        ({"style": "half"}, "exactly one"),
        ({"style": "half", "inv_freq": INV_FREQ, "cos_sin": make_cos_sin(INV_FREQ, 4)}, "exactly one"),
        ({"style": "half", "inv_freq": INV_FREQ[:5]}, "multiples of 16"),
        ({"style": "half", "cos_sin": INV_FREQ}, "cos_sin"),
        ({"style": "half", "inv_freq": 1.0}, "inv_freq"),
        ({"style": "half", "inv_freq": INV_FREQ, "factor": np.inf}, "factor"),
        ({"style": "half", "cos_sin": make_cos_sin(INV_FREQ, 4), "factor": 2.0}, "factor"),
    ],
)
def test_a_bad_rope_is_named(fields: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Rope(**fields)


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
