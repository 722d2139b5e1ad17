"""A heap of (key, slot) in two arrays, as the compiled event loop needs it."""
from __future__ import annotations

import numpy as np

from pkvsim.compiled import inner


@inner
def push(keys: np.ndarray, slots: np.ndarray, size: int, key: float, slot: int) -> None:
    """Adds to a heap of `size` entries, least key first; equal keys in the order of slots."""
    place = size
    while place > 0:
        parent = (place - 1) // 2
        if keys[parent] < key or (keys[parent] == key and slots[parent] < slot):
            break
        keys[place] = keys[parent]
        slots[place] = slots[parent]
        place = parent
    keys[place] = key
    slots[place] = slot


@inner
def pop(keys: np.ndarray, slots: np.ndarray, size: int) -> int:
    """Takes the least entry off a heap of `size` entries and returns its slot."""
    first = slots[0]
    size -= 1
    place = 0
    # Down to a leaf along the lesser children, chosen without a branch, which no predictor would guess; then the last
    # entry moves up from there, seldom far.
    while 2 * place + 2 < size:
        child = 2 * place + 1
        less = keys[child + 1] < keys[child]
        same = keys[child + 1] == keys[child]
        child += less | (same & (slots[child + 1] < slots[child]))
        keys[place] = keys[child]
        slots[place] = slots[child]
        place = child
    if 2 * place + 1 < size:
        child = 2 * place + 1
        keys[place] = keys[child]
        slots[place] = slots[child]
        place = child
    push(keys, slots, place, keys[size], slots[size])
    return first
