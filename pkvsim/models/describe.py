"""A model's figures as plain values, for JSON and for tables."""
from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pkvsim.models.model_costs import (
    active_weights,
    bits_per_weight,
    flops_per_token,
    growing_kv_bytes_per_token,
    kv_bytes_per_token,
    mtp_weights,
    state_bytes,
    total_weights,
)
from pkvsim.models.model_spec import LayerSpec, ModelSpec, describe_attention


def model_figures(model: ModelSpec) -> dict[str, Any]:
    """Sizes of one GPU's share in bytes, caches of 16-bit elements.

    layers: runs of equal layers, first to last, each with its attention and feed-forward part as fields of
    AttentionSpec and FeedForwardSpec; weights: parameters and bytes of one such layer, all its experts included.
    """
    total, heads = total_weights(model), mtp_weights(model)
    return {
        "name": model.name,
        "source": model.source,
        "architecture": model.architecture,
        "tensor_parallel": model.tensor_parallel,
        "quantization": model.quantization,
        "kv_cache_type": model.kv_cache_type or None,
        "max_context": model.max_context,
        "num_layers": model.num_layers,
        "parameters": total.parameters,
        "active_parameters": active_weights(model).parameters,
        "weight_bytes": round(total.bytes),
        "bits_per_weight": bits_per_weight(model),
        "kv_bytes_per_token": kv_bytes_per_token(model),
        "kv_bytes_per_token_beyond_windows": growing_kv_bytes_per_token(model),
        "state_bytes": state_bytes(model),
        "flops_per_token": flops_per_token(model),
        "prediction_heads": {
            "layers": len(model.mtp_layers), "parameters": heads.parameters, "weight_bytes": round(heads.bytes),
        },
        "layers": [{"count": count, **_layer(layer)} for layer, count in model.layer_runs],
        "ignored": dict(model.ignored),
        "notes": list(model.notes),
    }  # fmt: skip


def _layer(layer: LayerSpec) -> dict[str, Any]:
    weights = layer.weights()
    return {
        "attention": asdict(layer.attention),
        "feed_forward": asdict(layer.feed_forward),
        "weights": {"parameters": weights.parameters, "bytes": round(weights.bytes)},
    }


def describe_feed_forward(layer: LayerSpec) -> str:
    """One feed-forward part in words, such as "8 of 128 experts of 768"."""
    f = layer.feed_forward
    if f.kind == "moe":
        shared = f", {f.intermediate_size} for all" if f.intermediate_size else ""
        return f"{f.experts_per_token} of {f.num_experts} experts of {f.expert_intermediate_size}{shared}"
    return f"dense {f.intermediate_size}" if f.kind == "dense" else "none"


def describe_layers(model: ModelSpec) -> list[tuple[int, str, str]]:
    """(count, attention, feed-forward) of every kind of layer, in the order in which each first appears."""
    counts: dict[tuple[str, str], int] = {}
    for layer in model.layers:
        words = describe_attention(layer.attention), describe_feed_forward(layer)
        counts[words] = counts.get(words, 0) + 1
    return [(count, *words) for words, count in counts.items()]
