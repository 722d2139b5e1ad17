"""The shared blocks of a trace's prompts, numbered as the prefix cache takes them."""
from __future__ import annotations

import numpy as np

from pkvsim.memory.prefix_cache import PromptBlocks
from pkvsim.traces.requests import RequestTrace


def prompt_blocks(trace: RequestTrace, page_size: int, served: np.ndarray) -> PromptBlocks:
    """Numbers a trace's block hashes; the last block of a prompt holds what is left of it.

    served [n] bool: requests that are not rejected; what only the others have has no next request.
    Raises ValueError for a trace without block hashes.
    """
    hashes, offsets = trace.block_hashes, trace.block_offsets
    if hashes is None or offsets is None:
        raise ValueError(f"trace: expected one with block hashes, {trace.name} has none")
    lengths = np.diff(offsets)
    n, total = len(lengths), len(hashes)
    _, first, ids = np.unique(hashes, return_index=True, return_inverse=True)
    request = np.repeat(np.arange(n), lengths)
    depth = np.arange(total) - offsets[:-1][request]
    tokens = np.minimum(trace.block_tokens, trace.prompt_tokens[request] - depth * trace.block_tokens)
    next_request = np.full(total, n, np.int64)
    order = np.argsort(ids, kind="stable")
    order = order[served[request[order]]]
    same = ids[order][1:] == ids[order][:-1]
    next_request[order[:-1][same]] = request[order[1:][same]]
    return PromptBlocks(
        offsets=np.ascontiguousarray(offsets, np.int64),
        ids=ids.astype(np.int32).reshape(-1),
        next_request=next_request,
        tokens=tokens[first].astype(np.int32),
        pages=(-(-tokens[first] // page_size)).astype(np.int32),
    )
