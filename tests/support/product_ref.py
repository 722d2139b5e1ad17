"""What a product with its norm before and its end behind gives, in float64."""
from __future__ import annotations

import numpy as np

from gpu.serve.model.product_variant import ADD, GATE

EPS = 1e-5


def expected(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, out: np.ndarray, end: int,
             norm: np.ndarray | None = None) -> np.ndarray:
    """x [columns, depth], weight [rows, depth], out [columns, rows, or half of them with GATE]: what is there before."""
    if norm is not None:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * norm
    product = x @ weight.T + (0 if bias is None else bias)
    if end == ADD:
        return out + product
    if end == GATE:
        gate, up = np.split(product, 2, axis=1)
        return gate / (1 + np.exp(-gate)) * up
    return product
