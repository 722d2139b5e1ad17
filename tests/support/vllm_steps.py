"""Random steps as vLLM's runners give them to an attention layer, for the stand-ins of fake_vllm, and what is right."""
from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from fake_vllm import FakeVllm
from hypothesis import strategies as st
from vllm_behaviours import settle

BLOCK = 16
LAYOUTS = ("LBNHC", "LBHNC", "BLNHC", "BLHNC", "BHLNC", "LHBNC")  # orders of a cache's axes in memory, of 0.33
GRAIN = 0.25  # K and V are small multiples of it, which 8-bit caches hold exactly


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One step and the layer that it goes through."""

    query_lens: tuple[int, ...]
    contexts: tuple[int, ...]  # tokens of each row that lie in the cache already
    padding: int = 0  # rows without tokens that follow, as in a CUDA graph
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 16
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    kv_cache_dtype: str = "auto"
    hnd: bool = False
    spread: int = 1  # blocks of an NHD cache are so many blocks apart
    layout: str = "LBNHC"  # of a release that names the order of a cache's axes in memory, in place of the two above


@dataclasses.dataclass(slots=True)
class Prepared:
    """A case in arrays: the layer, the step and float64 attention of its tokens."""

    layer: Any
    common: Any
    cache: torch.Tensor
    query: torch.Tensor  # [num_tokens, num_heads, head_size], padding included
    key: torch.Tensor
    value: torch.Tensor
    expected: torch.Tensor  # [tokens that are no padding, num_heads, head_size]


@st.composite
def cases(draw, layers: st.SearchStrategy[dict[str, Any]]) -> tuple[Case, int | None]:
    """(a step through a layer that has these values of Case's, drafts of each row)."""
    drafts = draw(st.sampled_from([None, None, 1, 3, 9]))
    most, uniform, rows = 1 + (drafts or 0), draw(st.booleans()), draw(st.integers(1, 6))
    lens = [draw(st.sampled_from([1, most]))] * rows if uniform else draw(st.lists(
        st.one_of(st.just(1), st.just(most), st.integers(1, most), st.integers(2, 24)), min_size=rows, max_size=rows))
    if draw(st.booleans()):
        lens = sorted(lens)
    contexts = draw(st.lists(st.integers(0, 34), min_size=rows, max_size=rows))
    case = Case(tuple(lens), tuple(contexts), padding=draw(st.integers(0, 3)) if uniform else 0,
                num_kv_heads=draw(st.sampled_from([1, 2, 4])), window=draw(st.sampled_from([None, 1, 7])),
                soft_cap=draw(st.sampled_from([None, 5.0])), sinks=draw(st.booleans()), **draw(layers))
    return case, drafts


def attention_layer(vllm: FakeVllm, case: Case, name: str) -> Any:
    """A layer of the case in the current configuration, of the name."""
    backend = vllm.adapter.PersistentBackend
    sinks = torch.linspace(-2, 3, case.num_heads).bfloat16() if case.sinks else None
    impl = backend.get_impl_cls()(case.num_heads, case.head_size, case.head_size**-0.5, case.num_kv_heads, None,
                                  case.window, case.kv_cache_dtype, case.soft_cap, "decoder", None, sinks=sinks)
    promised = (vllm.named("vllm.model_executor.layers.attention", "Attention"),
                vllm.named("vllm.v1.attention.backend", "AttentionLayer"))
    layer = settle(type("Layer", promised, {})(), impl=impl, layer_name=name, head_size_v=case.head_size,
                   _k_scale=torch.tensor(GRAIN), _v_scale=torch.tensor(GRAIN))
    vllm.config.compilation_config.static_forward_context[name] = layer
    return layer


def builder_of(vllm: FakeVllm, names: list[str], block_size: int = BLOCK) -> Any:
    spec = settle(vllm.named("vllm.v1.kv_cache_interface", "KVCacheSpec")(), block_size=block_size)
    return vllm.adapter.PersistentBackend.get_builder_cls()(spec, names, vllm.config, torch.device("cpu"))


def make_cache(vllm: FakeVllm, case: Case, num_blocks: int) -> torch.Tensor:
    if not hasattr(vllm.adapter.PersistentBackend, "get_kv_cache_shape"):
        return one_layer_of(vllm, case.layout, (num_blocks, case.num_kv_heads, BLOCK, 2 * case.head_size))
    shape = vllm.adapter.PersistentBackend.get_kv_cache_shape(num_blocks, BLOCK, case.num_kv_heads, case.head_size,
                                                             case.kv_cache_dtype)
    kind = torch.float32 if case.kv_cache_dtype == "auto" else torch.uint8
    kind = torch.int8 if case.kv_cache_dtype.startswith("int8") else kind
    cache = torch.zeros(num_blocks * case.spread, *shape[1:], dtype=kind)[::case.spread]
    if case.hnd:
        cache = cache.view(num_blocks, 2, shape[3], BLOCK, shape[4]).transpose(2, 3)
    return cache


def one_layer_of(vllm: FakeVllm, layout: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32,
                 num_layers: int = 2) -> torch.Tensor:
    """The last layer's view, [num_blocks, num_kv_heads, block_size, content], of a cache of several, in that layout."""
    order = eval(vllm.named("vllm.v1.kv_cache_layout", "KVCacheLayout")[layout].value)  # logical axes as they lie
    sizes = num_layers, *shape
    lies = torch.zeros([sizes[axis] for axis in order], dtype=dtype)
    return lies.permute([order.index(axis) for axis in range(len(sizes))])[-1]


def prepare(vllm: FakeVllm, case: Case, layer: Any, *, seed: int = 0) -> Prepared:
    """Fills a cache with the rows' contexts, and makes the step that follows."""
    rng = np.random.default_rng(seed)
    rows, heads, kv_heads, size = len(case.query_lens), case.num_heads, case.num_kv_heads, case.head_size
    lens = np.array(case.query_lens) + case.contexts
    most_blocks = -(-int(lens.max()) // BLOCK) + 1
    ids = rng.permutation(rows * most_blocks) + 1  # 0 is vLLM's null block
    table = torch.zeros(rows + case.padding, most_blocks, dtype=torch.int32)
    table[:rows] = torch.from_numpy(ids.reshape(rows, most_blocks).astype(np.int32))
    cache = make_cache(vllm, case, rows * most_blocks + 1)
    whole = [torch.from_numpy(rng.integers(-8, 9, (2, length, kv_heads, size)) * GRAIN).float() for length in lens]

    def slots(row: int, begin: int, end: int) -> list[int]:
        return [int(table[row, place // BLOCK]) * BLOCK + place % BLOCK for place in range(begin, end)]

    for row, (context, pair) in enumerate(zip(case.contexts, whole)):
        mapping = torch.tensor(slots(row, 0, context), dtype=torch.int64)
        layer.impl.do_kv_cache_update(layer, pair[0, :context], pair[1, :context], cache, mapping)
    each = case.query_lens[0] if case.padding else 0
    pad_tokens = case.padding * each
    key, value = (torch.cat([*(pair[side, context:] for context, pair in zip(case.contexts, whole)),
                             torch.zeros(pad_tokens, kv_heads, size)]) for side in (0, 1))
    mapping = [slot for row, (context, length) in enumerate(zip(case.contexts, lens))
               for slot in slots(row, context, int(length))]
    starts = torch.tensor([0, *np.cumsum([*case.query_lens, *[0] * case.padding])], dtype=torch.int32)
    tokens = int(sum(case.query_lens)) + pad_tokens
    query = torch.from_numpy(rng.standard_normal((tokens, heads, size))).float()
    seq_lens = torch.tensor([*lens, *[0] * case.padding], dtype=torch.int32)
    common = vllm.named("vllm.v1.attention.backend", "CommonAttentionMetadata")(
        query_start_loc=starts, query_start_loc_cpu=starts.clone(), seq_lens=seq_lens, num_reqs=rows + case.padding,
        num_actual_tokens=tokens, max_query_len=max(case.query_lens), max_seq_len=int(lens.max()),
        block_table_tensor=table, slot_mapping=torch.tensor(mapping + [-1] * pad_tokens, dtype=torch.int64),
        seq_lens_cpu_upper_bound=seq_lens.clone(), positions=torch.zeros(tokens, dtype=torch.int64))
    return Prepared(layer, common, cache, query, key, value, _expected(case, query, whole, layer.impl.sinks))


def _expected(case: Case, query: torch.Tensor, whole: list[torch.Tensor], sinks: torch.Tensor | None) -> torch.Tensor:
    """Attention of every token of every row over the tokens up to itself."""
    found, at, group = [], 0, case.num_heads // case.num_kv_heads
    for length, context, pair in zip(case.query_lens, case.contexts, whole):
        k, v = pair.double().repeat_interleave(group, 2)
        for token in range(length):
            last = context + token
            seen = slice(0 if case.window is None else max(0, last + 1 - case.window), last + 1)
            logits = torch.einsum("hd,thd->ht", query[at].double(), k[seen]) * case.head_size**-0.5
            if case.soft_cap:
                logits = case.soft_cap * torch.tanh(logits / case.soft_cap)
            total = logits.logsumexp(-1)
            if sinks is not None:
                total = torch.logaddexp(total, sinks.double())
            found.append(torch.einsum("ht,thd->hd", (logits - total[:, None]).exp(), v[seen]))
            at += 1
    return torch.stack(found).float()


def run(vllm: FakeVllm, prepared: Prepared, metadata: Any) -> torch.Tensor:
    """The step through its layer: stores keys and values, attends, and checks that each token was written once."""
    impl, cache = prepared.layer.impl, prepared.cache
    vllm.step = {prepared.layer.layer_name: metadata}
    impl.do_kv_cache_update(prepared.layer, prepared.key, prepared.value, cache, metadata.slot_mapping)
    output = torch.full_like(prepared.query, float("nan"))
    vllm.writes.clear()
    impl.forward(prepared.layer, prepared.query, prepared.key, prepared.value, cache, metadata, output)
    written = np.zeros(len(output), int)
    for _, address, count in vllm.writes:
        first = (address - output.data_ptr()) // (output[0].numel() * output.element_size())
        written[first:first + count] += 1
    assert (written[:len(prepared.expected)] == 1).all() and (written <= 1).all(), vllm.writes
    return output[:len(prepared.expected)]
