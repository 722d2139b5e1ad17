"""Hashes of prompt blocks as traces publish them, made whole: one for every block of every prompt."""
from __future__ import annotations

import numpy as np

MOONCAKE_BLOCK_TOKENS = 512
OTHER_BLOCK_TOKENS = (16, 32, 64, 128, 256, 1024)  # Mooncake's layout as other tools write it; Bailian's is 16


def whole_hashes(
    file: str,
    lines: np.ndarray,  # [n] int64, for messages
    prompt: np.ndarray,  # [n] int64, tokens
    hashes: np.ndarray,  # [total] int64, end to end
    counts: np.ndarray,  # [n] int64, hashes of each prompt
) -> tuple[np.ndarray | None, np.ndarray | None, int, list[str]]:
    """(hashes int64 [blocks of all prompts], offsets int64 [n + 1], tokens per block, notes).

    A prompt with fewer hashes than blocks gets hashes of its own for the rest, which nobody shares. No hashes at
    all give (None, None, 0, []). Raises ValueError for a prompt with more hashes than blocks.
    """
    if not counts.any():
        return None, None, 0, []
    size, blocks = _block_size(prompt, counts)
    many = counts > blocks
    if many.any():
        first = int(np.argmax(many))
        where, expected = f"{file}:{lines[first]}: column hash_ids", f"one per {size} prompt tokens"
        raise ValueError(f"{where}: expected {blocks[first]} of them, {expected}, got {counts[first]}")
    offsets = np.append(0, np.cumsum(blocks))
    notes = [] if size == MOONCAKE_BLOCK_TOKENS else [f"hash_ids taken as one per {size} prompt tokens"]
    missing = int(offsets[-1]) - len(hashes)
    if missing == 0:
        return hashes, offsets, size, notes
    notes.append(
        f"requests with fewer hash_ids than blocks: {int((counts < blocks).sum()):,}; the rest is shared with nobody"
    )
    highest = int(hashes.max())
    if highest > np.iinfo(np.int64).max - missing:
        hashes = np.unique(hashes, return_inverse=True)[1].reshape(-1).astype(np.int64)
        highest = int(hashes.max())
    whole = highest + 1 + np.arange(offsets[-1])
    begins = np.append(0, np.cumsum(counts))[:-1]
    at = np.repeat(offsets[:-1] - begins, counts) + np.arange(len(hashes))
    whole[at] = hashes
    return whole, offsets, size, notes


def _block_size(prompt: np.ndarray, counts: np.ndarray) -> tuple[int, np.ndarray]:
    """The block size (tokens) that explains the most hash counts [n], and the blocks of each prompt [n]."""
    sizes = (MOONCAKE_BLOCK_TOKENS,) + OTHER_BLOCK_TOKENS
    blocks = [-(-prompt // size) for size in sizes]
    whole = [prompt // size for size in sizes]  # some tools hash full blocks alone
    best = max(
        range(len(sizes)),
        key=lambda i: (
            max(int((blocks[i] == counts).sum()), int((whole[i] == counts).sum())),
            bool((counts <= blocks[i]).all()),
        ),
    )
    return sizes[best], blocks[best]
