"""Steps 2 to 4 of the rule in `prefixes`, compiled: groups of rows in the order of their strings of ids."""
from __future__ import annotations

import numpy as np

from pkvsim.compiled import compiled, inner


@inner
def _pays(members, prefix_tokens, tokens_per_member):
    """SharingRule.pays."""
    return members >= 2 and (members - 1) * prefix_tokens > tokens_per_member * members


@inner
def _depth(common, begin, end):
    """The depth that saves the most in a tree whose neighbours have common[begin:end] in common, among equals the
    greatest."""
    best, most, tried = 0, 0, 0
    for at in range(begin, end):
        depth = common[at]
        if depth == tried or depth * (end - begin) < most:
            continue
        tried, joined = depth, 0  # rows - components is the edges that are left
        for edge in range(begin, end):
            joined += common[edge] >= depth
        if depth * joined > most or (depth * joined == most and depth > best):
            best, most = depth, depth * joined
    return best


@compiled
def group_sorted(
    common: np.ndarray,  # [rows - 1] int64, leading ids that neighbours have in common
    id_tokens: int,  # tokens that an id stands for
    tokens_per_member: int,  # as SharingRule has them
    least_tokens: int,
    group_of: np.ndarray,  # [rows] int64, out: the group of each, -1 for none
    prefix_of: np.ndarray,  # [rows] int64, out: ids that all rows of each group have in common
) -> int:
    """How many groups there are."""
    groups, rows, begin, saved = 0, len(group_of), 0, 0
    while begin < rows:
        end, of_all = begin + 1, np.int64(2**62)
        while end < rows and common[end - 1] >= 1:
            of_all = min(of_all, common[end - 1])
            end += 1
        if end == begin + 1:
            group_of[begin] = -1
            begin = end
            continue
        depth = _depth(common, begin, end - 1)
        left, first = 0, begin
        while first < end:  # components
            last, least = first + 1, np.int64(2**62)
            while last < end and common[last - 1] >= depth:
                least = min(least, common[last - 1])
                last += 1
            together = last > first + 1 and _pays(last - first, least * id_tokens, tokens_per_member)
            group_of[first:last] = groups if together else -1
            if together:
                prefix_of[groups] = least
                saved += (last - first - 1) * least * id_tokens
                groups += 1
            else:
                left += last - first
            first = last
        if _pays(left, of_all * id_tokens, tokens_per_member):
            for row in range(begin, end):
                if group_of[row] < 0:
                    group_of[row] = groups
            prefix_of[groups] = of_all
            saved += (left - 1) * of_all * id_tokens
            groups += 1
        begin = end
    if saved > least_tokens:  # SharingRule.worth
        return groups
    group_of[:] = -1
    return 0
