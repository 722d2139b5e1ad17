"""Checks of what callers of a tiered cache pass: keys of blocks and numbers of pages."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpu.cache.tiers.disks.disk_files import MAX_KEY_BYTES, check_key


def check_keys(keys: Sequence[bytes], *, once: bool = False) -> None:
    """ValueError unless every key is bytes of a length that disks note; once: and no two of them are equal."""
    kinds = set(map(type, keys))  # of thousands of keys: no Python between them
    if kinds - {bytes} or not set(map(len, keys)) <= set(range(1, MAX_KEY_BYTES + 1)):
        for key in keys:
            check_key(key)
    if once and len(set(keys)) < len(keys):
        raise ValueError("keys: expected each once")


def check_pages(pages: Sequence[int] | np.ndarray, num_pages: int, *, once: bool = False) -> np.ndarray:
    """The pages as int32 [n]. ValueError unless they are integers in [0, num_pages): 2^32 is not page 0, nor 1.5 page
    1; once: and no two of them are equal."""
    try:
        array = np.asarray(pages)
    except (TypeError, ValueError) as error:  # such as an array of a GPU, or lists of unlike lengths
        raise ValueError(f"pages: expected integers [n] on the host: {error}") from error
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"pages: expected integers [n], got {array.dtype} {list(array.shape)}")
    if array.size and not 0 <= array.min() <= array.max() < num_pages:
        raise ValueError(f"pages: expected [n] in [0, {num_pages}), got {array.min()} to {array.max()}")
    if once and len(np.unique(array)) < len(array):
        raise ValueError("pages: expected each once")
    return array.astype(np.int32)
