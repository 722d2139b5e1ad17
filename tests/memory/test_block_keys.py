"""Names of blocks: equal where all tokens up to a block's end are, and the bytes that directories on disks hold."""
import hashlib
import os
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvsim.memory.blocks.block_keys import block_keys

TOKENS = st.lists(st.integers(0, 2), max_size=24)


@given(left=TOKENS, right=TOKENS, page=st.integers(1, 5))
def test_keys_are_equal_where_all_tokens_up_to_a_blocks_end_are(left, right, page):
    keys, others = block_keys(left, page), block_keys(right, page)
    assert len(keys) == len(left) // page
    for at, (key, other) in enumerate(zip(keys, others)):
        assert (key == other) == (left[: (at + 1) * page] == right[: (at + 1) * page])
    assert len(set(keys)) == len(keys)


@given(tokens=st.lists(st.integers(0, 2**31 - 1), max_size=40), page=st.integers(1, 9))
def test_keys_are_sha256_of_the_tokens_in_64_bits(tokens, page):
    wanted = [hashlib.sha256(struct.pack(f"<{end}q", *tokens[:end])).digest()
              for end in range(page, len(tokens) + 1, page)]  # fmt: skip
    for given_as in (tokens, np.array(tokens, np.int32), np.array(tokens, np.int64), np.repeat(tokens, 2)[::2]):
        assert block_keys(given_as, page) == wanted


def test_directories_that_are_written_stay_readable():
    """The bytes that earlier versions wrote for a block of tokens 0 to 15, and for the one behind it."""
    assert [key.hex() for key in block_keys(range(32), 16)] == [
        "f23d672bb9b341f9afa8498423b75deb80e726145969391d4b9392464c2298ee",
        "bcc9bcfc670935c6018dc26a74956a373b655f8930dd55ab074d816d7d233780",
    ]


@pytest.mark.parametrize("page", [1, 16])
def test_no_block_is_named_by_less_than_a_page(page):
    assert block_keys([], page) == [] and block_keys(np.zeros(page - 1, np.int32), page) == []
    assert block_keys(np.frombuffer(os.urandom(4 * page), np.uint32), page)
