"""Weight-only quantisation: the same model with narrower layer matrices, as AWQ and GPTQ checkpoints store them."""
from __future__ import annotations

from dataclasses import replace

from pkvsim.models.presets import ModelSpec, Weights

# Bits a weight of a layer's matrices takes by the bits asked for. 4: groups of 128 share a 16-bit scale and a 4-bit
# zero point (AutoAWQ's and GPTQ's usual checkpoints); 8: one scale per output channel, too few to count.
STORED_BITS = {4: 4 + (16 + 4) / 128, 8: 8.0}
WEIGHT_BITS = (16, *sorted(STORED_BITS, reverse=True))


def with_weight_bits(model: ModelSpec, bits: int) -> ModelSpec:
    """The model with its attention and MLP matrices in `bits` bits; embedding and LM head stay as they are.

    16 is the model as it came. FLOPs do not change: weights are widened on their way to FP16 matrix products.
    """
    if bits not in WEIGHT_BITS:
        raise ValueError(f"weight_bits: expected one of {', '.join(map(str, WEIGHT_BITS))}, got {bits!r}")
    if bits == 16:
        return model

    def narrow(weights: Weights) -> Weights:
        return replace(weights, bytes=min(weights.bytes, weights.parameters * STORED_BITS[bits] / 8))

    layers = tuple(
        replace(
            layer,
            attention_weights=narrow(layer.attention_weights),
            mlp=narrow(layer.mlp),
            expert=narrow(layer.expert),
        )
        for layer in model.layers
    )
    return replace(model, name=f"{model.name} in {bits} bits", layers=layers)
