"""The sums by which a block is known again: what they are, that no flipped bit keeps them, and what else they see."""
from __future__ import annotations

import sys
import threading

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pkvsim.memory.blocks.block_sums import ODD, SUMS, block_sums

WORD, HALF = 2**64, 2**32
blocks_of_bytes = st.binary(min_size=1, max_size=200)


def sums_of(block: bytes) -> tuple[int, int]:
    """By their definition, in Python's integers."""
    words = np.frombuffer(block + bytes(-len(block) % 16), np.uint64).tolist()
    mixed = [word ^ (number * ODD % WORD) for number, word in enumerate(words, 1)]
    products = [(word % HALF) * (word // HALF) for word in mixed]
    return (sum(products[::2]) + sum(words[1::2])) % WORD, (sum(products[1::2]) + sum(words[::2])) % WORD


def found(*blocks: bytes) -> list[tuple[int, int]]:
    array = np.array([list(block) for block in blocks], np.uint8)
    sums = block_sums(array)
    assert sums.shape == (len(blocks), SUMS) and sums.dtype == np.uint64
    return [tuple(row) for row in sums.tolist()]


@given(blocks_of_bytes, st.integers(1, 3))
def test_they_are_what_they_are_said_to_be(block: bytes, count: int) -> None:
    blocks = [block, bytes(len(block)), block[::-1]][:count]
    assert found(*blocks) == [sums_of(one) for one in blocks]


@given(blocks_of_bytes, st.data())
def test_no_flipped_bit_keeps_them(block: bytes, data: st.DataObject) -> None:
    bit = data.draw(st.integers(0, 8 * len(block) - 1))
    other = bytearray(block)
    other[bit // 8] ^= 1 << bit % 8
    before, after = found(block, bytes(other))
    assert before != after


@given(st.lists(st.binary(min_size=8, max_size=8), min_size=2, max_size=20), st.data())
def test_words_that_change_places_are_seen(words: list[bytes], data: st.DataObject) -> None:
    first, second = data.draw(st.permutations(range(len(words))))[:2]
    other = list(words)
    other[first], other[second] = other[second], other[first]
    before, after = found(b"".join(words), b"".join(other))
    assert (before == after) == (words == other)


def test_blocks_of_a_kind_have_sums_of_their_own() -> None:
    """Half written, of zeros, of ones, shifted by a sector: what torn and lost writes leave."""
    rng = np.random.default_rng(0)
    block = rng.integers(0, 256, 4 * 4096, np.uint8).astype(np.uint8)
    kinds = [block, np.zeros_like(block), np.full_like(block, 255), np.roll(block, 512), np.roll(block, 16)]
    kinds += [np.concatenate([block[:at], np.zeros(len(block) - at, np.uint8)]) for at in range(512, len(block), 512)]
    kinds += [np.concatenate([block[:at], block[: len(block) - at]]) for at in range(512, len(block), 512)]
    sums = block_sums(np.array(kinds))
    assert len(np.unique(sums[:, 0])) == len(np.unique(sums[:, 1])) == len(kinds)


def test_an_array_that_is_not_in_one_piece() -> None:
    wide = np.random.default_rng(1).integers(0, 256, (3, 64), np.uint8).astype(np.uint8)
    assert (block_sums(wide[:, :48]) == block_sums(wide[:, :48].copy())).all()


def test_other_threads_run_meanwhile() -> None:
    """With no switch between threads but where one lets go of Python's lock: this must."""
    blocks, began, ended = np.zeros((1, 2**26), np.uint8), threading.Event(), []
    block_sums(blocks[:, :16])  # compiled

    def check() -> None:
        began.set()
        block_sums(blocks)
        ended.append(True)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        for _ in range(50):  # as the operating system may wake this thread late
            began.clear(), ended.clear()
            thread = threading.Thread(target=check)
            thread.start()
            began.wait()
            beside = not ended
            thread.join()
            if beside:
                break
    finally:
        sys.setswitchinterval(interval)
    assert beside
