"""Products of decode steps and the small kernels beside them, against float64, and in graphs."""
from __future__ import annotations

import pytest
import torch

from gpu.serve.model.products import StreamedProducts, TorchProducts
from gpu.serve.model.row_kernels import RowKernels

EPS = 1e-5
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


def products_of_float64(x, norm, given, weight, bias):
    """normed, gated and add of the same inputs."""
    wide = x.double()
    normed = (wide * (wide.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * norm.double()).to(x.dtype).double()
    product = normed @ weight.double().t() + bias.double()
    gate, up = product.chunk(2, dim=1)
    return product, torch.nn.functional.silu(gate) * up, given.double() + x.double() @ weight.double().t() + bias.double()


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("columns", [1, 8, 9, 16, 31, 32, 33, 64, 65, 128])
@pytest.mark.parametrize(("rows", "depth"), [(6144, 4096), (4096, 14336), (960, 576), (288, 64)])
def test_wide_products_are_those_of_float64(dtype, columns, rows, depth):
    torch.manual_seed(columns)
    streamed, kind = StreamedProducts(EPS), getattr(torch, dtype)
    weight = (torch.randn(rows, depth, device="cuda") * depth**-0.5).to(kind)
    norm, bias = (torch.randn(size, device="cuda").to(kind) for size in (depth, rows))
    given, x = (torch.randn(columns, size, device="cuda").to(kind) for size in (rows, depth))
    wanted = products_of_float64(x, norm, given, weight, bias)
    found = []
    for _ in range(2):
        found.append((streamed.normed(x, norm, weight, bias), streamed.gated(x, norm, weight, bias),
                      streamed.add(given.clone(), x, weight, bias)))
        assert streamed.wide.empty()
    for one, other, double in zip(*found, wanted):
        assert torch.equal(one, other)
        # The rounded norm may fall to either side, which moves a sum of depth terms by a part of a step.
        assert ((one.double() - double).abs() <= KINDS[dtype] * (1.05 * double.abs() + 1.5)).all()


@pytest.mark.parametrize("columns", [2, 24, 64])
def test_products_of_a_graph_follow_their_inputs(columns):
    """A chain, in which each product waits for the one before while its weights are already under way."""
    torch.manual_seed(0)
    products, theirs = StreamedProducts(EPS), TorchProducts(EPS)
    weights = [(torch.randn(2048, 1024, device="cuda") / 32).half() for _ in range(12)]
    backs = [(torch.randn(1024, 1024, device="cuda") / 32).half() for _ in range(12)]
    norm, x = torch.ones(1024, device="cuda").half(), torch.zeros(columns, 1024, device="cuda").half()

    def chain(x, by):
        for weight, back in zip(weights, backs):
            x = by.add(x, by.gated(x, norm, weight, None), back, None)
        return x, by.normed(x, norm, weights[0], None)

    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        chain(x.clone(), products)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = chain(x.clone(), products)
        for seed in range(20):
            torch.manual_seed(seed)
            start = torch.randn(columns, 1024, device="cuda").half()
            x.copy_(start)
            graph.replay()
            first = [one.clone() for one in out]
            graph.replay()
            for one, again, wanted in zip(first, out, chain(start.clone(), theirs)):
                assert torch.equal(one, again)
                torch.testing.assert_close(one, wanted, rtol=0.03, atol=0.03)
    assert products.wide.empty()
