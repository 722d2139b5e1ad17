"""RoPE of pkvsim.reference.append, and the kernel's arithmetic of turns."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvsim.reference.append import rotate
from pkvsim.reference.rope import ROPE_STYLES, Rope, make_cos_sin, turns_per_position

INV_FREQ = 10000.0 ** (-np.arange(16) / 16)


@settings(max_examples=60, deadline=None)
@given(
    style=st.sampled_from(ROPE_STYLES),
    dim=st.sampled_from([32, 48, 128]),
    seed=st.integers(0, 2**32 - 1),
    positions=st.lists(st.integers(0, 2**20), min_size=1, max_size=4),
    shift=st.integers(0, 2**20),
)
def test_rope_turns_pairs_and_scores_depend_on_distance(style, dim, seed, positions, shift) -> None:
    rng = np.random.default_rng(seed)
    rope = Rope(style=style, inv_freq=INV_FREQ)  # rotary_dim 32
    position = np.array(positions)
    q, k = rng.standard_normal((2, len(position), 2, dim))
    turned = rotate(q, position, rope)
    np.testing.assert_array_equal(turned[..., 32:], q[..., 32:])
    first, second = (
        (np.arange(16), np.arange(16, 32)) if style == "half" else (np.arange(0, 32, 2), np.arange(1, 32, 2))
    )
    as_complex = (q[..., first] + 1j * q[..., second]) * np.exp(1j * position[:, None, None] * INV_FREQ)
    np.testing.assert_allclose(turned[..., first] + 1j * turned[..., second], as_complex, atol=1e-9)
    here = rotate(q, position + 5, rope) * rotate(k, position, rope)
    there = rotate(q, position + shift + 5, rope) * rotate(k, position + shift, rope)
    np.testing.assert_allclose(here.sum(-1), there.sum(-1), atol=1e-6)


def test_styles_differ_by_the_order_of_elements_alone() -> None:
    x = np.random.default_rng(0).standard_normal((3, 2, 32))
    order = np.arange(32).reshape(2, 16).T.ravel()  # 0, 16, 1, 17, ..: halves interleaved
    position = np.array([1, 100, 7000])
    half = rotate(x, position, Rope(style="half", inv_freq=INV_FREQ))
    interleaved = rotate(x[..., order], position, Rope(style="interleaved", inv_freq=INV_FREQ))
    np.testing.assert_array_equal(half[..., order], interleaved)


def test_tables_and_frequencies_agree() -> None:
    x = np.random.default_rng(0).standard_normal((4, 2, 32))
    position = np.array([0, 1, 77, 4095])
    table = Rope(style="half", cos_sin=make_cos_sin(INV_FREQ, 4096, factor=1.25))
    frequencies = Rope(style="half", inv_freq=INV_FREQ, factor=1.25)
    np.testing.assert_allclose(rotate(x, position, table), rotate(x, position, frequencies), atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(frequency=st.floats(1e-9, 10.0), position=st.integers(0, 2**31 - 1))
def test_turns_overflow_into_the_right_angle(frequency: float, position: int) -> None:
    """The kernel's arithmetic: a 64-bit product, its high half in half turns, sines of that."""
    product = (int(turns_per_position(np.array([frequency]))[0]) * position) % 2**64
    high = product >> 32
    angle = (high - 2**32 if high >= 2**31 else high) * 2.0**-31 * np.pi
    exact = frequency * position  # float64, good to about 1e-16 of it
    assert abs(np.exp(1j * angle) - np.exp(1j * exact)) < 2e-9 + 1e-15 * exact


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"style": "llama", "inv_freq": INV_FREQ}, "style"),
        ({"style": "half"}, "exactly one"),
        ({"style": "half", "inv_freq": INV_FREQ, "cos_sin": make_cos_sin(INV_FREQ, 4)}, "exactly one"),
        ({"style": "half", "inv_freq": INV_FREQ[:5]}, "multiples of 16"),
        ({"style": "half", "cos_sin": INV_FREQ}, "cos_sin"),
        ({"style": "half", "inv_freq": 1.0}, "inv_freq"),
        ({"style": "half", "inv_freq": INV_FREQ, "factor": np.inf}, "factor"),
        ({"style": "half", "cos_sin": make_cos_sin(INV_FREQ, 4), "factor": 2.0}, "factor"),
    ],
)
def test_a_bad_rope_is_named(fields: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Rope(**fields)
