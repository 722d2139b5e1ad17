"""Numbers of prompts' blocks, by the keys that tell what they hold and all that is before it."""
from __future__ import annotations

from collections.abc import Sequence


class BlockNumbers:
    """Blocks numbered densely as they are first met."""

    __slots__ = ("_keys", "_number_of")

    def __init__(self) -> None:
        self._keys: list[bytes] = []
        self._number_of: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def numbers_of(self, keys: Sequence[bytes]) -> list[int]:
        """Their numbers, new ones for those that have none."""
        for key in keys:
            if key not in self._number_of:
                self._number_of[key] = len(self._keys)
                self._keys.append(key)
        return [self._number_of[key] for key in keys]

    def keep(self, kept: Sequence[int]) -> None:
        """Block kept[i] is block i from now on; the others have no number."""
        self._keys = [self._keys[block] for block in kept]
        self._number_of = {key: block for block, key in enumerate(self._keys)}
