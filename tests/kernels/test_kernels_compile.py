"""Every kernel becomes machine code for every architecture, without spills and within what an SM has."""
import itertools
import re
from pathlib import Path

import numpy as np
import nvrtc
import pytest
from slow import slow_unless, slow_unless_of

from gpu.cache import append_variant as append_config
from gpu.inputs.block_tables import TableLayout
from gpu.kernels.compile import SOURCE_DIR, compile_options
from gpu.kernels.variant import DTYPES, SHARED_LIMIT_BYTES, KernelConfig, kernel_config
from gpu.measure.timing import STREAM_SHAPES
from pkvsim import AttentionOptions, DecodeShape
from pkvsim.kv_types import KV_DTYPES
from pkvsim.reference.rope import ROPE_STYLES, Rope

HEAD_DIMS = (64, 128, 256)
CAPABILITIES = (80, 86, 89, 90, 120)
GROUP_SIZES = (1, 4, 5, 8, 16)
PAGE_SIZES = (16, 1, 64, 3)
REGISTERS_PER_THREAD, REGISTERS_PER_SM = 255, 65536

# Of each test, make test compiles what the GPU record has most of; the rest is for make test-slow.
OFTEN = ((86, 128, 4), (90, 128, 8))  # capability, head_dim, group size
# The full product is eight times this. Here every capability meets every head_dim and group size; dtypes and page sizes
# take turns, such that every capability also meets every (dtype, head_dim).
VARIANTS = [(*case, PAGE_SIZES[index // 2 % 4], tuple(DTYPES)[index % 2])
            for index, case in enumerate(itertools.product(CAPABILITIES, HEAD_DIMS, GROUP_SIZES))]


def variant(capability: int, head_dim: int, group_size: int, page_size: int, dtype: str) -> KernelConfig:
    return kernel_config(DecodeShape(group_size, 1, head_dim, page_size), dtype, capability)


OPTIONS = (AttentionOptions(window=4096, soft_cap=30.0, sinks=True), AttentionOptions(query_tokens=4, window=128),
           AttentionOptions(v_head_dim=128))


def assert_fits(file_name, kernel_name, defines, capability, *, threads, dynamic_shared=0):
    compiled = nvrtc.kernel_resources(SOURCE_DIR / file_name, capability, compile_options(defines))
    assert set(compiled) == {kernel_name}
    used = compiled[kernel_name]
    assert 0 < used.registers <= REGISTERS_PER_THREAD
    assert threads * -(-used.registers // 8) * 8 <= REGISTERS_PER_SM  # given out eight at a time
    assert used.stack == 0 and used.spills == 0
    assert used.static_shared + dynamic_shared <= SHARED_LIMIT_BYTES[capability]


def test_variants_cover_what_they_claim():
    assert {v[:3] for v in VARIANTS} == set(itertools.product(CAPABILITIES, HEAD_DIMS, GROUP_SIZES))
    assert {(v[0], v[4], v[1]) for v in VARIANTS} == set(itertools.product(CAPABILITIES, DTYPES, HEAD_DIMS))
    assert {(v[4], v[2]) for v in VARIANTS} == set(itertools.product(DTYPES, GROUP_SIZES))
    assert {(v[4], v[3]) for v in VARIANTS} == set(itertools.product(DTYPES, PAGE_SIZES))
    assert {(v[1], v[3]) for v in VARIANTS} == set(itertools.product(HEAD_DIMS, PAGE_SIZES))


@pytest.mark.parametrize("capability", SHARED_LIMIT_BYTES)
def test_every_shape_has_a_variant(capability):
    for head_dim, group_size, dtype in itertools.product(HEAD_DIMS, range(1, max(GROUP_SIZES) + 1), DTYPES):
        assert variant(capability, head_dim, group_size, 16, dtype).shared_bytes <= SHARED_LIMIT_BYTES[capability]


@pytest.mark.parametrize(("capability", "head_dim", "group_size", "page_size", "dtype"),
                         slow_unless_of(lambda *case: case[:3] in OFTEN, VARIANTS))
def test_attention_kernels_fit(capability, head_dim, group_size, page_size, dtype):
    config = variant(capability, head_dim, group_size, page_size, dtype)
    for file_name, kernel_name, shared in (("balanced.cu", "pkv_decode_balanced", config.shared_bytes),
                                           ("decode.cu", "pkv_decode_tasks", config.shared_bytes),
                                           ("merge.cu", "pkv_merge", 0)):
        assert_fits(file_name, kernel_name, config.defines(), capability, threads=config.threads, dynamic_shared=shared)


@pytest.mark.parametrize("options", slow_unless(lambda options: options.soft_cap, OPTIONS), ids=repr)
@pytest.mark.parametrize("capability", slow_unless(lambda capability: capability == 90, (86, 90)))
def test_options_fit(capability, options):
    config = kernel_config(
        DecodeShape(4, 1, 192 if options.v_head_dim else 128, 16), "bfloat16", capability, options=options
    )
    for file_name, kernel_name in (("balanced.cu", "pkv_decode_balanced"), ("decode.cu", "pkv_decode_tasks")):
        assert_fits(
            file_name,
            kernel_name,
            config.defines(),
            capability,
            threads=config.threads,
            dynamic_shared=config.shared_bytes,
        )


# Ids of both types, both ways of telling lengths; capabilities and page sizes take turns.
TABLES = ((86, 16, "balanced.cu", TableLayout(int64=True)), (90, 16, "balanced.cu", TableLayout(csr=True)),
          (90, 1, "balanced.cu", TableLayout(int64=True, csr=True, last_page=True)),
          (86, 16, "balanced.cu", TableLayout(csr=True, last_page=True)), (90, 3, "decode.cu", TableLayout(csr=True)))


@pytest.mark.parametrize(("capability", "page_size", "file_name", "layout"),
                         slow_unless_of(lambda *case: case[3].int64 and case[3].csr, TABLES))
def test_layouts_of_tables_fit(capability, page_size, file_name, layout):
    config = variant(capability, 128, 4, page_size, "float16")
    kernel_name = "pkv_decode_balanced" if file_name == "balanced.cu" else "pkv_decode_tasks"
    assert_fits(file_name, kernel_name, config.defines() | layout.defines(), capability, threads=config.threads,
                dynamic_shared=config.shared_bytes)


# Columns beyond a warp's registers: (head_dim, group, query tokens, page size), and the team that shares the tiles. 32
# columns of head_dim 128 with every kind of pages, on little shared memory and on much; elsewhere these take turns, and
# so do the kernels.
TEAMS = (((128, 32, 1, 16), 2), ((128, 4, 8, 3), 2), ((128, 5, 5, 1), 2), ((128, 8, 8, 16), 4), ((64, 64, 1, 64), 2),
         ((64, 128, 1, 16), 4), ((192, 16, 1, 16), 2), ((256, 16, 1, 16), 2), ((256, 4, 8, 1), 4))
PAGES_OF_TEAMS = (("float16", None, None), ("bfloat16", None, None), ("float16", "int8", "token"),
                  ("bfloat16", "float8_e4m3fn", "tensor"))
TEAM_VARIANTS = [(*case, *pages, (86, 90)[j], (i + k + j) % 2) for i, case in enumerate(TEAMS)
                 for k, pages in enumerate(PAGES_OF_TEAMS) for j in range(2) if i < 2 or i // 2 % 2 == (k // 2 + j) % 2]


@pytest.mark.parametrize(("case", "team", "dtype", "kv_dtype", "kv_scales", "capability", "tasks"),
                         slow_unless_of(lambda *variant: variant in TEAM_VARIANTS[::40], TEAM_VARIANTS))
def test_teams_fit(case, team, dtype, kv_dtype, kv_scales, capability, tasks):
    head_dim, group_size, tokens, page_size = case
    options = AttentionOptions(query_tokens=tokens).with_cache(kv_dtype, kv_scales)
    config = kernel_config(DecodeShape(group_size, 1, head_dim, page_size), dtype, capability, options=options)
    assert (config.head_split, config.team) == (1, team)  # pages are read once
    names = ("balanced.cu", "pkv_decode_balanced"), ("decode.cu", "pkv_decode_tasks")
    assert_fits(*names[tasks], config.defines(), capability, threads=config.threads, dynamic_shared=config.shared_bytes)


# 8-bit pages: every capability meets every type; kinds of scales, head_dims, group sizes, page sizes and dtypes take
# turns, such that every type meets all of each. A page's scales are a token's with a stride of 0.
KV_VARIANTS = [(capability, kv_dtype, ("tensor", "token")[(i // 2 + j) % 2], (64, 128, 192, 256)[(i + j) % 4],
                (1, 4, 8, 16)[(i + 2 * j) % 4], PAGE_SIZES[(3 * i + j) % 4], tuple(DTYPES)[(i + j) % 2])
               for i, capability in enumerate(CAPABILITIES) for j, kv_dtype in enumerate(KV_DTYPES)]


def test_kv_variants_cover_what_they_claim():
    assert {v[:2] for v in KV_VARIANTS} == set(itertools.product(CAPABILITIES, KV_DTYPES))
    places = {2: ("tensor", "token"), 3: (64, 128, 192, 256), 4: (1, 4, 8, 16), 5: PAGE_SIZES, 6: DTYPES}
    for place, values in places.items():
        assert {(v[1], v[place]) for v in KV_VARIANTS} == set(itertools.product(KV_DTYPES, values))


@pytest.mark.parametrize(("capability", "kv_dtype", "kv_scales", "head_dim", "group_size", "page_size", "dtype"),
                         slow_unless_of(lambda capability, kv_dtype, *_: (capability, kv_dtype) == (90, KV_DTYPES[0]), KV_VARIANTS))
def test_kernels_of_8_bit_pages_fit(capability, kv_dtype, kv_scales, head_dim, group_size, page_size, dtype):
    options = AttentionOptions(kv_dtype=kv_dtype, kv_scales=kv_scales)
    config = kernel_config(DecodeShape(group_size, 1, head_dim, page_size), dtype, capability, options=options)
    names = ("balanced.cu", "pkv_decode_balanced"), ("decode.cu", "pkv_decode_tasks")
    assert_fits(*names[(capability + head_dim // 64) % 2], config.defines(), capability, threads=config.threads,
                dynamic_shared=config.shared_bytes)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS[:2], ids=repr)
def test_options_of_8_bit_pages_fit(options):
    options = options.with_cache("int8")
    config = kernel_config(DecodeShape(4, 1, 192 if options.v_head_dim else 128, 16), "bfloat16", 90, options=options)
    assert_fits("balanced.cu", "pkv_decode_balanced", config.defines(), 90, threads=config.threads,
                dynamic_shared=config.shared_bytes)


@pytest.mark.parametrize("capability", SHARED_LIMIT_BYTES)
def test_every_shape_has_a_variant_for_8_bit_pages(capability):
    kinds = itertools.product((64, 128, 192, 256), range(1, 33), (1, 8), ("tensor", "token"))
    for head_dim, group_size, tokens, kv_scales in kinds:
        options = AttentionOptions(kv_dtype="int8", kv_scales=kv_scales, query_tokens=tokens)
        config = kernel_config(DecodeShape(group_size, 1, head_dim, 16), "float16", capability, options=options)
        assert config.shared_bytes <= SHARED_LIMIT_BYTES[capability]


def test_a_ring_of_8_bit_pages_keeps_as_many_bytes_in_flight():
    for head_dim in (64, 128, 192, 256):
        shape, options = DecodeShape(4, 1, head_dim, 16), AttentionOptions(kv_dtype="float8_e4m3fn")
        config = kernel_config(shape, "float16", 90, options=options)
        assert 96 * 1024 <= config.warps * config.stages * 16 * 2 * head_dim <= 144 * 1024


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_8_bit_pages_stay_bytes_up_to_the_registers(kv_dtype):
    options = AttentionOptions(kv_dtype=kv_dtype, kv_scales="token")
    config = kernel_config(DecodeShape(4, 1, 128, 16), "bfloat16", 90, options=options)
    text = nvrtc.ptx(SOURCE_DIR / "balanced.cu", 90, compile_options(config.defines()))
    assert ("cvt.rn.f16x2.e4m3x2" in text) == (kv_dtype == "float8_e4m3fn")
    assert "m16n8k16.row.col.f32.f16.f16.f32" in text and "m16n8k16.row.col.f32.bf16" not in text
    # A tile's 4 KiB of K and V, half a KiB by each ldmatrix.
    assert text.count("ldmatrix.") == 8 and text.count("ldmatrix.sync.aligned.m8n8.x4.trans") == 4


@pytest.mark.parametrize("capability", slow_unless(lambda capability: capability in (86, 90), CAPABILITIES))
def test_plan_kernel_fits(capability):
    assert_fits("plan.cu", "pkv_list_balanced", {}, capability, threads=32)


@pytest.mark.parametrize("capability", slow_unless(lambda capability: capability == 90, CAPABILITIES))
@pytest.mark.parametrize("unroll", sorted({unroll for _, _, unroll in STREAM_SHAPES}))
def test_stream_kernel_fits(unroll, capability):
    threads = max(threads for _, threads, other in STREAM_SHAPES if other == unroll)
    assert_fits("stream.cu", "pkv_stream_read", {"UNROLL": unroll}, capability, threads=threads)


# Every cache type with every way of rotating, and with every architecture; dims (K, V, rotated) and dtypes take turns.
APPEND_DIMS = ((128, 128, 128), (64, 64, 32), (192, 128, 64), (256, 256, 256), (80, 80, 32))
APPEND_ROPES = (None, *itertools.product(ROPE_STYLES, ("cos_sin", "inv_freq")))
APPEND_VARIANTS = [
    (CAPABILITIES[(i + j) % 5], kv_dtype, way, APPEND_DIMS[(i + 2 * j) % 5], tuple(DTYPES)[(i + j) % 2])
    for i, kv_dtype in enumerate((None, *append_config.CACHE_TYPES))
    for j, way in enumerate(APPEND_ROPES)
]


def append_defines(kv_dtype, way, dims, dtype):
    head_dim, head_dim_v, rotary_dim = dims
    angles = {"cos_sin": np.zeros((1, rotary_dim), np.float32), "inv_freq": np.zeros(rotary_dim // 2)}
    rope = None if way is None else Rope(style=way[0], **{way[1]: angles[way[1]]})
    return append_config.defines(
        DecodeShape(4, 1, head_dim, 16), dtype, kv_dtype=kv_dtype or dtype, head_dim_v=head_dim_v, rope=rope
    )


@pytest.mark.parametrize(("capability", "kv_dtype", "way", "dims", "dtype"),
                         slow_unless_of(lambda capability, *_: capability == 90, APPEND_VARIANTS))
def test_append_kernel_fits(capability, kv_dtype, way, dims, dtype):
    assert_fits("append.cu", "pkv_append", append_defines(kv_dtype, way, dims, dtype), capability,
                threads=append_config.WARPS * 32)


@pytest.mark.parametrize("kv_dtype", [None, "float8_e4m3fn"])
def test_new_tokens_move_sixteen_bytes_at_a_time(kv_dtype):
    options = compile_options(append_defines(kv_dtype, (ROPE_STYLES[0], "cos_sin"), APPEND_DIMS[0], "float16"))
    text = nvrtc.ptx(SOURCE_DIR / "append.cu", 90, options)
    loads = [line.split()[0] for line in text.splitlines() if line.strip().startswith("ld.global.L1::no_allocate")]
    assert len(loads) % 8 == 0 and set(loads) == {"ld.global.L1::no_allocate.v4.u32"}
    stores = {int(count) * int(bits) // 8 for count, bits in re.findall(r"st\.global\.v(\d)\.[a-z](\d+)", text)}
    assert stores == ({16} if kv_dtype is None else {16, 8})  # queries stay 16-bit
    assert text.count("st.global") == text.count("st.global.v")
    assert ("cvt.rn.satfinite.e4m3x2.f32" in text) == (kv_dtype is not None)


@pytest.mark.parametrize("file_name", ["balanced.cu", "decode.cu"])
def test_tiles_are_copied_sixteen_bytes_at_a_time(file_name):
    options = compile_options(variant(80, 128, 4, 16, "bfloat16").defines())
    copies = [line.split(";")[0].split() for line in nvrtc.ptx(SOURCE_DIR / file_name, 80, options).splitlines()
              if line.strip().startswith("cp.async.") and "group" not in line and "wait" not in line]
    assert copies
    for name, *operands in copies:
        assert name.startswith("cp.async.cg.shared.global") and operands[2].rstrip(",") == "16"


ELSEWHERE = {  # sources with more to test than that they compile, and the tests that compile them
    "block_sums.cu": "test_block_sums_kernel.py",
    "gather.cu": "test_gather_kernel.py",
    "product.cu": "test_product_kernel.py",
    "rows.cu": "test_rows_kernels.py",
    "plan_spans.cu": "test_span_header.py",
    "prefixes.cu": "test_prefix_kernel.py",
    "several.cu": "test_several_kernel.py",
    "select.cu": "test_select_kernel.py",
    "selected.cu": "test_selected_kernel.py",
    "shared.cu": "test_shared_kernel.py",
    "summaries.cu": "test_select_kernel.py",
}


def test_every_source_is_compiled():
    here = {"append.cu", "balanced.cu", "decode.cu", "merge.cu", "plan.cu", "stream.cu"}
    assert {path.name for path in SOURCE_DIR.glob("*.cu")} == here | set(ELSEWHERE)
    for source, tests in ELSEWHERE.items():
        assert f'kernel_resources(SOURCE_DIR / "{source}"' in Path(__file__).with_name(tests).read_text()


def test_an_error_carries_the_compilers_words(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void kernel() { undeclared(); }")
    with pytest.raises(RuntimeError, match="undeclared"):
        nvrtc.kernel_resources(source, 80, ())


def test_spills_are_seen(tmp_path):
    """The check that finds none must be able to find some."""
    source = tmp_path / "spills.cu"
    source.write_text("""
extern "C" __global__ void __launch_bounds__(1024) spilling(float* x) {
  __shared__ float kept[64];
  float held[200];
  #pragma unroll
  for (int i = 0; i < 200; ++i) held[i] = x[i * 1024 + threadIdx.x];
  kept[threadIdx.x % 64] = held[0];
  __syncthreads();
  #pragma unroll
  for (int i = 0; i < 200; ++i) x[i * 1024 + threadIdx.x] = held[199 - i] * kept[i % 64];
}""")
    used = nvrtc.kernel_resources(source, 90, ())["spilling"]
    assert used.registers <= 64 and used.stack > 0 and used.spills > 0 and used.static_shared == 256
