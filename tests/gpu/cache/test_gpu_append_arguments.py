"""What CacheWriter refuses, by name and before any launch."""
from __future__ import annotations

import pytest
import torch
from append_ref import SHAPES, assert_same_bits, expected, inv_freq, make_step

from gpu import CacheWriter
from pkvsim.reference.rope import Rope, make_cos_sin

BAD = {
    "k_new dtype": ("k_new", lambda a: a | {"k_new": a["k_new"].float()}),
    "fewer tokens than v_new": ("v_new", lambda a: a | {"k_new": a["k_new"][:3]}),
    "v_new on the host": ("v_new", lambda a: a | {"v_new": a["v_new"].cpu()}),
    "numpy": ("v_new", lambda a: a | {"v_new": a["v_new"].cpu().numpy()}),
    "a list": ("seq_lens", lambda a: a | {"seq_lens": [1, 2, 3]}),
    "k_pages rank": ("k_pages", lambda a: a | {"k_pages": a["k_pages"][0]}),
    "v_pages missing": ("v_pages", lambda a: a | {"v_pages": None}),
    "lengths": ("seq_lens", lambda a: a | {"seq_lens": a["seq_lens"].long()}),
    "q without rope": ("q", lambda a: a | {"q": a["k_new"]}),
    "q_out alone": ("q_out", lambda a: a | {"q_out": a["k_new"]}),
    "k_scale": ("k_scale", lambda a: a | {"k_scale": 2.0}),
    "scales": ("k_token_scales", lambda a: a | {"k_token_scales": a["k_new"]}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    argument, spoil = BAD[name]
    step = make_step(SHAPES[0])
    good = {"k_new": step.k_new, "v_new": step.v_new, "k_pages": step.k_pages, "v_pages": step.v_pages, **step.where()}
    before = step.k_pages.clone()
    writer = CacheWriter(step.shape)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"^{argument}\b"):
            writer.append(**spoil(good))
    torch.cuda.synchronize()
    assert torch.equal(step.k_pages.view(torch.uint8), before.view(torch.uint8)), "nothing may be launched"
    want = expected(step, None, "HND")
    writer.append(**good)  # and the writer is none the worse
    assert_same_bits(step, step.q, want)


@pytest.mark.parametrize("scale", (0.0, -1.0, float("inf"), float("nan"), None, "1"))
def test_bad_scales(scale: object) -> None:
    step = make_step(SHAPES[0], kv_dtype="float8_e4m3fn")
    with pytest.raises(ValueError, match="^k_scale"):
        CacheWriter(step.shape, kv_dtype="float8_e4m3fn").append(
            step.k_new, step.v_new, step.k_pages, step.v_pages, k_scale=scale, **step.where()
        )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "float32"}, "dtype"),
        ({"kv_dtype": "bfloat16"}, "kv_dtype"),
        ({"layout": "HDN"}, "layout"),
        ({"head_dim_v": 100}, "head_dim_v"),
        ({"rope": Rope(style="half", inv_freq=inv_freq(256))}, "rope"),
        ({"rope": Rope(style="half", cos_sin=make_cos_sin(inv_freq(128), 8))}, "cos_sin"),
    ],
)
def test_bad_writers(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        CacheWriter(make_step(SHAPES[0]).shape, **options)
