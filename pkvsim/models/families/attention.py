"""Attention of one layer: what it does on one GPU, and its modules. Grouped-query, latent and compressed."""
from __future__ import annotations

from dataclasses import dataclass

from pkvsim.models.model_spec import COMPRESSED, FULL, LATENT, AttentionSpec
from pkvsim.models.modules import ATTENTION, FIXED, Module

INDEX_SCALE_BYTES = 4  # a float32 scale beside each FP8 index key (DeepSeek-V3.2-Exp, inference/kernel.py)


@dataclass(frozen=True, slots=True)
class Split:
    """Tensor parallel: how many GPUs share each layer, as vLLM divides it."""

    parallel: int
    model: str  # its name, for errors

    def heads(self, count: int, what: str = "query heads") -> int:
        """Heads of one GPU. ValueError where they do not divide."""
        if count % self.parallel:
            raise ValueError(
                f"tensor_parallel: expected a divisor of {self.model}'s {count} {what}, got {self.parallel}"
            )
        return count // self.parallel

    def kv_heads(self, count: int) -> int:
        """KV heads of one GPU; with more GPUs than heads each head is on several."""
        if count % self.parallel and self.parallel % count:
            raise ValueError(
                f"tensor_parallel: expected a divisor or a multiple of {self.model}'s {count} KV heads, "
                f"got {self.parallel}"
            )
        return max(1, count // self.parallel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """A grouped-query layer's heads and what comes with them, of the whole model."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    norm: str = ""  # of queries and keys: "" none, "head" one weight per element of a head, "all" one per element
    gate: str = ""  # of the output: "" none, "head" one number per head, "element" a second query projection
    value_matrix: bool = True  # False: values are the keys before their norm and rotation
    kind: str = FULL
    window: int = 0
    soft_cap: float = 0.0
    sinks: bool = False
    index_heads: int = 0
    index_dim: int = 0
    selected_entries: int = 0


def grouped(split: Split, layer: str, hidden: int, heads: Heads) -> tuple[AttentionSpec, list[Module]]:
    """Grouped-query attention. `layer`: the name that its modules begin with."""
    h = heads
    local_q, local_kv = split.heads(h.num_q_heads), split.kv_heads(h.num_kv_heads)
    one, kv_share = 1 / split.parallel, local_kv / h.num_kv_heads
    q_width, kv_width = h.num_q_heads * h.head_dim, h.num_kv_heads * h.head_dim
    queries = q_width * (2 if h.gate == "element" else 1)
    norm = {"": 0, "head": 2 * h.head_dim, "all": q_width + kv_width}[h.norm]

    def linear(name: str, rows: int, columns: int, share: float, bias: int = 0) -> Module:
        return Module(
            name=f"{layer}.{name}", part=ATTENTION, out_features=rows, in_features=columns, vector=bias, share=share
        )

    modules = [
        linear("q_proj", queries, hidden, one, queries * h.qkv_bias),
        linear("k_proj", kv_width, hidden, kv_share, kv_width * h.qkv_bias),
        linear("o_proj", hidden, q_width, one, hidden * h.out_bias),
        Module(name=f"{layer}.qk_norm", part=FIXED, vector=norm),
        Module(name=f"{layer}.sinks", part=ATTENTION, vector=h.num_q_heads * h.sinks, share=one),
    ]
    if h.value_matrix:
        modules.append(linear("v_proj", kv_width, hidden, kv_share, kv_width * h.qkv_bias))
    if h.gate == "head":
        modules.append(linear("g_proj", h.num_q_heads, hidden, one))
    if h.index_heads:
        modules += [
            linear("index_q_proj", h.index_heads * h.index_dim, hidden, 1.0),
            linear("index_k_proj", h.index_dim, hidden, 1.0),
            Module(name=f"{layer}.index_norm", part=FIXED, vector=2 * h.index_dim),
        ]
    spec = AttentionSpec(
        kind=h.kind,
        num_q_heads=local_q,
        num_kv_heads=local_kv,
        head_dim=h.head_dim,
        value_dim=h.head_dim,
        window=h.window,
        soft_cap=h.soft_cap,
        sinks=h.sinks,
        index_heads=h.index_heads,
        index_dim=h.index_dim,
        index_bytes=2.0 * h.index_dim if h.index_heads else 0.0,
        selected_entries=h.selected_entries,
    )
    return spec, modules


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSizes:
    """A multi-head latent layer (DeepSeek-V2, arXiv 2405.04434, section 2.1), of the whole model."""

    num_heads: int
    q_rank: int  # 0: queries come from one matrix
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    bias: bool = False
    output_gate: bool = False
    index_heads: int = 0  # of this layer's own indexer (DeepSeek-V3.2, arXiv 2512.02556)
    index_dim: int = 0
    selected_entries: int = 0


def latent(split: Split, layer: str, hidden: int, sizes: LatentSizes) -> tuple[AttentionSpec, list[Module]]:
    """Multi-head latent attention. The cache and the down projections are whole on every GPU."""
    s = sizes
    local, one = split.heads(s.num_heads), 1 / split.parallel
    qk_dim = s.nope_dim + s.rope_dim

    def linear(name: str, rows: int, columns: int, share: float, bias: int = 0) -> Module:
        return Module(
            name=f"{layer}.{name}", part=ATTENTION, out_features=rows, in_features=columns, vector=bias, share=share
        )

    if s.q_rank:
        modules = [
            linear("q_a_proj", s.q_rank, hidden, 1.0, s.q_rank * s.bias),
            Module(name=f"{layer}.q_a_layernorm", part=FIXED, vector=s.q_rank),
            linear("q_b_proj", s.num_heads * qk_dim, s.q_rank, one),
        ]
    else:
        modules = [linear("q_proj", s.num_heads * qk_dim, hidden, one)]
    kv_width = s.kv_rank + s.rope_dim
    modules += [
        linear("kv_a_proj_with_mqa", kv_width, hidden, 1.0, kv_width * s.bias),
        Module(name=f"{layer}.kv_a_layernorm", part=FIXED, vector=s.kv_rank),
        linear("kv_b_proj", s.num_heads * (s.nope_dim + s.value_dim), s.kv_rank, one),
        linear("o_proj", hidden, s.num_heads * s.value_dim, one, hidden * s.bias),
    ]
    if s.output_gate:
        modules.append(linear("g_proj", s.num_heads * s.value_dim, hidden, one))
    if s.index_heads:
        query_width = s.q_rank or hidden
        modules += [
            linear("indexer.wq_b", s.index_heads * s.index_dim, query_width, 1.0),
            linear("indexer.wk", s.index_dim, hidden, 1.0),
            Module(name=f"{layer}.indexer.k_norm", part=FIXED, vector=2 * s.index_dim),
            Module(
                name=f"{layer}.indexers_proj", part=ATTENTION, out_features=s.index_heads, in_features=hidden,
                linear=False,
            ),
        ]  # fmt: skip
    spec = AttentionSpec(
        kind=LATENT,
        num_q_heads=local,
        num_kv_heads=1,
        head_dim=kv_width,
        value_dim=s.kv_rank,
        prefill_dims=(qk_dim, s.value_dim),
        index_heads=s.index_heads,
        index_dim=s.index_dim,
        index_bytes=float(s.index_dim + INDEX_SCALE_BYTES) if s.index_heads else 0.0,
        selected_entries=s.selected_entries,
    )
    return spec, modules


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedSizes:
    """A layer of DeepSeek-V4: one vector per token as key and value, pooled behind the window, of the whole model."""

    num_heads: int
    head_dim: int
    q_rank: int
    o_rank: int
    o_groups: int
    window: int
    ratio: int  # tokens per compressed entry; 0: the window alone
    index_heads: int
    index_dim: int
    selected_entries: int


def compressed(split: Split, layer: str, hidden: int, sizes: CompressedSizes) -> tuple[AttentionSpec, list[Module]]:
    """DeepSeek-V4's attention, shapes as in Transformers 5.24 models/deepseek_v4; short ratios overlap their windows
    by projecting every token twice, and an indexer picks among their entries.

    The tokens of an open window wait as pairs of key and gate, here in float32.
    """
    s = sizes
    local, one = split.heads(s.num_heads), 1 / split.parallel
    width = s.num_heads * s.head_dim

    def linear(name: str, rows: int, columns: int, share: float) -> Module:
        return Module(name=f"{layer}.{name}", part=ATTENTION, out_features=rows, in_features=columns, share=share)

    def plain(name: str, rows: int, columns: int) -> Module:
        return Module(
            name=f"{layer}.{name}", part=ATTENTION, out_features=rows, in_features=columns, linear=False
        )

    modules = [
        linear("wq_a", s.q_rank, hidden, 1.0),
        linear("wq_b", width, s.q_rank, one),
        linear("wkv", s.head_dim, hidden, 1.0),
        linear("wo_a", s.o_groups * s.o_rank, width // s.o_groups, one),
        linear("wo_b", hidden, s.o_groups * s.o_rank, one),
        Module(name=f"{layer}.norms", part=FIXED, vector=s.q_rank + s.head_dim),
        Module(name=f"{layer}.attn_sink", part=ATTENTION, vector=s.num_heads, share=one),
    ]
    overlap = s.index_heads > 0
    state = 0
    if s.ratio:
        pooled = s.head_dim * (2 if overlap else 1)
        modules += [
            plain("compressor.wkv", pooled, hidden),
            plain("compressor.wgate", pooled, hidden),
            Module(name=f"{layer}.compressor.norm", part=FIXED, vector=s.head_dim + s.ratio * pooled),
        ]
        state = s.ratio * (2 if overlap else 1) * 2 * pooled * 4
    if s.ratio and overlap:
        modules += [
            linear("indexer.wq_b", s.index_heads * s.index_dim, s.q_rank, 1.0),
            plain("indexer.weights_proj", s.index_heads, hidden),
            plain("indexer.compressor.wkv", 2 * s.index_dim, hidden),
            plain("indexer.compressor.wgate", 2 * s.index_dim, hidden),
            Module(
                name=f"{layer}.indexer.compressor.norm", part=FIXED, vector=s.index_dim + s.ratio * 2 * s.index_dim
            ),
        ]
        state += s.ratio * 2 * 2 * 2 * s.index_dim * 4
    spec = AttentionSpec(
        kind=COMPRESSED,
        num_q_heads=local,
        num_kv_heads=1,
        head_dim=s.head_dim,
        value_dim=s.head_dim,
        window=s.window,
        sinks=True,
        index_heads=s.index_heads,
        index_dim=s.index_dim,
        index_bytes=float(s.index_dim + INDEX_SCALE_BYTES) if overlap else 0.0,
        selected_entries=s.selected_entries,
        tokens_per_entry=max(1, s.ratio),
        state_bytes=state,
    )
    return spec, modules
