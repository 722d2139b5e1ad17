"""What each kernel is given: the one table of its arguments' names, types, order and conditions.

From it follow the signature and the packing of a launch (gpu.kernels.launch), which of a run's values the merge kernel
gets, the fakes of the tests, and a comparison with the C structures (tests/kernels/test_fields.py).

To give the decode kernels one more value, edit in this order, six files at most:
1. here: a `Field` in DECODE, with the constant of its variant where only some have it;
2. cuda_src/arguments.cuh: the same field at the same place of pkv::DecodeArguments, in the #if of that constant;
3. the header of cuda_src that uses it;
4. gpu/engine/arguments.py: its name in VALUES and its value in DecodeArguments.take;
5. tests/support/decode_on_cpu.py: its value for the kernel that runs on the CPU;
6. tests/engine/test_decode_arguments.py: what it must be, worked out from the caller's arrays.
One more cost of the balanced schedule is a field of pkvsim's BalancedCosts (pkvsim/schedule/costs.py), of pkv::Costs
(cuda_src/plan.cuh) and of COSTS here, beside the two that use it, pkvsim/schedule/balanced.py and pkv::Cut in plan.cuh.
The append kernel's arguments are APPEND here, pkv::AppendArguments, and CacheWriter.append or launch_sizes.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Field(NamedTuple):
    """One argument. letter: p an address, i int32, q int64, f float32.

    when: the compile-time constant (-D) that must be there and not 0, None where every variant has the field.
    """

    name: str
    letter: str
    when: str | None = None


class Parameter(NamedTuple):
    """A parameter of a kernel: a C structure, whose name in cuda_src is `struct`, or one value, with None."""

    struct: str | None
    fields: tuple[Field, ...]


def _fields(letter: str, names: str, when: str | None = None) -> tuple[Field, ...]:
    return tuple(Field(name, letter, when) for name in names.split())


def _values(*fields: Field) -> tuple[Parameter, ...]:
    return tuple(Parameter(None, (field,)) for field in fields)


DECODE = Parameter("DecodeArguments", (
    *_fields("p", "q k_pages v_pages page_ids lengths query_lens sinks out lse partials"),
    *_fields("q", "k_page_stride v_page_stride"),
    *_fields("i", "k_head_stride k_token_stride v_head_stride v_token_stride"),
    *_fields("i", "batch_size num_kv_heads table_stride num_pages window"),
    *_fields("f", "scale cap"),
    *_fields("p", "k_scales v_scales", "CACHE_TYPE"),
    *_fields("q", "scale_page_stride", "CACHE_TYPE"),
    *_fields("i", "scale_head_stride scale_token_stride", "CACHE_TYPE"),
    *_fields("f", "v_scale", "CACHE_TYPE"),
    *_fields("p", "row_begins", "TABLE_CSR"),
    *_fields("p", "selected_pages selected_counts", "SELECTED"),
    *_fields("i", "max_selected", "SELECTED"),
    *_fields("p", "page_lse", "PAGE_LSE"),
    *_fields("i", "page_lse_tiles", "PAGE_LSE"),
))  # fmt: skip
COSTS = Parameter("Costs", _fields("i", "segment minimum part pair"))  # pkvsim.schedule.costs.BalancedCosts
SHARED_COSTS = Parameter("SharedCosts", _fields("i", "columns tile least segment merge"))  # the same of SharedCosts
RANK = Parameter("RankArguments", (  # of a step over several GPUs
    *_fields("p", "inboxes own failure"), *_fields("q", "half_slots patience_ns"),
    *_fields("i", "rank owner in_kernel same_gpu share_begin share_tokens share_cycle share_magic share_shift"),
))  # fmt: skip
APPEND = Parameter("AppendArguments", (
    *_fields("p", "k_new v_new q q_out k_pages v_pages k_scales v_scales seq_lens block_table token_offsets rope"),
    *_fields("i", "num_tokens batch_size num_kv_heads num_q_heads page_size num_pages max_pages max_positions chunks"),
    *_fields("q", "table_stride rope_stride"),
    *_fields("q", "k_token k_head v_token v_head q_token q_head q_out_token q_out_head"),
    *_fields("q", "k_page k_page_head k_page_token v_page v_page_head v_page_token"),
    *_fields("q", "scale_page scale_head scale_token"),
    *_fields("f", "rope_factor k_scale v_scale"),
))  # fmt: skip
SELECT = Parameter("SelectArguments", (
    *_fields("p", "q summaries summary_scales page_ids lengths row_begins scores sums tickets budgets pages counts"),
    *_fields("i", "batch_size num_kv_heads table_stride num_pages max_tokens max_selected score_stride chunk_pages"),
    *_fields("i", "sink_pages recent_pages least_pages parts"), Field("scale", "f"),
))  # fmt: skip
SUMMARY = Parameter("SummaryArguments", (
    *_fields("p", "k_pages summaries summary_scales page_ids lengths row_begins"), Field("k_page_stride", "q"),
    *_fields("i", "k_head_stride k_token_stride batch_size num_kv_heads table_stride num_pages max_tokens new_tokens"),
))  # fmt: skip
PRODUCT = Parameter("ProductArguments", (
    *_fields("p", "x weight norm bias out"), *_fields("i", "columns rows x_stride out_stride"), Field("eps", "f"),
))  # fmt: skip
NORM = Parameter("NormArguments", (
    *_fields("p", "x weight out"), *_fields("i", "width x_stride"), Field("eps", "f"),
))  # fmt: skip
GATE = Parameter("GateArguments", (*_fields("p", "x out"), *_fields("i", "width x_stride")))
CHOICE = Parameter("ChoiceArguments", (*_fields("p", "x out states"), *_fields("i", "width x_stride")))
RUNS = _values(  # of pages moved between host memory and the GPU
    *_fields("p", "hosts pages bases"), Field("page_stride", "q"),
    *_fields("i", "run_bytes num_blocks first_run num_runs"),
)  # fmt: skip

KERNELS: Mapping[str, tuple[Parameter, ...]] = {
    "pkv_decode_balanced": (DECODE, COSTS, *_values(Field("max_tokens", "i"))),
    "pkv_decode_selected": (DECODE, COSTS, *_values(Field("max_tokens", "i"))),
    "pkv_decode_shared": (
        DECODE, COSTS, SHARED_COSTS, *_values(*_fields("p", "group_of_row prefix_pages"),
                                              *_fields("i", "num_groups max_tokens")),
    ),
    "pkv_decode_several": (DECODE, COSTS, RANK, *_values(Field("max_tokens", "i"))),
    "pkv_merge_ranks": _values(
        Field("states", "p"), Field("stride", "i"), *_fields("p", "out lse sinks"),
        *_fields("i", "rank owner batch_size num_kv_heads"),
    ),
    "pkv_decode_tasks": (DECODE, *_values(*_fields("p", "tasks split_offsets"), *_fields("i", "num_tasks tile_scale"))),
    "pkv_merge": _values(*_fields("p", "partials split_offsets rows out lse query_lens sinks")),
    "pkv_list_balanced": (
        *_values(Field("lengths", "p"), *_fields("i", "batch_size num_kv_heads")), COSTS,
        *_values(*_fields("i", "max_tokens window"), Field("tasks", "p"), Field("max_tasks", "i"),
                 *_fields("p", "counts row_begins")),
    ),
    "pkv_list_spans": (
        *_values(*_fields("p", "lengths group_of_row prefix_pages"),
                 *_fields("i", "batch_size num_groups num_kv_heads row_columns query_tokens page_size")),
        COSTS, SHARED_COSTS,
        *_values(Field("max_tokens", "i"), Field("tasks", "p"), Field("max_tasks", "i"),
                 *_fields("p", "counts parts row_begins")),
    ),
    "pkv_find_prefixes": _values(
        *_fields("p", "page_ids row_begins lengths"),
        *_fields("i", "table_stride num_pages batch_size max_tokens query_tokens tokens_per_member least_tokens"),
        *_fields("p", "group_of_row prefix_pages workspace"),
    ),
    "pkv_append": (APPEND,),
    "pkv_select_pages": (SELECT,),
    "pkv_summarize_pages": (SUMMARY,),
    "pkv_product": (PRODUCT,),
    "pkv_rms_norm": (NORM,),
    "pkv_silu_gate": (GATE,),
    "pkv_argmax": (CHOICE,),
    "pkv_gather": RUNS,
    "pkv_scatter": RUNS,
    "pkv_block_sums": _values(
        *_fields("p", "pages bases"), Field("page_stride", "q"), *_fields("i", "run_bytes num_blocks runs_per_block"),
        Field("sums", "p"),
    ),
    "pkv_stream_read": _values(Field("src", "p"), Field("num_vectors", "q"), Field("sink", "p")),
}  # fmt: skip


def present(parameter: Parameter, defines: Mapping[str, int | str]) -> tuple[Field, ...]:
    """The fields that the variant of these constants has."""
    return tuple(field for field in parameter.fields if field.when is None or defines.get(field.when))


def names(kernel_name: str, defines: Mapping[str, int | str]) -> tuple[str, ...]:
    """The names of a variant's arguments, in the order of their letters in its signature."""
    return tuple(field.name for parameter in KERNELS[kernel_name] for field in present(parameter, defines))


def signature(kernel_name: str, defines: Mapping[str, int | str]) -> str:
    """The types of a variant's parameters, as gpu.kernels.launch takes them: those of a structure in brackets."""
    parts = []
    for parameter in KERNELS[kernel_name]:
        letters = "".join(field.letter for field in present(parameter, defines))
        parts.append(letters if parameter.struct is None else f"[{letters}]")
    return "".join(parts)


def order(
    kernel_name: str, defines: Mapping[str, int | str], given: tuple[str, ...] | None
) -> tuple[int, ...] | None:  # fmt: skip
    """Where among the values `given` each argument of a variant is; None where they are the arguments, in order. Of a
    name that stands for several, the n-th is the n-th that is given.

    Raises ValueError naming the arguments that are not given.
    """
    wanted = names(kernel_name, defines)
    if given is None or given == wanted:
        return None
    missing = [name for name in dict.fromkeys(wanted) if given.count(name) < wanted.count(name)]
    if missing:
        raise ValueError(f"given: expected every argument of {kernel_name}, found no {', '.join(missing)}")
    places: dict[str, list[int]] = {}
    for place, name in enumerate(given):
        places.setdefault(name, []).append(place)
    return tuple(places[name][wanted[:at].count(name)] for at, name in enumerate(wanted))
