"""A transformer layer around the attention: how much of a decode step attention is, and what a faster one saves.

A timing proxy in the shape of a Llama-3-8B layer: RMSNorm, QKV projection, attention, output projection, RMSNorm and a
SwiGLU MLP, all FP16 through torch, with random weights. Rotary embedding and appending to the cache are left out.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.tables import Table, us
from serving.engines import EngineSet, StepInputs

from gpu.measure.timing import graph_time_us, shared_stream
from pkvsim import DecodeShape
from pkvsim.traces.paper_families import Trace

if TYPE_CHECKING:
    import torch
    from serving.run import Bench

MLP_RATIO = 3.5  # of Llama-3-8B: 14336 over 4096
NORM_EPSILON = 1e-5


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """FP16, [out, in] as torch.nn.functional.linear takes them; hidden = num_q_heads * head_dim."""

    qkv: torch.Tensor  # [(Hq + 2 Hkv) * d, hidden]
    out: torch.Tensor  # [hidden, hidden]
    gate_up: torch.Tensor  # [2 * intermediate, hidden]
    down: torch.Tensor  # [hidden, intermediate]
    norms: tuple[torch.Tensor, torch.Tensor]  # [hidden] each

    @property
    def num_bytes(self) -> int:
        return sum(w.numel() * w.element_size() for w in (self.qkv, self.out, self.gate_up, self.down, *self.norms))


def make_weights(shape: DecodeShape, dtype: torch.dtype) -> LayerWeights:
    import torch

    hidden = shape.num_q_heads * shape.head_dim
    inner = int(hidden * MLP_RATIO)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, device="cuda") / columns**0.5).to(dtype)

    ones = torch.ones(hidden, dtype=dtype, device="cuda")
    return LayerWeights(
        qkv=weight((shape.num_q_heads + 2 * shape.num_kv_heads) * shape.head_dim, hidden),
        out=weight(hidden, hidden),
        gate_up=weight(2 * inner, hidden),
        down=weight(hidden, inner),
        norms=(ones, ones.clone()),
    )


def layer(
    x: torch.Tensor, weights: LayerWeights, shape: DecodeShape, attend: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """x [batch_size, hidden] -> alike. attend: q [batch_size, Hq, d] -> out alike."""
    from torch.nn.functional import linear, rms_norm, silu

    hidden = x.shape[1]
    qkv = linear(rms_norm(x, (hidden,), weights.norms[0], NORM_EPSILON), weights.qkv)
    q = qkv[:, :hidden].reshape(len(x), shape.num_q_heads, shape.head_dim).contiguous()
    x = x + linear(attend(q).reshape(len(x), hidden), weights.out)
    gate, up = linear(rms_norm(x, (hidden,), weights.norms[1], NORM_EPSILON), weights.gate_up).chunk(2, dim=-1)
    return x + linear(silu(gate) * up, weights.down)


def measure_layers(bench: Bench, engines: EngineSet, trace: Trace, *, label: str) -> dict[str, object]:
    """Kernel time of attention, of the layer around it and of both, on the trace's middle step, per engine."""
    import torch
    from serving.run import TracePages

    pages = TracePages(bench, engines, trace, rotate=True)
    steps = list(trace.iter_steps())
    step: StepInputs = pages.step(bench, engines, steps[len(steps) // 2])
    weights = make_weights(engines.shape, bench.pool.flat.dtype)
    x = torch.randn(len(step.q), weights.out.shape[0], device="cuda").to(step.q.dtype)
    out = torch.empty_like(step.q)
    repeats = max(3, bench.repeats)
    rest = graph_time_us(lambda _: layer(x, weights, engines.shape, lambda q: q), variants=1, repeats=repeats)
    record: dict[str, object] = {
        "label": label,
        "family": trace.family,
        "seed": trace.seed,
        "rows": len(step.q),
        "weight_bytes": weights.num_bytes,
        "rest_us": rest.median_us,
        "engines": {},
    }
    for name, engine in engines.engines.items():
        with shared_stream():
            engine.plan(step)
            engine.run(step, *pages.caches[0], out)

        def attend(q: torch.Tensor, cache: int) -> torch.Tensor:
            engine.run(step, *pages.caches[cache], out)  # reads the step's own q, of the same shape and values' range
            return out

        def whole(index: int) -> None:
            layer(x, weights, engines.shape, lambda q: attend(q, index))

        alone = graph_time_us(
            lambda i: engine.run(step, *pages.caches[i], out), variants=len(pages.caches), repeats=repeats
        )
        both = graph_time_us(whole, variants=len(pages.caches), repeats=repeats)
        record["engines"][name] = {"attention_us": alone.median_us, "layer_us": both.median_us}
    return record


def layers_table(records: list[dict], num_layers: int = 32) -> Table:
    """One line per run and engine; the model is num_layers such layers."""
    rows = []
    for record in records:
        for name, times in record["engines"].items():
            step_ms = times["layer_us"] * num_layers / 1e3
            rows.append(
                (
                    f"{record['label']} {record['family']}",
                    name,
                    us(times["attention_us"]),
                    us(times["layer_us"]),
                    f"{times['attention_us'] / times['layer_us']:.0%}",
                    f"{step_ms:.2f}",
                    f"{record['rows'] / step_ms * 1e3:.0f}",
                )
            )
    note = (
        f"In CUDA graphs, KV cold; {records[0]['weight_bytes'] / 1e6:.0f} MB of weights a layer, "
        f"of which the layer without attention takes {us(records[0]['rest_us'])} us in the first run."
    )
    return Table(
        f"attention in a Llama-3-8B-like layer, {num_layers} layers",
        ("run", "engine", "attention us", "layer us", "attention share", "model ms", "tokens/s"),
        tuple(rows),
        note,
    )
