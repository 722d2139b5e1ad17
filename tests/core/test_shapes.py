"""Shapes and step states refuse what they cannot be, and say which argument it was."""
import dataclasses

import numpy as np
import pytest

from pkvsim import DecodeShape, StepState

SHAPE = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)


def test_group_size_and_frozen():
    assert SHAPE.group_size == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        SHAPE.head_dim = 64


@pytest.mark.parametrize("name", ["num_q_heads", "num_kv_heads", "head_dim", "page_size"])
@pytest.mark.parametrize("bad", [0, -1, 2.0, True, "8", None, 2**31])
def test_shape_names_the_bad_field(name, bad):
    good = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "page_size": 16}
    with pytest.raises(ValueError, match=rf"^{name}: expected an integer in .* got "):
        DecodeShape(**{**good, name: bad})


def test_heads_must_divide():
    with pytest.raises(ValueError, match="num_q_heads: expected a multiple of num_kv_heads = 3, got 32"):
        DecodeShape(32, 3, 128, 16)


@pytest.mark.parametrize(
    ("lens", "message"),
    [
        ([1.5], r"seq_lens: expected integers \[batch_size\], got float64 \[1\]"),
        ([[1, 2]], r"seq_lens: expected integers \[batch_size\], got int64 \[1, 2\]"),
        ([3, -4], r"seq_lens\[1\]: expected a length in .*, got -4"),
        ([2**31], r"seq_lens\[0\]: expected a length in .*, got 2147483648"),
        ([[1], [1, 2]], r"seq_lens: expected integers \[batch_size\] on the host, got setting an array element"),
    ],
)
def test_seq_lens(lens, message):
    with pytest.raises(ValueError, match=message):
        StepState(lens)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
@pytest.mark.parametrize("far", [2**31, 2**32, 2**32 + 1, 2**63 - 1])
def test_an_id_past_31_bits_is_no_page(dtype, far):
    """Cut to 32 bits it would be page 0, 1 or -1."""
    step = StepState([16], np.array([[far]], dtype))
    with pytest.raises(ValueError, match=r"block_table\[0, 0\]: expected a page id in \[0, 4\)"):
        step.check_pages(SHAPE, num_pages=4)


def test_small_unsigned_ids_are_themselves():
    assert StepState([16], np.array([[200]], np.uint8)).block_table.tolist() == [[200]]


def test_step_state_converts_and_checks_pages():
    step = StepState([0, 17], [[7, 7], [2, 3]])
    assert step.seq_lens.dtype == step.block_table.dtype == np.int32
    step.check_pages(SHAPE, num_pages=4)  # row 0 owns no page, so its 7s do not matter
    with pytest.raises(ValueError, match=r"block_table\[1, 1\]: expected a page id in \[0, 3\), got 3"):
        step.check_pages(SHAPE, num_pages=3)
    with pytest.raises(ValueError, match=r"block_table: expected int32 \[2, >=3\], got int32 \[2, 2\]"):
        StepState([0, 33], [[0, 0], [2, 3]]).check_pages(SHAPE)
    with pytest.raises(ValueError, match=r"block_table: expected int32 \[2, max_pages\], got int64 \[1, 2\]"):
        StepState([0, 17], [[0, 0]])
    with pytest.raises(ValueError, match="block_table: expected .* got None"):
        StepState([4]).check_pages(SHAPE)
