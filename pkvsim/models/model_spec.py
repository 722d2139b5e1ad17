"""A model as one GPU sees it: its layers, each with its attention, its feed-forward part and their weights."""
from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby

from pkvsim.shapes import DecodeShape

FULL, SLIDING, CHUNKED, LATENT, COMPRESSED, STATE, NONE = (
    "full", "sliding", "chunked", "latent", "compressed", "state", "none",
)  # fmt: skip
DENSE, MOE = "dense", "moe"


@dataclass(frozen=True, slots=True)
class Weights:
    """A group of weights on one GPU: how many, how large, and FLOPs per token through its matrices."""

    parameters: int = 0
    bytes: float = 0.0
    flops: int = 0

    def __add__(self, other: Weights) -> Weights:
        return Weights(self.parameters + other.parameters, self.bytes + other.bytes, self.flops + other.flops)

    def times(self, count: float) -> Weights:
        """`count` such groups."""
        return Weights(round(self.parameters * count), self.bytes * count, round(self.flops * count))


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """How one layer mixes tokens. Heads, cache and state are one GPU's share.

    full: a query sees the whole sequence; sliding: the last `window` tokens; chunked: those since the last multiple of
    `window`. latent (MLA, arXiv 2405.04434): all query heads share one cached vector of head_dim elements, whose first
    value_dim are the value. compressed (DeepSeek-V4): the last `window` tokens one by one, and one vector of head_dim
    elements, key and value in one, for every `tokens_per_entry` tokens. state (linear attention, SSM): no cache that
    grows, a state of state_bytes per sequence. none: the layer has a feed-forward part alone.

    With index_heads a small attention scores every cached entry first (DeepSeek-V3.2, arXiv 2512.02556; MiniMax-M3),
    and the layer attends to selected_entries of them at most; without, selected_entries may be set for a layer that
    takes over the selection of an earlier one.
    """

    kind: str
    num_q_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0  # of queries and keys
    value_dim: int = 0
    window: int = 0  # tokens
    soft_cap: float = 0.0  # 0: none
    sinks: bool = False
    prefill_dims: tuple[int, int] = (0, 0)  # latent layers: (query and key, value) head sizes once expanded
    index_heads: int = 0
    index_dim: int = 0
    index_bytes: float = 0.0  # per cached entry
    selected_entries: int = 0  # 0: all
    tokens_per_entry: int = 1
    state_bytes: int = 0  # of one sequence
    state_flops: int = 0  # per token

    @property
    def kv_elements(self) -> int:
        """Cache elements of one entry: keys and values, or the vector that is both."""
        shared = self.kind in (LATENT, COMPRESSED)
        return self.num_kv_heads * (self.head_dim if shared else self.head_dim + self.value_dim)

    def cached_entries(self, context: int) -> int:
        """Entries that a sequence of `context` tokens needs in the cache, tokens that no query will see again freed."""
        if self.kind in (STATE, NONE):
            return 0
        if self.kind == COMPRESSED:
            compressed = context // self.tokens_per_entry if self.tokens_per_entry > 1 else 0
            return min(context, self.window) + compressed
        if self.kind == CHUNKED:
            return (context - 1) % self.window + 1 if context else 0
        return min(context, self.window) if self.kind == SLIDING else context

    def read_entries(self, context: int) -> int:
        """Entries that a decode query reads once `context` tokens, its own included, are cached."""
        cached = self.cached_entries(context)
        if not self.selected_entries:
            return cached
        recent = min(context, self.window) if self.kind == COMPRESSED else 0
        return recent + min(cached - recent, self.selected_entries)

    def index_entries(self, context: int) -> int:
        """Entries whose index keys a decode query scores."""
        return context // self.tokens_per_entry if self.index_heads else 0

    def kv_bytes(self, context: int, element_bytes: float) -> float:
        """Cache of a sequence of `context` tokens, index keys included, the constant state left out."""
        return (
            self.cached_entries(context) * self.kv_elements * element_bytes
            + self.index_entries(context) * self.index_bytes
        )

    def bytes_per_token(self, element_bytes: float) -> float:
        """What one more token adds to the cache as long as no window is full; compressed entries in the mean."""
        if self.kind in (STATE, NONE):
            return 0.0
        entries = 1.0 if self.tokens_per_entry == 1 and self.kind != COMPRESSED else 0.0
        if self.kind == COMPRESSED and self.tokens_per_entry > 1:
            entries = 1 / self.tokens_per_entry
        index = self.index_bytes / self.tokens_per_entry if self.index_heads else 0.0
        return entries * self.kv_elements * element_bytes + index

    def decode_read_bytes(self, context: int, element_bytes: float) -> float:
        """What one decode query reads (and, of a state, writes back) of the cache."""
        return (
            self.read_entries(context) * self.kv_elements * element_bytes
            + self.index_entries(context) * self.index_bytes
            + 2 * self.state_bytes
        )

    def decode_flops(self, context: int) -> int:
        """FLOPs of one decode query: scores and weighted values, index scores, the state's update."""
        pairs = 2 * self.num_q_heads * (self.head_dim + self.value_dim) * self.read_entries(context)
        return pairs + 2 * self.index_heads * self.index_dim * self.index_entries(context) + self.state_flops


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForwardSpec:
    """The feed-forward part of one layer, sizes of the whole model."""

    kind: str = NONE  # dense, moe or none
    intermediate_size: int = 0  # of the dense MLP, in a moe layer of all shared experts together
    num_experts: int = 0
    experts_per_token: int = 0
    expert_intermediate_size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One layer: what it does, and its weights on one GPU."""

    attention: AttentionSpec
    feed_forward: FeedForwardSpec
    attention_weights: Weights = Weights()
    norms_and_router: Weights = Weights()  # not split over GPUs
    mlp: Weights = Weights()  # a dense MLP; in a moe layer what every token passes through: shared experts and the like
    expert: Weights = Weights()  # one routed expert

    def weights(self, experts: float | None = None) -> Weights:
        """The layer's weights with `experts` of its routed experts, all by default."""
        count = self.feed_forward.num_experts if experts is None else experts
        fixed = self.attention_weights + self.norms_and_router + self.mlp
        return fixed + self.expert.times(count) if self.feed_forward.num_experts else fixed


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One model on one of tensor_parallel GPUs: heads and weights are this GPU's share."""

    name: str
    source: str  # the config that every number follows from
    architecture: str
    tensor_parallel: int
    hidden_size: int
    vocab_size: int
    max_context: int  # tokens
    layers: tuple[LayerSpec, ...]
    embedding: Weights
    final_norm: Weights
    lm_head: Weights
    tied_embeddings: bool  # the LM head reads the embedding's weights
    mtp_layers: tuple[LayerSpec, ...] = ()  # multi-token prediction heads, which plain decoding does not load
    mtp_extra: Weights = Weights()  # their projections and norms beside the layers
    quantization: str = "none"
    kv_cache_type: str = ""  # what the checkpoint asks of the cache; empty: the weights' 16-bit type
    ignored: tuple[tuple[str, str], ...] = ()  # (field, why it changes nothing)
    notes: tuple[str, ...] = ()  # what a reader of the figures must know

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def layer_groups(self) -> tuple[tuple[LayerSpec, int], ...]:
        """(layer, how many are like it), in the order in which each first appears."""
        counts: dict[LayerSpec, int] = {}
        for layer in self.layers:
            counts[layer] = counts.get(layer, 0) + 1
        return tuple(counts.items())

    @property
    def layer_runs(self) -> tuple[tuple[LayerSpec, int], ...]:
        """(layer, length) of every run of equal layers, first to last."""
        return tuple((layer, len(list(run))) for layer, run in groupby(self.layers))

    @property
    def attention_groups(self) -> tuple[tuple[AttentionSpec, int], ...]:
        """(attention, how many layers have it), layers without attention left out."""
        counts: dict[AttentionSpec, int] = {}
        for layer in self.layers:
            if layer.attention.kind != NONE:
                counts[layer.attention] = counts.get(layer.attention, 0) + 1
        return tuple(counts.items())

    # What follows describes models whose layers are grouped-query attention of one shape, full or sliding.

    def _grouped(self) -> AttentionSpec:
        """The heads of all layers; ValueError where they differ or where attention is of another kind."""
        found = {(_is_grouped(a), a.num_q_heads, a.num_kv_heads, a.head_dim) for a, _ in self.attention_groups}
        windows = {a.window for a, _ in self.attention_groups if a.kind == SLIDING}
        if len(found) != 1 or not all(grouped for grouped, *_ in found) or len(windows) > 1:
            kinds = ", ".join(dict.fromkeys(describe_attention(a) for a, _ in self.attention_groups)) or "none"
            raise ValueError(
                f"model: {self.name}: expected layers of grouped-query attention of one shape, full or sliding, "
                f"got {kinds}"
            )
        return self.attention_groups[0][0]

    @property
    def num_q_heads(self) -> int:
        return self._grouped().num_q_heads

    @property
    def num_kv_heads(self) -> int:
        return self._grouped().num_kv_heads

    @property
    def head_dim(self) -> int:
        return self._grouped().head_dim

    @property
    def num_sliding_layers(self) -> int:
        """Layers that attend to the last sliding_window tokens only."""
        self._grouped()
        return sum(layer.attention.kind == SLIDING for layer in self.layers)

    @property
    def num_full_layers(self) -> int:
        """Layers that attend to the whole sequence."""
        self._grouped()
        return sum(layer.attention.kind == FULL for layer in self.layers)

    @property
    def sliding_window(self) -> int:
        """Tokens; 0 without sliding layers."""
        self._grouped()
        return max(layer.attention.window for layer in self.layers)

    @property
    def num_experts(self) -> int:
        """Routed experts of a layer, the most that one has; 0 in a dense model."""
        return max(layer.feed_forward.num_experts for layer in self.layers)

    @property
    def experts_per_token(self) -> int:
        return max(layer.feed_forward.experts_per_token for layer in self.layers)

    def shape(self, page_size: int) -> DecodeShape:
        """The attention shape of a layer on this GPU."""
        return DecodeShape(self.num_q_heads, self.num_kv_heads, self.head_dim, page_size)


def _is_grouped(attention: AttentionSpec) -> bool:
    """Grouped-query attention, full or sliding, to every entry."""
    return attention.kind in (FULL, SLIDING) and not attention.selected_entries


def with_kv_heads(model: ModelSpec, num_kv_heads: int) -> ModelSpec:
    """The model with another number of KV heads in every layer that caches keys and values; its weights stay."""
    layers = tuple(
        replace(layer, attention=replace(layer.attention, num_kv_heads=num_kv_heads))
        if layer.attention.kind in (FULL, SLIDING, CHUNKED)
        else layer
        for layer in model.layers
    )
    return replace(model, layers=layers)


def describe_attention(attention: AttentionSpec) -> str:
    """One attention kind in words, such as "full 32/8 x 128" (query heads, KV heads, head_dim)."""
    a = attention
    if a.kind == NONE:
        return "none"
    if a.kind == STATE:
        return f"state of {a.state_bytes:,} B"
    parts = [f"{a.kind} {a.num_q_heads}/{a.num_kv_heads} x {a.head_dim}"]
    if a.window:
        parts.append(f"window {a.window}")
    if a.tokens_per_entry > 1:
        parts.append(f"1 entry per {a.tokens_per_entry} tokens")
    if a.selected_entries:
        chooser = f"by {a.index_heads} index heads" if a.index_heads else "as an earlier layer chose"
        parts.append(f"top {a.selected_entries} {chooser}")
    if a.soft_cap:
        parts.append(f"soft cap {a.soft_cap:g}")
    if a.sinks:
        parts.append("sinks")
    return ", ".join(parts)
