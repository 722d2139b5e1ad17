"""How many cache entries decode queries and chunks of a prompt see, in closed form. Compiled; what
pkvsim.models.model_spec.AttentionSpec counts entry by entry."""
from __future__ import annotations

from pkvsim.compiled import inner, outer
from pkvsim.models.model_spec import CHUNKED, COMPRESSED, FULL, LATENT, NONE, SLIDING, STATE

KIND_CODES = {FULL: 0, LATENT: 0, SLIDING: 1, CHUNKED: 2, COMPRESSED: 3, STATE: 4, NONE: 4}
ALL, LAST, SINCE, COMPRESSED_CODE, NOTHING = range(5)


@inner
def _sum_bounded(count, bound):
    """Sum of min(i, bound) for i = 1 .. count."""
    growing = min(count, bound)
    return growing * (growing + 1) // 2 + (count - growing) * bound


@inner
def _sum_since(count, chunk):
    """Sum of (i - 1) % chunk + 1 for i = 1 .. count."""
    whole, rest = count // chunk, count % chunk
    return whole * (chunk * (chunk + 1) // 2) + rest * (rest + 1) // 2


@inner
def _sum_quotients(count, divisor, bound):
    """Sum of min(i // divisor, bound) for i = 1 .. count."""
    whole = count // divisor  # the quotients 0 .. whole - 1 are complete: divisor times each, but for i = 0
    kept = min(whole, bound + 1)
    total = divisor * (kept * (kept - 1) // 2)
    if kept < whole or whole > bound:
        return total + (count + 1 - kept * divisor) * bound
    return total + (count + 1 - whole * divisor) * whole


@inner
def seen_until(kind, window, selected, per_entry, count):
    """Entries that queries at the contexts 1 .. count see, all together."""
    most = selected if selected > 0 else count + 1
    if kind == NOTHING:
        return 0
    if kind == SINCE:
        return _sum_since(count, window)
    if kind == COMPRESSED_CODE:
        entries = _sum_bounded(count, window)
        return entries + (_sum_quotients(count, per_entry, most) if per_entry > 1 else 0)
    bound = min(window, most) if kind == LAST else most
    return _sum_bounded(count, bound)


@outer
def chunk_pairs(kind, window, selected, per_entry, begin, chunk):
    """(query, entry) pairs of the tokens [begin, begin + chunk) of a prompt; a query sees itself.

    kind: of KIND_CODES. window, selected (0: all) and per_entry (tokens per compressed entry) as in AttentionSpec.
    """
    return seen_until(kind, window, selected, per_entry, begin + chunk) - seen_until(
        kind, window, selected, per_entry, begin
    )


@outer
def index_pairs(per_entry, begin, chunk):
    """(query, entry) pairs that an index scores for the tokens [begin, begin + chunk)."""
    end = begin + chunk
    return _sum_quotients(end, per_entry, end) - _sum_quotients(begin, per_entry, end)


@outer
def entries_read(kind, window, selected, per_entry, context):
    """Entries that a decode query reads once `context` tokens, its own included, are cached."""
    if kind == NOTHING or context == 0:
        return 0
    if kind == SINCE:
        return (context - 1) % window + 1
    most = selected if selected > 0 else context
    if kind == COMPRESSED_CODE:
        return min(context, window) + (min(context // per_entry, most) if per_entry > 1 else 0)
    return min(context, window, most) if kind == LAST else min(context, most)
