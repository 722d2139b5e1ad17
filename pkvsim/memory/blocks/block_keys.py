"""Names of a prompt's blocks by their tokens: what the live scheduler, tiers and directories on disks know them by.

Equal keys are equal tokens from the prompt's start on. That these are equal KV as well is for whoever keeps them to see
to: a scheduler has one model's pages, and a pool notes beside its directories which model, type and layout they are of.
Directories hold these bytes: another hash, or other bytes hashed, would be another format of theirs.
"""
from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

TOKEN_BYTES = 8  # hashed of each token, whatever type it comes in


def block_keys(tokens: Sequence[int] | np.ndarray, page_size: int) -> list[bytes]:
    """A key for each whole block of page_size tokens from the prompt's start, SHA-256 over all tokens up to its end."""
    block_bytes = page_size * TOKEN_BYTES
    hashed = memoryview(np.ascontiguousarray(tokens, "<i8").tobytes())
    digest, keys = hashlib.sha256(), []
    for begin in range(0, len(hashed) // block_bytes * block_bytes, block_bytes):
        digest.update(hashed[begin : begin + block_bytes])
        keys.append(digest.digest())
    return keys
