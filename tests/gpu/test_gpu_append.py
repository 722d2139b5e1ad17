"""CacheWriter against pkvsim.reference_append: bit for bit, over the whole pool, so that a stray byte shows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import ml_dtypes
import numpy as np
import pytest
import torch
from decode_ref import Case, check, make_table

from gpu import CacheWriter, DecodeEngine
from pkvsim import DecodeShape, reference_append
from pkvsim.rope import ROPE_STYLES, Rope, make_cos_sin

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


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("style", ROPES)
@pytest.mark.parametrize("dims", SHAPES, ids=lambda dims: "-".join(map(str, dims)))
def test_every_variant_bit_for_bit(dims: tuple[int, ...], style: str | None, kv_dtype: str | None) -> None:
    for seed, (dtype, layout, ragged, combined) in enumerate(
        (
            ("float16", "HND", False, False),
            ("bfloat16", "NHD", True, False),
            ("float16", "NHD", True, dims[0] == dims[1]),
        )
    ):
        step = make_step(
            dims, dtype=dtype, kv_dtype=kv_dtype, layout=layout, ragged=ragged, combined=combined, seed=seed
        )
        want = expected(step, rope_of(style, dims[2], on_gpu=False), layout)
        writer = CacheWriter(
            step.shape,
            dtype,
            kv_dtype=kv_dtype,
            layout=layout,
            head_dim_v=dims[1],
            rope=rope_of(style, dims[2], on_gpu=True),
        )
        q = step.q if style else None  # without a rope queries have no business here
        given = writer.append(
            step.k_new, step.v_new, step.k_pages, step.v_pages, q=q, validate=False, **step.where(), **step.options
        )
        assert given is q
        assert_same_bits(step, step.q, want)


@pytest.mark.parametrize("style", ROPE_STYLES)
@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_frequencies_at_far_positions(style: str, dtype: str) -> None:
    """Against float64: off by no more than the rounding of the output and FP32's of the angle's sine."""
    dims = (32, 32, 32, 8, 1, 256)
    lens = (131072, 1, 1 << 20, 77)
    step = make_step(dims, dtype=dtype, lens=lens, seed=3)
    rope = Rope(style=style, inv_freq=inv_freq(32), factor=0.9)
    want_k, want_v, want_q, _, _ = expected(step, rope, "HND", np.float64)
    q_out = torch.full_like(step.q, float("nan"), memory_format=torch.contiguous_format)
    before = step.q.clone()
    writer = CacheWriter(step.shape, dtype, rope=rope)
    assert (
        writer.append(step.k_new, step.v_new, step.k_pages, step.v_pages, q=step.q, q_out=q_out, **step.where())
        is q_out
    )
    torch.cuda.synchronize()
    assert torch.equal(step.q, before) and (raw(to_numpy(step.v_pages)) == raw(want_v)).all()
    unit = 2.0**-10 if dtype == "float16" else 2.0**-7
    for found, want in ((step.k_pages, want_k), (q_out, want_q)):
        found, want = to_numpy(found).astype(np.float64), want.astype(np.float64)
        assert (np.abs(found - want) <= unit * np.abs(want) + 5e-6).all()


def test_table_and_frequencies_agree() -> None:
    dims, pools = SHAPES[0], []
    for rope in (
        rope_of("half", 128, on_gpu=True),
        Rope(style="half", inv_freq=torch.from_numpy(inv_freq(128)).cuda(), factor=1.1),
    ):
        step = make_step(dims, ragged=True, seed=9)
        CacheWriter(step.shape, rope=rope).append(step.k_new, step.v_new, step.k_pages, step.v_pages, **step.where())
        pools.append(step.k_pages.float())
    torch.testing.assert_close(pools[0], pools[1], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("kv_dtype", ("float8_e4m3fn", "float8_e5m2"))
def test_scales_on_the_gpu_and_bytes_for_pages(kv_dtype: str) -> None:
    step = make_step(SHAPES[0], kv_dtype=kv_dtype, ragged=True)
    want = expected(step, None, "HND")
    scales = {name: torch.full((1,), value, device="cuda") for name, value in step.options.items()}
    pages = [pool.view(torch.uint8) for pool in (step.k_pages, step.v_pages)]
    CacheWriter(step.shape, kv_dtype=kv_dtype).append(step.k_new, step.v_new, *pages, **step.where(), **scales)
    assert_same_bits(step, step.q, want)


@pytest.mark.parametrize("kv_dtype", ("float8_e4m3fn", "float8_e5m2", "int8"))
def test_largest_numbers_saturate(kv_dtype: str) -> None:
    step = make_step(SHAPES[0], kv_dtype=kv_dtype)
    step.k_new[:, :, ::3] = 65504.0
    step.k_new[:, 1, 1::3] = -65504.0
    step.v_new[:, 0] = 0.0
    want = expected(step, None, "HND")
    CacheWriter(step.shape, kv_dtype=kv_dtype).append(
        step.k_new, step.v_new, step.k_pages, step.v_pages, **step.where(), **step.options
    )
    assert_same_bits(step, step.q, want)


def test_a_combined_cache_and_cupy_arrays() -> None:
    cupy = pytest.importorskip("cupy")
    step = make_step(SHAPES[0], combined=True, ragged=True)
    want = expected(step, None, "HND")
    torch.cuda.synchronize()
    both = torch.as_strided(
        step.k_pages,
        (step.k_pages.shape[0], 2, *step.k_pages.shape[1:]),
        (step.k_pages.stride(0), step.k_pages.stride(0) // 2, *step.k_pages.stride()[1:]),
    )
    k_new, v_new, pages = (cupy.from_dlpack(array) for array in (step.k_new, step.v_new, both))
    CacheWriter(step.shape).append(
        k_new, v_new, pages, **{name: cupy.from_dlpack(array) for name, array in step.where().items()}
    )
    cupy.cuda.Device().synchronize()
    assert_same_bits(step, step.q, want)


def test_what_is_not_there_is_passed_over() -> None:
    """Wrong page ids, rows shorter than their tokens, lengths past the table: neither pages nor queries change."""
    step = make_step(SHAPES[0], ragged=True)
    rope = rope_of("half", 128, on_gpu=False)
    lens, table = step.seq_lens.cpu().numpy(), step.block_table.cpu().numpy()
    table[1, 0], table[4, 53] = -1, step.k_pages.shape[0]
    lens[5], lens[6] = 20, 10**9  # 33 tokens in a row of 20
    step = replace(step, seq_lens=torch.from_numpy(lens).cuda(), block_table=torch.from_numpy(table).cuda())
    want = expected(step, rope, "HND")
    writer = CacheWriter(step.shape, rope=rope_of("half", 128, on_gpu=True))
    writer.append(step.k_new, step.v_new, step.k_pages, step.v_pages, q=step.q, **step.where())
    assert_same_bits(step, step.q, want)
    with pytest.raises(ValueError, match="^seq_lens"):
        writer.append(step.k_new, step.v_new, step.k_pages, step.v_pages, q=step.q, validate=True, **step.where())


def test_random_ragged_steps() -> None:
    """One writer, batch, tokens and layouts of tensors changing from call to call; many rows, so that the search for a
    token's row takes several rounds."""
    rng = np.random.default_rng(20260623)
    writers = {
        kv: CacheWriter(make_step(SHAPES[1]).shape, kv_dtype=kv, rope=rope_of("interleaved", 32, on_gpu=True))
        for kv in KV_DTYPES
    }
    for seed in range(60):
        batch = int(rng.choice([1, 2, 31, 32, 33, 1000, 1100]))
        counts = rng.integers(0, 4, batch)
        lens = np.where(rng.random(batch) < 0.2, 0, counts + rng.integers(0, 30, batch))
        kv_dtype = KV_DTYPES[seed % 4]
        step = make_step(SHAPES[1], kv_dtype=kv_dtype, ragged=True, lens=tuple(lens), counts=tuple(counts), seed=seed)
        want = expected(step, rope_of("interleaved", 32, on_gpu=False), "HND")
        writers[kv_dtype].append(
            step.k_new, step.v_new, step.k_pages, step.v_pages, q=step.q, **step.where(), **step.options
        )
        assert_same_bits(step, step.q, want)


def test_many_tokens() -> None:
    """Enough that a warp takes all heads of its token."""
    step = make_step(SHAPES[0], ragged=True, lens=(6000, 5, 3000), counts=(5000, 5, 2999))
    want = expected(step, Rope(style="half", cos_sin=make_cos_sin(inv_freq(128), 8192)), "HND")
    writer = CacheWriter(
        step.shape, rope=Rope(style="half", cos_sin=torch.from_numpy(make_cos_sin(inv_freq(128), 8192)).cuda())
    )
    writer.append(step.k_new, step.v_new, step.k_pages, step.v_pages, q=step.q, validate=True, **step.where())
    assert_same_bits(step, step.q, want)


def test_pool_beyond_32_bit_offsets() -> None:
    shape = DecodeShape(num_q_heads=8, num_kv_heads=8, head_dim=128, page_size=16)
    page = 8 * 16 * 128
    num_pages = 2**32 // page + 100
    pool = torch.zeros((num_pages, 8, 16, 128), dtype=torch.float16, device="cuda")
    ids = torch.tensor(
        [0, 2**31 // page - 1, 2**31 // page, 2**32 // page - 1, 2**32 // page, num_pages - 1],
        dtype=torch.int32,
        device="cuda",
    )
    k_new, v_new = torch.rand((2, 6, 8, 128), device="cuda").half() + 1
    lens = torch.tensor([1, 16, 5, 16, 1, 16], dtype=torch.int32, device="cuda")
    CacheWriter(shape).append(k_new, v_new, pool, torch.zeros_like(pool), seq_lens=lens, block_table=ids[:, None])
    torch.cuda.synchronize()
    assert torch.equal(pool[ids.long(), :, lens.long() - 1], k_new)
    assert sum(int(torch.count_nonzero(part)) for part in pool.split(4096)) == k_new.numel()


def write_prompt(lens: np.ndarray, k_pages: torch.Tensor, v_pages: torch.Tensor, table: torch.Tensor) -> None:
    """The rows' first tokens, as a prefill would write them."""
    shape = DecodeShape(num_q_heads=8, num_kv_heads=8, head_dim=128, page_size=16)
    offsets = torch.from_numpy(np.concatenate(([0], np.cumsum(lens))).astype(np.int32)).cuda()
    k_new, v_new = (torch.randn(int(lens.sum()), 8, 128, device="cuda").half() for _ in range(2))
    CacheWriter(shape).append(
        k_new,
        v_new * 0.5,
        k_pages,
        v_pages,
        seq_lens=torch.from_numpy(lens).cuda(),
        block_table=table,
        token_offsets=offsets,
        validate=True,
    )


def decode_loop(*, steps: int, graph: bool) -> None:
    """Appends and decodes with nothing in between but the lengths' increment, then checks every step's output."""
    shape = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)
    start = np.array([1, 15, 16, 300, 0, 2000], np.int32)  # the fifth row stays empty
    table = make_table(start + steps + 1, 16, np.random.default_rng(0).permutation(1000).astype(np.int32))
    k_pages, v_pages = (
        torch.full((1000, 8, 16, 128), float("nan"), dtype=torch.float16, device="cuda") for _ in range(2)
    )
    table = torch.from_numpy(table).cuda()
    write_prompt(start, k_pages, v_pages, table)
    lens = torch.from_numpy(start).cuda()
    live = (lens > 0).int()
    fused = torch.randn(steps, len(start), 48 * 128, device="cuda")
    fused[..., 40 * 128 :] *= 0.5  # V, as in decode_ref
    fused = fused.half()
    static = fused[0].clone()
    q, k_new, v_new = (part.unflatten(1, (-1, 128)) for part in static.split((4096, 1024, 1024), dim=1))
    q_turned = torch.empty(len(start), 32, 128, dtype=torch.float16, device="cuda")
    out, lse = torch.empty_like(q_turned), torch.empty(len(start), 32, device="cuda")
    writer = CacheWriter(shape, rope=Rope(style="half", inv_freq=inv_freq(128)))
    engine = DecodeEngine(shape)
    engine.plan(lens, table)

    def step() -> None:
        lens.add_(live)
        writer.append(k_new, v_new, k_pages, v_pages, seq_lens=lens, block_table=table, q=q, q_out=q_turned)
        engine.run(q_turned, k_pages, v_pages, out=out, lse=lse)

    kept = []
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        if graph:
            step()  # loads the kernels, and is undone
            lens.sub_(live)
            torch.cuda.synchronize()
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured, stream=stream):
                step()
        for index in range(steps):
            static.copy_(fused[index])
            q_turned.fill_(float("nan"))
            captured.replay() if graph else step()
            kept.append([array.clone() for array in (q_turned, lens, out, lse)])
    torch.cuda.synchronize()
    for index, (turned, step_lens, step_out, step_lse) in enumerate(kept):
        if index % 7 and index != steps - 1:
            continue
        empty = step_lens == 0
        assert bool(turned[empty].isnan().all()) and not bool(turned[~empty].isnan().any())
        case = Case(shape, torch.where(empty[:, None, None], 0, turned), k_pages, v_pages, table, step_lens)
        check(step_out, step_lse, case, dtype="float16")


@pytest.mark.parametrize("graph", (False, True))
def test_append_and_decode_back_to_back(graph: bool) -> None:
    decode_loop(steps=50, graph=graph)


BAD = {
    "k_new dtype": ("k_new", lambda a: a | {"k_new": a["k_new"].float()}),
    "fewer tokens than v_new": ("v_new", lambda a: a | {"k_new": a["k_new"][:3]}),
    "v_new on the host": ("v_new", lambda a: a | {"v_new": a["v_new"].cpu()}),
    "numpy": ("v_new", lambda a: a | {"v_new": a["v_new"].cpu().numpy()}),
    "a list": ("seq_lens", lambda a: a | {"seq_lens": [1, 2, 3]}),
    "k_pages rank": ("k_pages", lambda a: a | {"k_pages": a["k_pages"][0]}),
    "v_pages missing": ("v_pages", lambda a: a | {"v_pages": None}),
    "lengths": ("seq_lens", lambda a: a | {"seq_lens": a["seq_lens"].long()}),
    "q without rope": ("q", lambda a: a | {"q": a["k_new"]}),
    "q_out alone": ("q_out", lambda a: a | {"q_out": a["k_new"]}),
    "k_scale": ("k_scale", lambda a: a | {"k_scale": 2.0}),
    "scales": ("k_token_scales", lambda a: a | {"k_token_scales": a["k_new"]}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    argument, spoil = BAD[name]
    step = make_step(SHAPES[0])
    good = {"k_new": step.k_new, "v_new": step.v_new, "k_pages": step.k_pages, "v_pages": step.v_pages, **step.where()}
    before = step.k_pages.clone()
    writer = CacheWriter(step.shape)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"^{argument}\b"):
            writer.append(**spoil(good))
    torch.cuda.synchronize()
    assert torch.equal(step.k_pages.view(torch.uint8), before.view(torch.uint8)), "nothing may be launched"
    want = expected(step, None, "HND")
    writer.append(**good)  # and the writer is none the worse
    assert_same_bits(step, step.q, want)


@pytest.mark.parametrize("scale", (0.0, -1.0, float("inf"), float("nan"), None, "1"))
def test_bad_scales(scale: object) -> None:
    step = make_step(SHAPES[0], kv_dtype="float8_e4m3fn")
    with pytest.raises(ValueError, match="^k_scale"):
        CacheWriter(step.shape, kv_dtype="float8_e4m3fn").append(
            step.k_new, step.v_new, step.k_pages, step.v_pages, k_scale=scale, **step.where()
        )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "float32"}, "dtype"),
        ({"kv_dtype": "bfloat16"}, "kv_dtype"),
        ({"layout": "HDN"}, "layout"),
        ({"head_dim_v": 100}, "head_dim_v"),
        ({"rope": Rope(style="half", inv_freq=inv_freq(256))}, "rope"),
        ({"rope": Rope(style="half", cos_sin=make_cos_sin(inv_freq(128), 8))}, "cos_sin"),
    ],
)
def test_bad_writers(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        CacheWriter(make_step(SHAPES[0]).shape, **options)
