"""Layers that keep a state of constant size instead of a cache: gated delta nets, Kimi's delta attention, Mamba-2.

A state's FLOPs per token count its decay, its update and its reading: of a delta rule S <- a S + b k (v - S^T k)^T,
o = S^T q (arXiv 2412.06464, 2510.26692) 7 per element, of S <- a S + dt B x^T, y = C S (arXiv 2405.21060) 5.
"""
from __future__ import annotations

from dataclasses import dataclass

from pkvsim.models.families.attention import Split
from pkvsim.models.model_spec import STATE, AttentionSpec
from pkvsim.models.modules import ATTENTION, FIXED, Module

DELTA_FLOPS, MAMBA_FLOPS = 7, 5


def _module(name: str, rows: int, columns: int, share: float, vector: int = 0, linear: bool = True) -> Module:
    return Module(
        name=name, part=ATTENTION, out_features=rows, in_features=columns, vector=vector, share=share, linear=linear
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaSizes:
    """A gated delta net (Qwen3-Next, Qwen3.5) of the whole model."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_kernel: int
    state_element_bytes: int
    conv_element_bytes: int


def gated_delta(
    split: Split, layer: str, hidden: int, s: DeltaSizes, *, fused: bool
) -> tuple[AttentionSpec, list[Module]]:
    """`fused`: checkpoints with in_proj_qkvz and in_proj_ba in place of four projections."""
    split.heads(s.key_heads, "key heads of linear attention")
    local_values, one = split.heads(s.value_heads, "value heads of linear attention"), 1 / split.parallel
    values = s.value_heads * s.value_dim
    channels = 2 * s.key_heads * s.key_dim + values
    if fused:
        projections = [("in_proj_qkvz", channels + values), ("in_proj_ba", 2 * s.value_heads)]
    else:
        projections = [
            ("in_proj_qkv", channels), ("in_proj_z", values),
            ("in_proj_b", s.value_heads), ("in_proj_a", s.value_heads),
        ]  # fmt: skip
    modules = [_module(f"{layer}.{name}", rows, hidden, one) for name, rows in projections]
    modules += [
        _module(f"{layer}.out_proj", hidden, values, one),
        _module(f"{layer}.conv1d", channels, s.conv_kernel, one, 2 * s.value_heads, linear=False),
        Module(name=f"{layer}.norm", part=FIXED, vector=s.value_dim),
    ]
    state = local_values * s.key_dim * s.value_dim
    conv = channels // split.parallel * (s.conv_kernel - 1)
    return _state(state, s.state_element_bytes, conv * s.conv_element_bytes, DELTA_FLOPS), modules


@dataclass(frozen=True, slots=True, kw_only=True)
class KimiDeltaSizes:
    """Kimi delta attention (Kimi Linear, arXiv 2510.26692), of the whole model."""

    num_heads: int
    head_dim: int
    conv_kernel: int
    full_rank_gate: bool
    conv_element_bytes: int


def kimi_delta(split: Split, layer: str, hidden: int, s: KimiDeltaSizes) -> tuple[AttentionSpec, list[Module]]:
    """The state is kept in float32."""
    local, one = split.heads(s.num_heads, "heads of linear attention"), 1 / split.parallel
    width = s.num_heads * s.head_dim
    modules = [_module(f"{layer}.{name}", width, hidden, one) for name in ("q_proj", "k_proj", "v_proj")]
    modules += [
        _module(f"{layer}.f_a_proj", s.head_dim, hidden, 1.0),
        _module(f"{layer}.f_b_proj", width, s.head_dim, one),
        _module(f"{layer}.b_proj", s.num_heads, hidden, one),
        _module(f"{layer}.o_proj", hidden, width, one),
        _module(f"{layer}.conv1d", 3 * width, s.conv_kernel, one, width + s.num_heads, linear=False),
        Module(name=f"{layer}.o_norm", part=FIXED, vector=s.head_dim),
    ]
    if s.full_rank_gate:
        modules.append(_module(f"{layer}.g_proj", width, hidden, one))
    else:
        modules.append(_module(f"{layer}.g_a_proj", s.head_dim, hidden, 1.0))
        modules.append(_module(f"{layer}.g_b_proj", width, s.head_dim, one))
    conv = 3 * width // split.parallel * (s.conv_kernel - 1)
    return _state(local * s.head_dim**2, 4, conv * s.conv_element_bytes, DELTA_FLOPS), modules


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaSizes:
    """A Mamba-2 mixer (arXiv 2405.21060), of the whole model."""

    num_heads: int
    head_dim: int
    groups: int
    state_size: int
    conv_kernel: int
    conv_bias: bool
    bias: bool
    state_element_bytes: int
    conv_element_bytes: int


def mamba2(split: Split, layer: str, hidden: int, s: MambaSizes) -> tuple[AttentionSpec, list[Module]]:
    """Groups are on several GPUs where there are fewer of them than GPUs."""
    local, one = split.heads(s.num_heads, "Mamba heads"), 1 / split.parallel
    inner, group_width = s.num_heads * s.head_dim, 2 * s.groups * s.state_size
    local_groups = max(1, s.groups // split.parallel)
    channels = inner + group_width
    local_channels = inner // split.parallel + 2 * local_groups * s.state_size
    rows = inner + channels + s.num_heads
    local_rows = inner // split.parallel + local_channels + local
    share, conv_share = local_rows / rows, local_channels / channels
    modules = [
        _module(f"{layer}.in_proj", rows, hidden, share, rows * s.bias),
        _module(f"{layer}.out_proj", hidden, inner, one, hidden * s.bias),
        _module(f"{layer}.conv1d", channels, s.conv_kernel, conv_share, channels * s.conv_bias, linear=False),
        _module(f"{layer}.A_log", 0, 0, one, 3 * s.num_heads),
        _module(f"{layer}.norm", 0, 0, one, inner),
    ]
    conv = local_channels * (s.conv_kernel - 1) * s.conv_element_bytes
    return _state(local * s.head_dim * s.state_size, s.state_element_bytes, conv, MAMBA_FLOPS), modules


def _state(elements: int, element_bytes: int, conv_bytes: int, flops: int) -> AttentionSpec:
    return AttentionSpec(kind=STATE, state_bytes=elements * element_bytes + conv_bytes, state_flops=flops * elements)
