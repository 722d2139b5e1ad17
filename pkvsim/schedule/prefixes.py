"""Which rows of a step have leading pages in common, found from their block tables; and when reading them once pays.

**The rule of find_prefixes**, which cuda_src/prefixes.cu equals. Row r is a string of page ids: those of its full pages
that all its query tokens see whole, (seq_len - (query_tokens - 1)) // page_size of them. Every id is compared. The
common prefix of rows i and j is written lcp(i, j).
  1. A tree is all rows with the same first id. At depth d it falls into components: rows i and j are in one if lcp(i,
     j) >= d. (lcp(i, k) >= min(lcp(i, j), lcp(j, k)), so this is an equivalence.)
  2. Each tree takes the depth d that saves the most pages were every component read once over d pages: d * (rows -
     components). Among equals the greatest. Only depths that are the lcp of two rows need trying.
  3. A component of two rows or more whose reading together pays becomes a group over all the pages that its rows have
     in common, which may be more than d.
  4. The rows of the tree that are in no group become one over the pages that all rows of the tree have in common, if
     they are two or more and it pays. (Questions on several documents under one system prompt: a group for each
     document, one for the rows that have the system prompt alone.)
  5. Where all groups together save too little for a step that reads together, there are none.
  6. Groups are numbered by their first rows.
One row is in one group: there is one level. It takes O(rows * pages) comparisons beside a sort.
"""
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pkvsim.options import PLAIN, AttentionOptions
from pkvsim.schedule.groups import PrefixGroups
from pkvsim.schedule.prefix_trees import group_sorted
from pkvsim.shapes import MAX_TOKENS, DecodeShape, StepState, check_int

STATE_ELEMENT_BYTES = 4  # float32: acc, m and l of each column
# Of 0 to 500 MB that a step must save, 300 MB were the best of 72 steps of five head shapes on one H200 (bench_shared
# with and without --drawn 64, 2026-11-29): no step that shared was slower than a plain one, and all took 0.4 % more
# than the faster way of each; 12 MB, what a merge of 3 us is worth, 22 % more, and up to 3.2 times a plain step. Rows
# that read for themselves find what others have read in L2, so what is saved is worth a third of its time. Elsewhere
# it is an assumption.
STEP_US = 75.0


class SharingRule(NamedTuple):
    """When reading common prefixes once pays. Of each group (members - 1) * prefix tokens are saved: they must exceed
    tokens_per_member * members, what the members' extra states weigh, and those of all groups of a step least_tokens,
    what such a step takes beside a plain one.

    The defaults are those of 32/8 heads of 128 on an H200 (sharing_rule).
    """

    tokens_per_member: int = 26
    least_tokens: int = 73243

    def pays(self, members: int, prefix_tokens: int) -> bool:
        """Whether so many rows should read a common prefix of so many tokens once, if the step is worth it."""
        return members >= 2 and (members - 1) * prefix_tokens > self.tokens_per_member * members

    def worth(self, saved_tokens: int) -> bool:
        """Whether a step whose groups save so many tokens should read them together."""
        return saved_tokens > self.least_tokens

    def ever_worth(self, rows: int, most_tokens: int) -> bool:
        """Whether so many rows of at most so many tokens could save enough: all but one, all of theirs."""
        return self.worth(max(0, rows - 1) * most_tokens)


def check_rule(rule: object, name: str = "rule") -> SharingRule:
    """`rule` as plain integers. Raises ValueError naming `name` or the field that is none, or out of range."""
    if not isinstance(rule, SharingRule):
        raise ValueError(f"{name}: expected a SharingRule, got {rule!r}")
    named = zip(rule._fields, rule)
    return SharingRule(*(check_int(f"{name}.{field}", value, 0, MAX_TOKENS) for field, value in named))


def sharing_rule(
    shape: DecodeShape,
    *,
    bandwidth_gb_per_s: float,
    step_us: float = STEP_US,
    parts: int = 2,
    options: AttentionOptions = PLAIN,
) -> SharingRule:
    """The rule by bytes, for a GPU that reads so fast.

    step_us: in which memory gives what a step must save that reads together. parts: into how many a read is cut.
    Each member then has parts + 1 states for each KV head that are written and read once more.
    """
    columns = shape.group_size * options.query_tokens
    state = columns * (options.value_dim(shape) + 2) * STATE_ELEMENT_BYTES
    token = options.kv_token_bytes(shape)
    return SharingRule(
        tokens_per_member=int(np.ceil(2 * (parts + 1) * state / token)),
        least_tokens=int(np.ceil(step_us * 1e-6 * bandwidth_gb_per_s * 1e9 / (token * shape.num_kv_heads))),
    )


def find_prefixes(
    block_table: np.ndarray,
    seq_lens: np.ndarray,
    *,
    page_size: int,
    query_tokens: int = 1,
    rule: SharingRule = SharingRule(),  # noqa: B008
) -> PrefixGroups:
    """Groups of rows with equal leading page ids, as the rule above finds them.

    block_table [batch_size, max_pages] integers, seq_lens [batch_size] integers. Raises ValueError naming the argument.
    """
    step, rule = StepState(seq_lens, block_table), check_rule(rule)
    page_size, query_tokens = check_int("page_size", page_size, 1), check_int("query_tokens", query_tokens, 1)
    step.check_pages(DecodeShape(1, 1, 1, page_size))
    pages = np.maximum(0, step.seq_lens.astype(np.int64) - (query_tokens - 1)) // page_size  # [batch_size]
    table = np.asarray(step.block_table)
    # Big-endian, so that bytes sort as ids do.
    names = [table[row, :count].astype(">u4").tobytes() for row, count in enumerate(pages)]
    order = np.array(sorted(range(step.batch_size), key=names.__getitem__), np.int64)
    common = np.array([_common(names[a], names[b]) for a, b in zip(order[:-1], order[1:])], np.int64)  # of neighbours
    grouped, prefix_of = np.empty((2, step.batch_size), np.int64)
    num_groups = group_sorted(common, page_size, rule.tokens_per_member, rule.least_tokens, grouped, prefix_of)
    found = np.full(step.batch_size, -1, np.int64)
    found[order] = grouped
    firsts = [int(np.argmax(found == group)) for group in range(num_groups)]
    by_first = np.argsort(firsts, kind="stable")
    number = np.full(num_groups + 1, -1, np.int32)  # the last is that of rows in no group
    number[by_first] = np.arange(num_groups)
    return PrefixGroups(number[found], prefix_of[by_first].astype(np.int32))


def _common(a: bytes, b: bytes) -> int:
    """Leading ids that two strings of 4-byte ids have in common."""
    count = min(len(a), len(b)) // 4
    differs = np.frombuffer(a, np.uint32, count) != np.frombuffer(b, np.uint32, count)
    return int(differs.argmax()) if differs.any() else count
