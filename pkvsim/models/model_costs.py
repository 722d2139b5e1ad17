"""What a model costs on one GPU: parameters, bytes and FLOPs of a step, by weights, cache and attention."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pkvsim.models.model_spec import CHUNKED, COMPRESSED, LATENT, SLIDING, AttentionSpec, LayerSpec, ModelSpec, Weights

KV_ELEMENT_BYTES = 2  # FP16 or BF16 caches


def total_weights(model: ModelSpec) -> Weights:
    """All of a model's weights on one GPU, without multi-token prediction heads and vision towers; with
    tensor_parallel 1 its published parameter count."""
    head = Weights() if model.tied_embeddings else model.lm_head
    return _layers(model) + model.embedding + model.final_norm + head


def active_weights(model: ModelSpec) -> Weights:
    """What one token passes through: chosen experts only, LM head included, embedding left out."""
    chosen = sum(
        (layer.weights(layer.feed_forward.experts_per_token).times(count) for layer, count in model.layer_groups),
        Weights(),
    )
    return chosen + model.final_norm + model.lm_head


def mtp_weights(model: ModelSpec) -> Weights:
    """Weights of the multi-token prediction heads, which an engine loads for speculative decoding alone."""
    return sum((layer.weights() for layer in model.mtp_layers), model.mtp_extra)


def weight_bytes(model: ModelSpec) -> float:
    """Memory that the weights take on one GPU."""
    return total_weights(model).bytes


def kv_bytes_per_token(model: ModelSpec, element_bytes: float = KV_ELEMENT_BYTES) -> float:
    """KV cache of one token over all layers of one GPU, sliding layers kept whole as plain paged pools keep them;
    index keys included, compressed entries in the mean. A whole number wherever the layers' sizes are."""
    total = sum(a.bytes_per_token(element_bytes) * count for a, count in model.attention_groups)
    return int(total) if total == int(total) else total


def growing_kv_bytes_per_token(model: ModelSpec, element_bytes: float = KV_ELEMENT_BYTES) -> float:
    """What a further token adds once every window is full and freed behind: sliding and chunked layers add nothing."""
    growing = ((a, count) for a, count in model.attention_groups if a.kind not in (SLIDING, CHUNKED))
    return sum(a.bytes_per_token(element_bytes) * count for a, count in growing)


def kv_bytes(model: ModelSpec, context: int, element_bytes: float = KV_ELEMENT_BYTES) -> float:
    """KV cache of a sequence of `context` tokens with windows bounded, without its constant state."""
    return sum(a.kv_bytes(context, element_bytes) * count for a, count in model.attention_groups)


def state_bytes(model: ModelSpec) -> int:
    """Bytes that a sequence holds on one GPU whatever its length: recurrent and convolution states."""
    return sum(a.state_bytes * count for a, count in model.attention_groups)


def decode_read_bytes(model: ModelSpec, contexts: Sequence[int], element_bytes: float = KV_ELEMENT_BYTES) -> float:
    """Cache and state bytes that a decode step over rows of these lengths moves on one GPU, weights left out."""
    return sum(
        count * sum(a.decode_read_bytes(int(context), element_bytes) for context in contexts)
        for a, count in model.attention_groups
    )


def decode_attention_flops(model: ModelSpec, contexts: Sequence[int]) -> int:
    """FLOPs of a decode step's attention and state updates over rows of these lengths on one GPU."""
    return sum(
        count * sum(a.decode_flops(int(context)) for context in contexts) for a, count in model.attention_groups
    )


def prefill_attention_flops(model: ModelSpec, begin: int, chunk: int) -> float:
    """FLOPs of causal attention of tokens [begin, begin + chunk) of a prompt over all layers of one GPU.

    Latent layers attend with expanded heads here; a selection bounds what a query sees, and its index scores all.
    """
    return sum(count * _prefill_flops(a, begin, chunk) for a, count in model.attention_groups)


def experts_touched(model: ModelSpec, tokens: Any) -> Any:
    """Experts of a layer that a step of `tokens` tokens (number or array) reads, in expectation over routers that
    choose evenly, which is an assumption: E (1 - (1 - k/E)^tokens). 1 in a dense model."""
    if not model.num_experts:
        return np.ones_like(np.asarray(tokens, np.float64))[()]
    return experts_touched_by(model.num_experts, model.experts_per_token, tokens)


def decode_weight_bytes(model: ModelSpec, batch: Any) -> Any:
    """Weight bytes that a step over `batch` tokens (number or array, >= 1) reads on one GPU, LM head included: of each
    moe layer the experts that even routing touches (experts_touched)."""
    tokens = np.asarray(batch, np.float64)
    read = model.embedding.bytes / model.vocab_size * tokens + model.final_norm.bytes + model.lm_head.bytes
    for layer, count in model.layer_groups:
        read = read + count * layer.weights(0).bytes
        experts = layer.feed_forward
        if experts.num_experts:
            read = read + count * layer.expert.bytes * experts_touched_by(
                experts.num_experts, experts.experts_per_token, tokens
            )
    return read[()]


def flops_per_token(model: ModelSpec, *, lm_head: bool = True) -> int:
    """FLOPs of one token through the matrices of all layers on one GPU, attention itself left out.

    Prefill needs the LM head for a prompt's last token only.
    """
    return active_weights(model).flops - (0 if lm_head else model.lm_head.flops)


def _layers(model: ModelSpec) -> Weights:
    return sum((layer.weights().times(count) for layer, count in model.layer_groups), Weights())


def experts_touched_by(experts: int, per_token: int, tokens: Any) -> Any:
    """Of `experts`, those that a step of `tokens` tokens reads where each chooses per_token, evenly."""
    missed = (1 - per_token / experts) ** np.asarray(tokens, np.float64)
    return (experts * (1 - missed))[()]


def _prefill_flops(a: AttentionSpec, begin: int, chunk: int) -> float:
    """FLOPs of one layer; counts the (query, entry) pairs in closed form but for chunked and compressed layers."""
    queries = np.arange(begin + 1, begin + chunk + 1)  # the context that each query sees, itself included
    if a.kind in (CHUNKED, COMPRESSED) or a.tokens_per_entry > 1:
        pairs = sum(a.read_entries(int(context)) for context in queries)
        scored = sum(a.index_entries(int(context)) for context in queries)
    else:
        bound = a.window if a.kind == SLIDING else a.selected_entries
        pairs = int(np.minimum(queries, bound).sum() if bound else queries.sum()) if a.num_q_heads else 0
        scored = int(queries.sum()) if a.index_heads else 0
    width = sum(a.prefill_dims) if a.kind == LATENT else a.head_dim + a.value_dim
    return 2 * a.num_q_heads * width * pairs + 2 * a.index_heads * a.index_dim * scored + chunk * a.state_flops


def bits_per_weight(model: ModelSpec) -> dict[str, float]:
    """Mean stored bits of a weight by class of tensors, scales included; classes that the model lacks left out."""
    classes = {
        "attention": [(layer.attention_weights, n) for layer, n in model.layer_groups],
        "mlp": [(layer.mlp, n) for layer, n in model.layer_groups],
        "experts": [(layer.expert, n * layer.feed_forward.num_experts) for layer, n in model.layer_groups],
        "embedding": [(model.embedding, 1)],
        "lm_head": [(model.lm_head, 1)],
    }
    found = {}
    for name, weights in classes.items():
        parameters = sum(w.parameters * n for w, n in weights)
        if parameters:
            found[name] = 8 * sum(w.bytes * n for w, n in weights) / parameters
    return found


def layer_weights(layer: LayerSpec, experts: float | None = None) -> Weights:
    """One layer with `experts` of its experts, all by default."""
    return layer.weights(experts)
