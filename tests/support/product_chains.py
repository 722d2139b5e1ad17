"""Chains of products in a CUDA graph: each waits for the one before while its weights are already under way."""
from __future__ import annotations

from collections.abc import Callable

import torch
from product_ref import EPS

from gpu.serve.model.products import StreamedProducts, TorchProducts

Chain = Callable[[torch.Tensor, object], torch.Tensor]  # of x, which is written over, and of who multiplies


def check_in_a_graph(chain: Chain, products: StreamedProducts, *, columns: int, width: int, tolerance: float) -> None:
    """A captured chain follows its x [columns, width] float16: it gives what PyTorch's products give, and the same bits
    every time."""
    x, theirs = torch.zeros(columns, width, device="cuda").half(), TorchProducts(EPS)
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
            start = torch.randn(columns, width, device="cuda").half()
            x.copy_(start)
            graph.replay()
            first = out.clone()
            graph.replay()
            assert torch.equal(first, out)
            torch.testing.assert_close(first, chain(start.clone(), theirs), rtol=tolerance, atol=tolerance)
