"""Who runs first of those that wait. A rank each, the least first; ties go as they were sent.

fcfs       first come, first served: all ranks are equal.
shortest   shortest remaining first, by output tokens left, which the simulator knows: what predictors of the output
           length aim at ("Efficient LLM Scheduling by Learning to Rank", arXiv 2408.15792; TRAIL, arXiv 2410.01035).
batchllm   BatchLLM (arXiv 2412.03594): requests that share a prefix run together, and of these groups the ones with
           more output per prompt token first, so that their decoding mixes with later prefill. The prefix tree is made
           one of single prefixes so that the most tokens are saved. Its larger batches are max_batch's matter.
kvshare    KVShare's cache-aware scheduler (arXiv 2503.16525): the largest part of the prompt in the prefix cache first.
           Which part that is changes with the cache, so it is looked up at each admission.
continuum  Continuum (arXiv 2511.02230): programs (conversations) first come, first served, whatever turn they are at;
           and the KV of a turn stays for kv_ttl_s for the next one.
"""
from __future__ import annotations

import numpy as np

from pkvsim.traces.requests import RequestTrace

ORDERS = ("fcfs", "shortest", "batchllm", "kvshare", "continuum")
FCFS, SHORTEST, BATCHLLM, KVSHARE, CONTINUUM = range(len(ORDERS))


def ranks(trace: RequestTrace, order: str) -> np.ndarray:
    """Each request's rank before any has run, float64 [n]."""
    if order == "shortest":
        return trace.output_tokens.astype(np.float64)
    if order == "batchllm":
        return batchllm_ranks(trace)
    if order == "continuum":
        return program_ranks(trace)
    return np.zeros(len(trace))


def program_ranks(trace: RequestTrace) -> np.ndarray:
    """The place in the trace of the first request of each one's program: its session, else the chain it follows."""
    first = np.arange(len(trace))
    if trace.session is not None:
        sessions, begins, inverse = np.unique(trace.session, return_index=True, return_inverse=True)
        first = np.where(trace.session >= 0, begins[inverse], first)
    elif trace.after is not None:
        for request in np.flatnonzero(trace.after >= 0):
            first[request] = first[trace.after[request]]
    return first.astype(np.float64)


def batchllm_ranks(trace: RequestTrace) -> np.ndarray:
    """Groups of a common prefix one after the other, by output over computed prompt tokens, descending."""
    group, shared = prefix_groups(trace)
    prompt = np.bincount(group, trace.prompt_tokens)
    saved = (np.bincount(group) - 1) * shared  # tokens of the prefix, computed once
    ratio = np.bincount(group, trace.output_tokens) / np.maximum(prompt - saved, 1)
    place = np.empty(len(ratio))
    place[np.argsort(-ratio, kind="stable")] = np.arange(len(ratio))
    return place[group]


def prefix_groups(trace: RequestTrace) -> tuple[np.ndarray, np.ndarray]:
    """(group of each request int64 [n], prefix tokens that a group shares int64 [groups]), groups by first request.

    A group is a subtree of the tree of prompt blocks, so that all of it shares the prefix down to the subtree's root;
    of all cuts into subtrees, the one that computes the fewest prompt tokens.
    """
    n = len(trace)
    if trace.block_hashes is None or trace.block_offsets is None:
        return np.arange(n), np.zeros(n, np.int64)
    nodes, ids = np.unique(trace.block_hashes, return_inverse=True)
    offsets = trace.block_offsets
    parent = np.full(len(nodes), -1)
    depth = np.zeros(len(nodes), np.int64)  # tokens from the root down to the end of a node
    leaf = np.full(n, -1)
    for request in range(n):
        path = ids[offsets[request] : offsets[request + 1]]
        parent[path[1:]] = path[:-1]
        depth[path] = np.minimum(np.arange(1, len(path) + 1) * trace.block_tokens, trace.prompt_tokens[request])
        leaf[request] = path[-1]
    requests = np.bincount(leaf, minlength=len(nodes))  # that end in the subtree of a node
    below = np.zeros(len(nodes), np.int64)  # the most tokens that its children's subtrees save
    whole = np.zeros(len(nodes), bool)  # whether the subtree is one group
    order = np.argsort(-depth, kind="stable")
    for node in order.tolist():
        one = (requests[node] - 1) * depth[node]
        whole[node] = one >= below[node]
        if parent[node] >= 0:
            requests[parent[node]] += requests[node]
            below[parent[node]] += max(one, below[node])
    root = np.full(len(nodes), -1)  # the uppermost whole node on the way down to each
    for node in order[::-1].tolist():
        above = root[parent[node]] if parent[node] >= 0 else -1
        root[node] = above if above >= 0 else node if whole[node] else -1
    own = np.where(root[leaf] >= 0, root[leaf], len(nodes) + np.arange(n))
    _, first, group = np.unique(own, return_index=True, return_inverse=True)
    place = np.empty(len(first), np.int64)
    by_first = np.argsort(first)
    place[by_first] = np.arange(len(first))
    tops = own[first[by_first]]
    return place[group], np.where(tops < len(nodes), depth[np.minimum(tops, len(nodes) - 1)], 0)
