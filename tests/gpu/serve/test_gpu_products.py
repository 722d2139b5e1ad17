"""Products of decode steps and the small kernels beside them, against float64, and in graphs."""
from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from product_chains import check_in_a_graph
from product_ref import EPS

from gpu.kernels.this_gpu import this_gpu
from gpu.kernels.variant import shared_limit_bytes
from gpu.serve.model.product_variant import ADD, GATE, STORE, wide_variant
from gpu.serve.model.products import StreamedProducts, WideProducts
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


@pytest.mark.parametrize(("dtype", "rows", "depth", "columns", "ends"), [
    ("float16", 6144, 4096, (31, 32), (STORE, ADD, GATE)), ("float16", 4096, 14336, (33, 64), (ADD,)),
    ("bfloat16", 28672, 4096, (64,), (GATE,)), ("bfloat16", 960, 576, (1, 8), (STORE, GATE)),
    ("bfloat16", 288, 64, (9,), (ADD,)), ("float16", 4064, 4160, (100, 128), (GATE,)),
])  # fmt: skip
def test_wide_products_are_those_of_float64(dtype, rows, depth, columns, ends):
    torch.manual_seed(rows)
    wide, kind, capability = WideProducts(), getattr(torch, dtype), this_gpu().compute_capability
    weight = (torch.randn(rows, depth, device="cuda") * depth**-0.5).to(kind)
    bias = torch.randn(rows, device="cuda").to(kind)
    for count, end in itertools.product(columns, ends):
        variant = wide_variant(rows=rows, depth=depth, columns=count, end=end, bfloat16=dtype == "bfloat16",
                               capability=capability, shared_limit=shared_limit_bytes(capability))
        if variant is None:
            assert count > 64 and capability // 10 != 9
            continue
        x, first = (torch.randn(count, size, device="cuda").to(kind) for size in (depth, rows))
        wanted = x.double() @ weight.double().t() + bias.double()
        if end == GATE:
            gate, up = wanted.chunk(2, dim=1)
            wanted, first = torch.nn.functional.silu(gate) * up, first[:, : rows // 2].contiguous()
        elif end == ADD:
            wanted = first.double() + wanted
        ways = (0, 1, 2) if variant.groups == 2 else (variant.groups,)
        variants = [dataclasses.replace(variant, groups=groups, per_sm=ctas) for groups in ways for ctas in (1, 2)]
        found = [wide.run(one_of, x, weight, bias, first.clone()) for one_of in variants for _ in range(3)]
        assert wide.empty()
        for at in range(0, len(found), 3):
            assert all(torch.equal(one, found[at]) for one in found[at : at + 3])
            assert ((found[at].double() - wanted).abs() <= 1.02 * KINDS[dtype] * wanted.abs() + 2e-4).all()


@pytest.mark.parametrize(("columns", "least_wide"), [(8, 65), (24, 9)])
def test_products_of_a_graph_follow_their_inputs(columns, least_wide, monkeypatch):
    monkeypatch.setattr("gpu.serve.model.products.LEAST_WIDE_COLUMNS", least_wide)
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
    assert products.wide.empty()
