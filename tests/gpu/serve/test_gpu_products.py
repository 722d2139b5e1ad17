"""Products of decode steps and the small kernels beside them, against float64, and in graphs."""
from __future__ import annotations

import pytest
import torch
from product_chains import check_in_a_graph
from product_ref import EPS

from gpu.serve.model.products import StreamedProducts
from gpu.serve.model.row_kernels import RowKernels

KINDS = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # half a step of numbers near 1


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (32, 4096), (128, 576), (3, 14336)])
def test_norms_and_gates_are_those_of_float64(dtype, rows, width):
    torch.manual_seed(rows)
    kernels, kind = RowKernels(), getattr(torch, dtype)
    x, weight = (torch.randn(shape, device="cuda").to(kind) for shape in ((rows, 2 * width), (width,)))
    half, wide = x[:, :width], x.double()
    normed = wide[:, :width] * (wide[:, :width].pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
    gated = torch.nn.functional.silu(wide[:, :width]) * wide[:, width:]
    for ours, wanted in ((kernels.rms_norm(half, weight, EPS), normed), (kernels.gate(x), gated)):
        assert ((ours.double() - wanted).abs() <= 1.01 * KINDS[dtype] * wanted.abs() + 1e-6).all()


@pytest.mark.parametrize(("rows", "width"), [(1, 128256), (32, 128256), (128, 997), (5, 50257)])
def test_the_first_of_the_largest_is_chosen(rows, width):
    torch.manual_seed(width)
    kernels = RowKernels()
    for _ in range(5):
        x = (torch.randn(rows, width, device="cuda") * 4).round().half()  # many are equal
        largest = x.amax(-1, keepdim=True)
        wanted = torch.where(x == largest, torch.arange(width, device="cuda"), width).amin(-1)
        torch.testing.assert_close(kernels.argmax(x), wanted)
    x[-1, 900] = x[-1, 990] = float("nan")
    assert kernels.argmax(x)[-1] == 900


@pytest.mark.parametrize("columns", [8, 24])  # of product.cu, and of PyTorch beside rows.cu
def test_products_of_a_graph_follow_their_inputs(columns):
    torch.manual_seed(0)
    products = StreamedProducts(EPS)
    weights = [(torch.randn(2048, 1024, device="cuda") / 32).half() for _ in range(12)]
    backs = [(torch.randn(1024, 1024, device="cuda") / 32).half() for _ in range(12)]
    norm = torch.ones(1024, device="cuda").half()

    def chain(x, by):
        for weight, back in zip(weights, backs):
            x = by.add(x, by.gated(x, norm, weight, None), back, None)
        return torch.cat([x, by.normed(x, norm, weights[0], None)], dim=1)

    check_in_a_graph(chain, products, columns=columns, width=1024, tolerance=0.03)
