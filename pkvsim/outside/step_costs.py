"""A model on a GPU under an engine, as the tables that a step's price is added up from. Compiled code reads them."""
from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from pkvsim.compiled import compiled, drop_stale, merged
from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.outside_constants import OutsideConstants
from pkvsim.models.decode_groups import GROUPED
from pkvsim.models.model_spec import LATENT, AttentionSpec, ModelSpec
from pkvsim.outside.communication import all_reduce_us
from pkvsim.outside.engine_profile import EngineProfile
from pkvsim.outside.flash_decode import flash_decode_us
from pkvsim.outside.matrices import BITS16, head_matrix, layer_matrices_us, matrix_kind, matrix_us
from pkvsim.outside.pairs import KIND_CODES, chunk_pairs, entries_read, index_pairs

# Parts of a step's time, in the order of what step_parts fills.
PARTS = (
    "matrices", "elementwise", "all_reduce", "head", "prefill_attention", "decode_attention", "host", "drafts",
)  # fmt: skip
MATRICES, ELEMENTWISE, ALL_REDUCE, HEAD, PREFILL_ATTENTION, DECODE_ATTENTION, HOST, DRAFTS = range(len(PARTS))
HEAT_SHARE = 1.1  # sustained over cool time, above which a step heats the GPU
UNBOUNDED = 1 << 40


class StepCosts(NamedTuple):
    """Tables by tokens or rows, and the numbers of every kind of attention. T step tokens, B rows, K kinds."""

    layer_us: np.ndarray  # [3, T + 1] float64: matrices on a warm GPU, elementwise, all-reduces
    cool_matrices_us: np.ndarray  # [T + 1] float64, on a GPU that was not busy
    head_us: np.ndarray  # [B + 1] float64: LM head, its gathering and sampling, by tokens that need logits
    padded: np.ndarray  # [T + 1] int64, tokens that a graph computes
    most_graph_tokens: int  # 0: every step is eager
    chunk_graph_tokens: int
    kinds: np.ndarray  # [K, 5] int64: layers, kind, window, selected entries, tokens per entry
    flash: np.ndarray  # [K] bool, whether flash_decode_us serves the kind
    routed: np.ndarray  # [K] bool, whether the caller prices the kind's decode attention
    heads: np.ndarray  # [K] int64, KV heads
    entry_bytes: np.ndarray  # [K] float64, of a cached entry, all heads
    entry_flops: np.ndarray  # [K, 2] float64, of a (query, entry) pair: decode, prefill
    index_keys: np.ndarray  # [K, 2] float64, of an entry's index key: bytes, FLOPs
    state: np.ndarray  # [K, 2] float64, of a token: bytes of the state, read and written, FLOPs
    attention_flop_us: float  # FLOP per us of attention on a warm GPU
    attention_half_tokens: float
    attention_us: float
    boost: float
    boost_us: float
    num_sms: int
    decode_gb_s: float
    decode_cta_gb_s: float
    decode_us: float
    mixed_gb_s: float
    mixed_cta_gb_s: float
    step_us: float
    row_us: float
    chunk_step_us: float
    eager_us: float
    chunk_eager_us: float  # of a step with a chunk beyond chunk_graph_tokens; 0: no limit
    wake_factor: float
    query_tokens: int  # of every row that decodes
    token_us: float
    token_place_us: float
    heap: np.ndarray  # [num_sms] float64, scratch
    lens: np.ndarray  # [B] int64, scratch


def step_costs(
    model: ModelSpec,
    device: DeviceSpec,
    constants: OutsideConstants,
    profile: EngineProfile,
    *,
    step_tokens: int,
    max_batch: int,
    query_tokens: int = 1,
    kv_element_bytes: float = 2,
) -> StepCosts:
    """Tables for steps of up to step_tokens tokens and max_batch rows of query_tokens each. Raises ValueError where
    the GPU has no rate of the model's products."""
    c = constants
    tokens = np.arange(step_tokens + 1)
    rows = np.arange(max_batch * query_tokens + 1)
    warm, cool = (
        sum(
            count * layer_matrices_us(tokens, model, layer, device, used)
            for layer, count in model.layer_groups
        )
        for used in (c, _boosted(c))
    )
    beta = device.beta_gb_s * 1e3  # bytes per us
    elementwise = model.num_layers * elementwise_us(tokens, model, device, c)
    # Two all-reduces a layer, after attention and after the MLP; one more after the embedding.
    reduces = 2 * model.num_layers + 1
    reduce = reduces * all_reduce_us(tokens * model.hidden_size * 2, model.tensor_parallel, device, c)
    head = sum(matrix_us(rows, matrix, device, c) for matrix in head_matrix(model, device))
    logits = model.vocab_size / model.tensor_parallel
    head = head + np.where(rows > 0, 4 * rows * logits * 4 / (beta * c.elementwise_share), 0.0)  # sampling: four passes
    head = head + all_reduce_us(rows * logits * 2, model.tensor_parallel, device, c)
    groups = model.attention_groups
    return StepCosts(
        layer_us=np.stack([warm, elementwise, reduce]).astype(np.float64),
        cool_matrices_us=np.asarray(cool, np.float64),
        head_us=np.asarray(head, np.float64),
        padded=profile.padded(step_tokens).astype(np.int64),
        most_graph_tokens=int(max(profile.graph_sizes, default=0)),
        chunk_graph_tokens=int(profile.chunk_graph_tokens),
        kinds=np.array([_kind_row(a, count) for a, count in groups], np.int64).reshape(-1, 5),
        flash=np.array([a.kind in GROUPED and not a.selected_entries for a, _ in groups], bool),
        routed=np.array([a.kind in GROUPED and profile.attention != "flash" for a, _ in groups], bool),
        heads=np.array([max(1, a.num_kv_heads) for a, _ in groups], np.int64),
        entry_bytes=np.array([a.kv_elements * kv_element_bytes for a, _ in groups], np.float64),
        entry_flops=np.array([_pair_flops(a) for a, _ in groups], np.float64).reshape(-1, 2),
        index_keys=np.array(
            [(a.index_bytes, 2.0 * a.index_heads * a.index_dim) for a, _ in groups], np.float64
        ).reshape(-1, 2),
        state=np.array([(2.0 * a.state_bytes, a.state_flops) for a, _ in groups], np.float64).reshape(-1, 2),
        attention_flop_us=float(device.fp16_tflops * c.attention_share * 1e6),
        attention_half_tokens=float(c.attention_half_tokens),
        attention_us=float(c.attention_us),
        boost=float(c.boost),
        boost_us=float(c.boost_ms * 1e3),
        num_sms=int(device.num_sms),
        decode_gb_s=float(device.beta_gb_s * c.decode_share),
        decode_cta_gb_s=float(c.decode_cta_gb_s),
        decode_us=float(c.decode_us),
        mixed_gb_s=float(device.beta_gb_s * c.mixed_share),
        mixed_cta_gb_s=float(c.mixed_cta_gb_s),
        step_us=float(c.step_us),
        row_us=float(c.row_us),
        chunk_step_us=float(c.chunk_step_us),
        eager_us=float(model.num_layers * c.eager_layer_us),
        chunk_eager_us=float(model.num_layers * c.chunk_layer_us),
        wake_factor=float(c.wake_factor),
        query_tokens=int(query_tokens),
        token_us=float(c.token_us),
        token_place_us=float(c.token_place_us),
        heap=np.zeros(device.num_sms),
        lens=np.zeros(max_batch, np.int64),
    )


def elementwise_us(
    tokens: np.ndarray, model: ModelSpec, device: DeviceSpec, constants: OutsideConstants
) -> np.ndarray:
    """Time of a layer's norms, rope and other small kernels, float64 [like tokens]: a time each, and what they read and
    write; up to few_tokens, those alone that dense products in 16 bits leave beside them."""
    c = constants
    moved = c.elementwise_passes * model.hidden_size * 2 * tokens / (device.beta_gb_s * c.elementwise_share * 1e3)
    us = c.small_kernels * c.kernel_us + moved
    dense = not model.num_experts
    if dense and matrix_kind(model.layers[0].attention_weights, model.quantization, device) == BITS16:
        us = np.where(tokens <= c.few_tokens, c.few_kernels * c.kernel_us, us)
    return np.where(tokens > 0, us, 0.0)


def _boosted(c: OutsideConstants) -> OutsideConstants:
    shares = ("matrix_share", "fp8_share", "int8_share", "fp4_share", "weight_only_share")
    return replace(c, **{name: getattr(c, name) * c.boost for name in shares})


def _kind_row(a: AttentionSpec, layers: int) -> tuple[int, int, int, int, int]:
    return layers, KIND_CODES[a.kind], a.window or UNBOUNDED, a.selected_entries, a.tokens_per_entry


def _pair_flops(a: AttentionSpec) -> tuple[float, float]:
    """(decode, prefill): latent layers attend with expanded heads in prefill."""
    width = a.head_dim + a.value_dim
    return 2.0 * a.num_q_heads * width, 2.0 * a.num_q_heads * (sum(a.prefill_dims) if a.kind == LATENT else width)


@compiled
def prefill_attention_us(costs, begin, chunk, warm):
    """Attention of the tokens [begin, begin + chunk) of a prompt over all layers.

    FLOPs at attention_share of the peak, less for short chunks, above a launch per layer, and never less than reading
    what is cached. warm: 0 for a GPU that was not busy, to 1.
    """
    us = 0.0
    rate = costs.attention_flop_us * (costs.boost + (1 - costs.boost) * warm)
    rate *= chunk / (chunk + costs.attention_half_tokens)
    for k in range(len(costs.kinds)):
        layers, kind, window, selected, per_entry = costs.kinds[k]
        flops = chunk_pairs(kind, window, selected, per_entry, begin, chunk) * costs.entry_flops[k, 1]
        if costs.index_keys[k, 1] > 0:
            flops += index_pairs(per_entry, begin, chunk) * costs.index_keys[k, 1]
        flops += chunk * costs.state[k, 1]
        read = entries_read(kind, window, 0, per_entry, begin + chunk) * costs.entry_bytes[k] + costs.state[k, 0]
        us += layers * (costs.attention_us + max(flops / rate, read / (costs.decode_gb_s * 1e3)))
    return us


@compiled
def decode_attention_us(costs, lens, mixed):
    """Decode attention of rows of lens [rows] tokens, those decoded included, longest first, over all layers but those
    that the caller prices (costs.routed).

    mixed: a prefill chunk runs beside it, in one launch that splits no row.
    """
    us = 0.0
    count = len(lens)
    if count == 0:
        return 0.0
    for k in range(len(costs.kinds)):
        if costs.routed[k]:
            continue
        layers, kind, window, selected, per_entry = costs.kinds[k]
        entries, longest = 0, 0
        for row in range(count):
            read = entries_read(kind, window, selected, per_entry, lens[row])
            costs.lens[row] = read
            entries += read
            longest = max(longest, read)
        moved = entries * costs.entry_bytes[k] + count * costs.state[k, 0]
        flops = costs.query_tokens * (entries * costs.entry_flops[k, 0] + count * costs.state[k, 1])
        if costs.index_keys[k, 1] > 0:
            for row in range(count):
                moved += lens[row] // per_entry * costs.index_keys[k, 0]
                flops += costs.query_tokens * (lens[row] // per_entry * costs.index_keys[k, 1])
        if mixed:
            head_bytes = longest * costs.entry_bytes[k] / costs.heads[k]
            layer_us = moved / (costs.mixed_gb_s * 1e3) + head_bytes / (costs.mixed_cta_gb_s * 1e3)
        elif costs.flash[k]:
            layer_us = costs.decode_us + flash_decode_us(
                costs.lens[:count], costs.heads[k], costs.entry_bytes[k] / costs.heads[k], costs.num_sms,
                costs.decode_gb_s, costs.decode_cta_gb_s, costs.heap,
            )
            if costs.query_tokens > 1:
                layer_us = max(layer_us, flops / costs.attention_flop_us)
        else:
            layer_us = costs.decode_us + moved / (costs.decode_gb_s * 1e3)
            layer_us = max(layer_us, flops / costs.attention_flop_us)
        us += layers * layer_us
    return us


@merged
def step_parts(costs, lens, begins, chunks, logits, routed_us, warm, parts):
    """Fills parts [len(PARTS)] with a step's times in us; returns their sum.

    lens [rows] int64: tokens that the rows which decode attend to, longest first. begins, chunks [prompts] int64:
    first token and tokens of each prompt's chunk. logits: tokens that need the LM head, the decoding rows' included.
    A row that decodes brings costs.query_tokens tokens. parts[DRAFTS] is the caller's, who knows what drafting costs.
    routed_us: decode attention of the layers that the caller prices (costs.routed). warm: from 0, a GPU that was not
    busy, to 1 (heated).
    """
    rows, tokens = len(lens), len(lens) * costs.query_tokens
    prefill_us = 0.0
    for at in range(len(chunks)):
        tokens += chunks[at]
        prefill_us += prefill_attention_us(costs, begins[at], chunks[at], warm)
    mixed = len(chunks) > 0
    in_graph = tokens <= (costs.chunk_graph_tokens if mixed else costs.most_graph_tokens)
    computed = min(costs.padded[tokens], costs.layer_us.shape[1] - 1) if in_graph else tokens
    cool = costs.cool_matrices_us[computed]
    parts[MATRICES] = cool + (costs.layer_us[0, computed] - cool) * warm
    parts[ELEMENTWISE] = costs.layer_us[1, computed]
    parts[ALL_REDUCE] = costs.layer_us[2, computed]
    parts[HEAD] = costs.head_us[min(logits, len(costs.head_us) - 1)]
    parts[PREFILL_ATTENTION] = prefill_us
    parts[DECODE_ATTENTION] = routed_us + decode_attention_us(costs, lens, mixed)
    host_us = costs.step_us + costs.row_us * (rows + len(chunks)) + (costs.chunk_step_us if mixed else 0.0)
    total = host_us
    for at in range(HOST):
        total += parts[at]
    issue_us = costs.eager_us if costs.most_graph_tokens == 0 else 0.0
    if mixed and not in_graph:
        issue_us = max(issue_us, costs.chunk_eager_us)
    if total < issue_us:
        host_us += issue_us - total
        total = issue_us
    parts[HOST] = host_us
    return total


@merged
def rest_us(costs, rows, tokens, warm):
    """A step of `rows` decoding rows of `tokens` tokens alone, without their attention."""
    computed = min(costs.padded[tokens], costs.layer_us.shape[1] - 1) if tokens <= costs.most_graph_tokens else tokens
    us = costs.cool_matrices_us[computed] * (1 - warm) + costs.layer_us[0, computed] * warm
    us += costs.layer_us[1, computed] + costs.layer_us[2, computed] + costs.head_us[min(tokens, len(costs.head_us) - 1)]
    return us + costs.step_us + costs.row_us * rows


@merged
def heated(costs, heat_us, tokens, us):
    """A GPU's heat after a step of `tokens` tokens and `us`, from 0 to boost_us: its time of computing at full rate
    less its other time. heat / boost_us is what step_parts takes as warm (1 where boost_us is 0)."""
    heats = costs.layer_us[0, tokens] > HEAT_SHARE * costs.cool_matrices_us[tokens]
    return min(costs.boost_us, heat_us + us) if heats else max(0.0, heat_us - us)


drop_stale("pkvsim")
