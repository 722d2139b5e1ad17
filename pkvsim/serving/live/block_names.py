"""Numbers of prompts' blocks, by what they hold and all that is before it."""
from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


class BlockNames:
    """Blocks of a page of tokens, numbered densely as they are first met."""

    __slots__ = ("_page_size", "_digests", "_number_of")

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._digests: list[bytes] = []
        self._number_of: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._digests)

    def digests_of(self, tokens: np.ndarray) -> list[bytes]:
        """A name for each page of tokens [whole pages] that tells it and all before it."""
        page_size, digests, last = self._page_size, [], b""
        tokens = np.ascontiguousarray(tokens, np.int32)
        for begin in range(0, len(tokens), page_size):
            last = hashlib.blake2b(last + tokens[begin : begin + page_size].tobytes(), digest_size=16).digest()
            digests.append(last)
        return digests

    def numbers_of(self, digests: Sequence[bytes]) -> list[int]:
        """Their numbers, new ones for those that have none."""
        for digest in digests:
            if digest not in self._number_of:
                self._number_of[digest] = len(self._digests)
                self._digests.append(digest)
        return [self._number_of[digest] for digest in digests]

    def keep(self, kept: Sequence[int]) -> None:
        """Block kept[i] is block i from now on; the others have no number."""
        self._digests = [self._digests[block] for block in kept]
        self._number_of = {digest: block for block, digest in enumerate(self._digests)}
