"""gpu.kernels.fields against the C structures (cuda_src/arguments.cuh, plan.cuh) and the kernels' parameters."""
from __future__ import annotations

import functools
import re
import subprocess

import nvrtc
import pytest
from cpp import COMPILER, STRICT
from slow import slow_unless_of

from gpu.cache import append_variant
from gpu.engine.decode_kernels import BALANCED_VALUES, LISTED_VALUES, MERGE_VALUES, TASKS_VALUES
from gpu.inputs.block_tables import TableLayout
from gpu.kernels import fields
from gpu.kernels.compile import SOURCE_DIR, compile_options
from gpu.kernels.launch import Arguments
from gpu.kernels.variant import kernel_config, read_config
from gpu.selection.variant import selection_defines
from gpu.serve.model.product_variant import GATE, ProductVariant
from gpu.several.inbox import rank_config
from pkvsim import AttentionOptions, DecodeShape
from pkvsim.schedule.costs import BalancedCosts, SharedCosts

SHAPE = DecodeShape(4, 1, 128, 16)
DECODE_VARIANTS = [
    kernel_config(SHAPE, "float16", 90, options=AttentionOptions(kv_dtype=kv_dtype)).defines() | layout.defines()
    for kv_dtype in (None, "int8")
    for layout in (TableLayout(), TableLayout(int64=True, csr=True, last_page=True))
]
LISTED_VARIANTS = [defines | {"SELECTED": 1, "PAGE_LSE": 1} for defines in DECODE_VARIANTS]
CONFIG = kernel_config(SHAPE, "float16", 90)
RANK_DEFINES = rank_config(SHAPE, "float16", 90, num_ranks=2, max_batch=1).defines()
APPEND_DEFINES = append_variant.defines(SHAPE, "float16", kv_dtype="int8", head_dim_v=64, rope=None)
SELECTION_DEFINES = selection_defines(SHAPE, "float16", "mean_std", "softmax_mean")
PRODUCT_DEFINES = ProductVariant(128, 2, True, GATE, False, 2).defines()
STRUCTURES = [
    *((fields.DECODE, defines) for defines in (*DECODE_VARIANTS, *LISTED_VARIANTS)),
    (fields.COSTS, DECODE_VARIANTS[0]),
    (fields.SHARED_COSTS, DECODE_VARIANTS[0]),
    (fields.RANK, RANK_DEFINES),
    (fields.APPEND, APPEND_DEFINES),
    (fields.SELECT, SELECTION_DEFINES),
    (fields.SUMMARY, SELECTION_DEFINES),
]
FILES = {"pkv_decode_balanced": "balanced.cu", "pkv_decode_tasks": "decode.cu", "pkv_merge": "merge.cu",
         "pkv_list_balanced": "plan.cu", "pkv_append": "append.cu", "pkv_stream_read": "stream.cu",
         "pkv_list_spans": "plan_spans.cu", "pkv_find_prefixes": "prefixes.cu",
         "pkv_decode_shared": "shared.cu", "pkv_gather": "gather.cu", "pkv_scatter": "gather.cu",
         "pkv_block_sums": "block_sums.cu",
         "pkv_decode_several": "several.cu", "pkv_merge_ranks": "several.cu",
         "pkv_product": "product.cu", **dict.fromkeys(("pkv_rms_norm", "pkv_silu_gate", "pkv_argmax"), "rows.cu"),
         "pkv_decode_selected": "selected.cu", "pkv_select_pages": "select.cu", "pkv_summarize_pages": "summaries.cu"}
PROLOGUE = """
#include <cmath>
#include <cstddef>
#include <type_traits>
#define __device__
#define __forceinline__ inline
struct half_type { unsigned short word; };
struct float2 { float x, y; };
template <class T> T __ldg(const T* at) { return *at; }
template <class T> T min(T a, T b) { return a < b ? a : b; }
#include "arguments.cuh"
#include "spans.cuh"
template <class T> constexpr char letter() {
  return std::is_pointer_v<T> ? 'p' : std::is_same_v<T, int> ? 'i' : std::is_same_v<T, long long> ? 'q'
       : std::is_same_v<T, float> ? 'f' : '?';
}
"""


def offsets(letters: str) -> list[int]:
    """Where C puts the fields of a structure of these letters."""
    found, end = [], 0
    for letter in letters:
        size = 8 if letter in "pq" else 4
        found.append(-(-end // size) * size)
        end = found[-1] + size
    return found


@pytest.mark.parametrize(("parameter", "defines"), STRUCTURES, ids=lambda value: getattr(value, "struct", None))
def test_structures_have_the_tables_fields(parameter, defines, tmp_path) -> None:
    """Names, types and offsets, which leave no room for a field that the table has not."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    present, name = fields.present(parameter, defines), f"pkv::{parameter.struct}"
    letters = "".join(field.letter for field in present)
    lines = [f'static_assert(offsetof({name}, {field.name}) == {at} && letter<decltype({name}::{field.name})>() == '
             f'\'{field.letter}\', "{field.name}");' for field, at in zip(present, offsets(letters))]
    binding = f"auto& [{', '.join(f'f{i}' for i in range(len(present)))}] = *at;"  # as many fields as the table has
    source = tmp_path / "fields.cpp"
    source.write_text(PROLOGUE + "\n".join(lines) + f"\nvoid bind({name}* at) {{ {binding} }}\n"
                      f"static_assert(sizeof({name}) <= {Arguments(f'[{letters}]').num_bytes});\n")
    macros = (f"-D{macro}={value}" for macro, value in defines.items())
    command = [COMPILER, *STRICT[:1], "-w", STRICT[-1], "-fsyntax-only", *macros, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@functools.cache
def ptx(file_name: str, options: tuple[str, ...]) -> str:
    """Of a source that may hold several kernels."""
    return nvrtc.ptx(SOURCE_DIR / file_name, 90, options)


@pytest.mark.parametrize(("name", "file_name"), slow_unless_of(
    lambda _, file_name: file_name not in ("shared.cu", "several.cu", "selected.cu"), FILES.items()))
def test_kernels_take_the_tables_parameters(name, file_name) -> None:
    others = {"pkv_append": APPEND_DEFINES, "pkv_stream_read": {}, "pkv_list_balanced": {}, "pkv_list_spans": {},
              "pkv_decode_shared": read_config(CONFIG, 90).read_defines(), "pkv_gather": {"THREADS": 512, "UNROLL": 4},
              "pkv_scatter": {"THREADS": 512, "UNROLL": 4}, "pkv_block_sums": {"THREADS": 256, "UNROLL": 4},
              "pkv_decode_several": RANK_DEFINES,
              "pkv_merge_ranks": RANK_DEFINES, "pkv_product": PRODUCT_DEFINES,
              **dict.fromkeys(("pkv_rms_norm", "pkv_silu_gate", "pkv_argmax"), {"NORM_VECTORS": 2}),
              "pkv_select_pages": SELECTION_DEFINES, "pkv_summarize_pages": SELECTION_DEFINES,
              "pkv_decode_selected": CONFIG.selected_defines(selected=True, page_lse=True)}
    defines = others.get(name, DECODE_VARIANTS[3])
    text = ptx(file_name, compile_options(defines))
    head = re.search(rf"\.entry {name}\((.*?)\)", text, re.DOTALL)[1]
    kinds = re.findall(r"\.param (?:\.align \d+ )?\.(\w+)(?: \.ptr[^,]*?)? \w+_param_\d+(?:\[(\d+)\])?", head)
    wanted = re.findall(r"\[\w+\]|\w", fields.signature(name, defines))
    assert len(kinds) == len(wanted)
    for (kind, size), part in zip(kinds, wanted):
        if part[0] == "[":
            assert kind == "b8" and 0 <= Arguments(part).num_bytes - int(size) < 8
        else:
            assert {"u32": "i", "s32": "i", "u64": "pq", "s64": "q", "f32": "f"}[kind].count(part) == 1


def test_every_kernel_is_in_the_table() -> None:
    found = {name for path in SOURCE_DIR.glob("*.cu") for name in re.findall(r"\b(pkv_\w+)\(", path.read_text())}
    assert found == set(fields.KERNELS) == set(FILES)


def test_costs_are_pkvsims() -> None:
    assert tuple(field.name for field in fields.COSTS.fields) == BalancedCosts._fields
    assert tuple(field.name for field in fields.SHARED_COSTS.fields) == SharedCosts._fields


@pytest.mark.parametrize("defines", DECODE_VARIANTS, ids=lambda defines: str(len(defines)))
def test_launches_find_their_arguments_among_what_is_given(defines) -> None:
    for kernel, given in (("pkv_decode_balanced", BALANCED_VALUES), ("pkv_decode_tasks", TASKS_VALUES),
                          ("pkv_merge", MERGE_VALUES)):
        assert len(set(given)) == len(given)
        order = fields.order(kernel, defines, given)
        assert tuple(given[i] for i in order) == fields.names(kernel, defines)
    for kernel in ("pkv_decode_selected", "pkv_decode_balanced"):
        listed = defines | {"SELECTED": kernel == "pkv_decode_selected", "PAGE_LSE": 1}
        order = fields.order(kernel, listed, LISTED_VALUES)
        assert tuple(LISTED_VALUES[i] for i in order) == fields.names(kernel, listed)
    with pytest.raises(ValueError, match="pkv_merge.*rows"):
        fields.order("pkv_merge", defines, MERGE_VALUES[:-1])
    assert fields.order("pkv_merge", defines, None) is None
