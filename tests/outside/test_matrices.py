"""Products: what a model's weights come to, and prices that no roofline contradicts."""
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvsim.devices.device import DEVICES, get_device
from pkvsim.devices.outside_constants import OutsideConstants
from pkvsim.models.model_spec import Weights
from pkvsim.models.presets import catalogue, get_model
from pkvsim.outside.communication import all_reduce_us
from pkvsim.outside.matrices import (
    BITS16,
    FP4,
    FP8,
    INT8,
    KINDS,
    WEIGHT_ONLY,
    Matrix,
    attention_matrices,
    expert_matrices,
    layer_matrices_us,
    layer_matrix_us,
    matrix_kind,
    matrix_us,
    mlp_matrices,
    peak_tflops,
)

CONSTANTS = OutsideConstants(matrix_share=0.7, fp8_share=0.55, weight_share=0.95)
H200 = get_device("h200")
sizes = st.integers(16, 30_000)


@given(
    sizes, sizes, st.integers(1, 9000), st.sampled_from([BITS16, FP8, INT8, WEIGHT_ONLY]), st.sampled_from([1, 16, 64])
)
def test_a_product_takes_no_less_than_its_bytes_and_flops(out, into, tokens, kind, tile):
    c = replace(CONSTANTS, tile_tokens=float(tile))
    matrix = Matrix(out, into, out * into * 1.0, kind)
    us = matrix_us(tokens, matrix, H200, c)
    assert us >= c.matrix_us + matrix.weight_bytes / (H200.beta_gb_s * c.weight_share * 1e3)
    assert us >= c.matrix_us + tokens * matrix.flops / (peak_tflops(kind, H200, c) * 1e6) * 0.999999
    assert matrix_us(0, matrix, H200, c) == 0


@given(sizes, sizes, st.sampled_from(KINDS), st.floats(1, 50))
def test_more_tokens_never_take_less(out, into, kind, power):
    c = replace(CONSTANTS, roofline_power=power)
    times = matrix_us(np.arange(1, 2000), Matrix(out, into, out * into * 1.0, kind), get_device("b200"), c)
    assert (np.diff(times) >= -1e-9 * times[1:]).all()


@given(sizes, sizes, st.sampled_from(KINDS), st.integers(0, 40))
def test_products_of_few_tokens_stream_their_weights(out, into, kind, few):
    """Of few tokens in 16 bits, which then take what the bytes and every token take; all others as they are."""
    gpu = get_device("b200")  # which multiplies all kinds
    c = replace(CONSTANTS, few_tokens=float(few), few_share=0.9, few_us=1.5, few_token_us=0.25)
    matrix, tokens = Matrix(out, into, out * into * 2.0, kind), np.arange(100)
    us, usual = layer_matrix_us(tokens, matrix, gpu, c), matrix_us(tokens, matrix, gpu, c)
    own = (tokens > 0) & (tokens <= few) & (kind == BITS16)
    streamed = matrix.weight_bytes / (gpu.beta_gb_s * 0.9 * 1e3) + 1.5 + 0.25 * tokens
    assert us[own] == pytest.approx(streamed[own]) and (us[~own] == usual[~own]).all()


@pytest.mark.parametrize("name", catalogue())
def test_products_add_up_to_the_models_weights(name):
    model = get_model(name)
    for layer, _ in model.layer_groups:
        for weights, matrices in (
            (layer.attention_weights, attention_matrices(model, layer, H200)),
            (layer.mlp, mlp_matrices(model, layer, H200)),
            (layer.expert, expert_matrices(model, layer, H200)),
        ):
            assert sum(m.flops for m in matrices) == pytest.approx(weights.flops, rel=0.005)
            assert sum(m.weight_bytes for m in matrices) == pytest.approx(weights.bytes, rel=0.005)


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "gpt-oss-20b"])
def test_experts_cost_what_a_batch_touches(name):
    """One token reads its own experts; thousands read all of them, once."""
    model = get_model(name)
    layer = model.layers[0]
    one, many = layer_matrices_us(np.array([1, 4096]), model, layer, H200, replace(CONSTANTS, expert_us=0.0))
    experts = layer.feed_forward
    read = H200.beta_gb_s * CONSTANTS.weight_share * 1e3
    assert one < (layer.weights(2 * experts.experts_per_token + 1).bytes) / read + 60
    assert many > layer.weights().bytes / read


@pytest.mark.parametrize(
    ("bits", "label", "gpu", "kind"),
    [
        (16, "none", "l4", BITS16), (8, "fp8", "h200", FP8), (8, "modelopt fp8", "a100_80gb", WEIGHT_ONLY),
        (8, "compressed-tensors int8", "a100_80gb", INT8), (8.1, "gptq int8", "h200", WEIGHT_ONLY),
        (4.25, "mxfp4", "b200", FP4), (4.5, "modelopt nvfp4", "h200", WEIGHT_ONLY),
        (4.2, "awq int4", "b200", WEIGHT_ONLY),
    ],
)  # fmt: skip
def test_what_is_multiplied(bits, label, gpu, kind):
    assert matrix_kind(Weights(1000, 125 * bits, 2000), label, get_device(gpu)) == kind


def test_a_rate_that_a_gpu_lacks_is_refused():
    with pytest.raises(ValueError, match="device: l4 has no rate of fp4 products"):
        peak_tflops(FP4, get_device("l4"), CONSTANTS)


@given(st.sampled_from(sorted(DEVICES)), st.integers(0, 1 << 30), st.integers(2, 8))
def test_all_reduces_grow_with_bytes_and_ranks(name, num_bytes, ranks):
    device = DEVICES[name]
    assert all_reduce_us(num_bytes, 1, device, CONSTANTS) == 0
    us = all_reduce_us(num_bytes, ranks, device, CONSTANTS)
    assert us >= 2 * (ranks - 1) / ranks * num_bytes / (device.link_gb_s * 1e3)
    assert us <= all_reduce_us(num_bytes, ranks + 1, device, CONSTANTS)
    assert us <= all_reduce_us(num_bytes + 1024, ranks, device, CONSTANTS)
