"""Matrix products of a model's layers: which there are, and what each costs by the tokens of a step."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pkvsim.devices.device import DeviceSpec
from pkvsim.devices.outside_constants import OutsideConstants
from pkvsim.models.model_costs import experts_touched_by
from pkvsim.models.model_spec import CHUNKED, FULL, SLIDING, LayerSpec, ModelSpec, Weights

BITS16, FP8, INT8, FP4, WEIGHT_ONLY = "16-bit", "fp8", "int8", "fp4", "weight-only"
KINDS = (BITS16, FP8, INT8, FP4, WEIGHT_ONLY)
ACTIVATION_BYTES = 2  # of an element of what goes in and comes out, which stays in 16 bits between products
ROWS_OF_A_TILE, COLUMNS_OF_A_TILE = 128, 128  # of a large product, as most kernels cut it


@dataclass(frozen=True, slots=True)
class Matrix:
    """One product of [tokens, in_features] by [in_features, out_features], and the bytes that its weights take."""

    out_features: int
    in_features: int
    weight_bytes: float
    kind: str  # of KINDS: what is multiplied

    @property
    def flops(self) -> int:
        """Of one token."""
        return 2 * self.out_features * self.in_features


def matrix_kind(weights: Weights, quantization: str, device: DeviceSpec) -> str:
    """How a group of weights is multiplied on this GPU, from its stored bits and the checkpoint's method.

    FP8 and FP4 weights are widened on a GPU without such products, as Marlin's kernels do; integer weights of 4 bits
    are everywhere, and those of 8 bits where the method keeps activations in 16 (GPTQ, bitsandbytes).
    """
    bits = 8 * weights.bytes / weights.parameters if weights.parameters else 16.0
    label = quantization.lower()
    if bits > 12:
        return BITS16
    if bits > 6.5:
        if "fp8" in label or "mxfp8" in label:
            return FP8 if device.fp8_tflops else WEIGHT_ONLY
        widened = any(method in label for method in ("gptq", "awq", "bitsandbytes", "none"))
        return INT8 if device.int8_tops and not widened else WEIGHT_ONLY
    if "fp4" in label and "bitsandbytes" not in label and device.fp4_tflops:
        return FP4
    return WEIGHT_ONLY


def peak_tflops(kind: str, device: DeviceSpec, constants: OutsideConstants) -> float:
    """10^12 FLOP per second that large products of a kind sustain."""
    shares = {
        BITS16: (device.fp16_tflops, constants.matrix_share),
        FP8: (device.fp8_tflops, constants.fp8_share),
        INT8: (device.int8_tops, constants.int8_share),
        FP4: (device.fp4_tflops, constants.fp4_share),
        WEIGHT_ONLY: (device.fp16_tflops, constants.weight_only_share),
    }
    peak, share = shares[kind]
    if peak is None:
        raise ValueError(f"device: {device.name} has no rate of {kind} products")
    return peak * share


def matrix_us(tokens: Any, matrix: Matrix, device: DeviceSpec, constants: OutsideConstants) -> Any:
    """Time of one product by `tokens` (number or array, 0: none), on a GPU that is warm.

    A roofline with a round corner, (bytes^p + FLOPs^p)^(1/p), above a fixed time per kernel. Tokens are padded to
    tiles, and the rate falls off below half_rate_tokens. Beyond a wave of tiles over the SMs the last, partly filled
    one is paid for by wave_weight.
    """
    return _product_us(tokens, 1.0, matrix, device, constants, peak_tflops(matrix.kind, device, constants))


def layer_matrix_us(tokens: Any, matrix: Matrix, device: DeviceSpec, constants: OutsideConstants) -> Any:
    """Time of one of a layer's products: matrix_us, and up to few_tokens in 16 bits what the engine's own kernel takes,
    which streams the weights, beside a fixed time and one for every token."""
    c, us = constants, matrix_us(tokens, matrix, device, constants)
    if matrix.kind != BITS16 or c.few_tokens == 0:
        return us
    count = np.asarray(tokens, np.float64)
    streamed = matrix.weight_bytes / (device.beta_gb_s * c.few_share * 1e3) + c.few_us + c.few_token_us * count
    return np.where((count > 0) & (count <= c.few_tokens), streamed, us)[()]


def expert_matrix_us(
    tokens: Any, layer: LayerSpec, matrix: Matrix, device: DeviceSpec, constants: OutsideConstants
) -> Any:
    """Time of one product of all routed experts of a layer by `tokens`: those touched are read, and each pads its own
    tokens to tiles."""
    experts = layer.feed_forward
    count = np.asarray(tokens, np.float64)
    touched = experts_touched_by(experts.num_experts, experts.experts_per_token, count)
    per_expert = count * experts.experts_per_token / np.maximum(touched, 1e-9)
    rate = peak_tflops(matrix.kind, device, constants) * constants.expert_share
    return _product_us(per_expert, touched, matrix, device, constants, rate)


def _product_us(
    tokens: Any, copies: Any, matrix: Matrix, device: DeviceSpec, c: OutsideConstants, tflops: float
) -> Any:
    count = np.asarray(tokens, np.float64)
    padded = np.ceil(count / c.tile_tokens) * c.tile_tokens
    rate = tflops * 1e6 * padded / (padded + c.half_rate_tokens + 1e-12)  # FLOP per us
    tiles = np.ceil(padded / ROWS_OF_A_TILE) * np.ceil(matrix.out_features / COLUMNS_OF_A_TILE) * copies
    waves = tiles / device.num_sms
    unfilled = np.where(waves > 1, np.ceil(waves) / np.maximum(waves, 1e-12) - 1, 0.0)
    compute_us = copies * padded * matrix.flops / np.maximum(rate, 1e-9) * (1 + c.wave_weight * unfilled)
    moved = copies * matrix.weight_bytes + copies * count * ACTIVATION_BYTES * (
        matrix.in_features + matrix.out_features
    )
    memory_us = moved / (device.beta_gb_s * c.weight_share * 1e3)
    fixed_us = c.matrix_us + (c.narrow_us if matrix.kind in (FP8, INT8, FP4) else 0.0)
    us = fixed_us + _corner(memory_us, compute_us, c.roofline_power)
    return np.where(count > 0, us, 0.0)[()]


def _corner(memory_us: Any, compute_us: Any, power: float) -> Any:
    longer, shorter = np.maximum(memory_us, compute_us), np.minimum(memory_us, compute_us)
    return longer * (1 + (shorter / np.maximum(longer, 1e-12)) ** power) ** (1 / power)


def _matrices(weights: Weights, shapes: list[tuple[int, int]], kind: str) -> list[Matrix]:
    """The products of a group of weights: these (out, in) shapes, scaled to the group's FLOPs where they are not all
    of it or not what it has, so that bytes and FLOPs add up to the group's."""
    flops = sum(2 * out * into for out, into in shapes)
    if not weights.flops or not flops:
        return []
    scale = weights.flops / flops
    bytes_per_flop = weights.bytes / weights.flops
    made = []
    for out, into in shapes:
        scaled = max(1, round(out * scale))
        made.append(Matrix(scaled, into, 2 * scaled * into * bytes_per_flop, kind))
    return made


def attention_matrices(model: ModelSpec, layer: LayerSpec, device: DeviceSpec) -> list[Matrix]:
    """Projections into and out of a layer's attention: query, key and value as one product, and the output's; where
    attention is of another kind (latent, state), four products of one size, which is an assumption."""
    a, hidden = layer.attention, model.hidden_size
    kind = matrix_kind(layer.attention_weights, model.quantization, device)
    if a.kind in (FULL, SLIDING, CHUNKED):
        queries = a.num_q_heads * a.head_dim
        shapes = [(queries + a.kv_elements, hidden), (hidden, a.num_q_heads * a.value_dim)]
    else:
        shapes = [(hidden, hidden)] * 4
    return _matrices(layer.attention_weights, shapes, kind)


def mlp_matrices(model: ModelSpec, layer: LayerSpec, device: DeviceSpec) -> list[Matrix]:
    """A dense MLP, or the shared experts: gate and up as one product, then down."""
    return _gated(layer.mlp, model, device)


def expert_matrices(model: ModelSpec, layer: LayerSpec, device: DeviceSpec) -> list[Matrix]:
    """The same of one routed expert."""
    return _gated(layer.expert, model, device)


def _gated(weights: Weights, model: ModelSpec, device: DeviceSpec) -> list[Matrix]:
    hidden = model.hidden_size
    width = max(1, round(weights.flops / (6 * hidden)))
    kind = matrix_kind(weights, model.quantization, device)
    return _matrices(weights, [(2 * width, hidden), (hidden, width)], kind)


def head_matrix(model: ModelSpec, device: DeviceSpec) -> list[Matrix]:
    """The LM head's share of this GPU."""
    kind = matrix_kind(model.lm_head, model.quantization, device)
    share = max(1, round(model.lm_head.flops / (2 * model.hidden_size)))
    return _matrices(model.lm_head, [(share, model.hidden_size)], kind)


def layer_matrices_us(
    tokens: Any, model: ModelSpec, layer: LayerSpec, device: DeviceSpec, constants: OutsideConstants
) -> Any:
    """Time of all of a layer's products, experts and the router included."""
    us = np.zeros_like(np.asarray(tokens, np.float64))
    for matrix in attention_matrices(model, layer, device) + mlp_matrices(model, layer, device):
        us = us + layer_matrix_us(tokens, matrix, device, constants)
    if layer.feed_forward.num_experts:
        for matrix in expert_matrices(model, layer, device):
            us = us + expert_matrix_us(tokens, layer, matrix, device, constants)
        router = Matrix(
            layer.feed_forward.num_experts, model.hidden_size, layer.norms_and_router.bytes, BITS16
        )
        us = us + matrix_us(tokens, router, device, constants)
        us = us + np.where(np.asarray(tokens) > 0, constants.expert_us, 0.0)
    return us[()]
