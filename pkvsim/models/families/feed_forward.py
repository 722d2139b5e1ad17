"""The feed-forward part of one layer: a dense MLP, or routed experts with what stands beside them."""
from __future__ import annotations

from dataclasses import dataclass

from pkvsim.models.families.attention import Split
from pkvsim.models.model_spec import DENSE, MOE, FeedForwardSpec
from pkvsim.models.modules import EXPERT, FIXED, MLP, Module

GATED, PLAIN, NUMBERED = ("gate_proj", "up_proj", "down_proj"), ("up_proj", "down_proj"), ("w1", "w3", "w2")


def _matrices(
    layer: str, names: tuple[str, ...], hidden: int, width: int, part: str, share: float, bias: bool = False
) -> list[Module]:
    """The matrices into a hidden layer of `width`, then the one out of it."""
    inner = [
        Module(
            name=f"{layer}.{name}", part=part, out_features=width, in_features=hidden, vector=width * bias, share=share
        )
        for name in names[:-1]
    ]
    outer = Module(
        name=f"{layer}.{names[-1]}", part=part, out_features=hidden, in_features=width, vector=hidden * bias,
        share=share,
    )  # fmt: skip
    return [*inner, outer]


def dense(
    split: Split, layer: str, hidden: int, width: int, *, names: tuple[str, ...] = GATED, bias: bool = False
) -> tuple[FeedForwardSpec, list[Module]]:
    """`layer`: the name that the MLP's modules begin with."""
    modules = _matrices(layer, names, hidden, width, MLP, 1 / split.parallel, bias)
    return FeedForwardSpec(kind=DENSE, intermediate_size=width), modules


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Routed experts of a layer and what every token passes through beside them, of the whole model."""

    count: int
    per_token: int
    width: int
    shared_width: int = 0  # of all shared experts together; 0: none
    shared_name: str = "shared_experts"
    shared_gate: bool = False  # the shared expert is weighted by a number from a row of its own
    router: str = "gate"
    router_bias: bool = False
    bias: bool = False  # of every expert's matrices
    names: tuple[str, ...] = GATED
    shared_names: tuple[str, ...] = GATED
    latent: int = 0  # width between a shared down and up projection in which the experts work; 0: the hidden size
    latent_names: tuple[str, str] = ("fc1_latent_proj", "fc2_latent_proj")
    latent_norm: bool = False
    latent_linear: bool = True  # False: no method quantises the two projections


def moe(split: Split, layer: str, hidden: int, e: Experts) -> tuple[FeedForwardSpec, list[Module]]:
    """Every expert is split over the GPUs, the router is whole on each. The expert named 0 stands for all."""
    one, width = 1 / split.parallel, e.latent or hidden
    modules = _matrices(f"{layer}.experts.0", e.names, width, e.width, EXPERT, one, e.bias)
    modules.append(
        Module(
            name=f"{layer}.{e.router}", part=FIXED, out_features=e.count, in_features=hidden,
            vector=e.count * e.router_bias, linear=False,
        )
    )
    if e.shared_width:
        modules += _matrices(f"{layer}.{e.shared_name}", e.shared_names, hidden, e.shared_width, MLP, one)
    if e.shared_gate:
        modules.append(
            Module(name=f"{layer}.shared_expert_gate", part=FIXED, out_features=1, in_features=hidden, linear=False)
        )
    if e.latent:
        down, up = e.latent_names
        modules += [
            Module(
                name=f"{layer}.{down}", part=MLP, out_features=e.latent, in_features=hidden, linear=e.latent_linear
            ),
            Module(name=f"{layer}.{up}", part=MLP, out_features=hidden, in_features=e.latent, linear=e.latent_linear),
            Module(name=f"{layer}.latent_norm", part=FIXED, vector=e.latent * e.latent_norm),
        ]
    spec = FeedForwardSpec(
        kind=MOE, intermediate_size=e.shared_width, num_experts=e.count, experts_per_token=e.per_token,
        expert_intermediate_size=e.width,
    )  # fmt: skip
    return spec, modules
