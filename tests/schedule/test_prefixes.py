"""Groups found in block tables against the rule as it is stated, pair by pair."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_cases import tables

from pkvsim import DecodeShape
from pkvsim.schedule.prefixes import SharingRule, find_prefixes, sharing_rule

ALWAYS = SharingRule(0, 0)


def pairs(table, pages):
    """Leading ids that each two rows have in common, int [rows, rows]."""
    rows = [[int(i) for i in row[:count]] for row, count in zip(table, pages)]
    common = np.zeros((len(rows), len(rows)), int)
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            while common[i, j] < min(len(a), len(b)) and a[common[i, j]] == b[common[i, j]]:
                common[i, j] += 1
    return common


def stated(table, pages, page_size, rule):
    """[(pages, rows)] of the groups, in order."""
    common, found, seen = pairs(table, pages), [], set()
    for row in range(len(pages)):
        tree = [r for r in range(len(pages)) if r == row or common[row, r]]
        if row in seen or len(tree) < 2:
            continue
        seen.update(tree)

        def components(depth, tree=tree):
            return {tuple(r for r in tree if r == row or common[row, r] >= depth) for row in tree}

        depths = sorted({int(common[i, j]) for i in tree for j in tree if i != j})
        depth = max(depths, key=lambda d: (d * (len(tree) - len(components(d))), d))
        left = set(tree)
        for rows in components(depth):
            least = min((int(common[i, j]) for i in rows for j in rows if i != j), default=0)
            if rule.pays(len(rows), least * page_size):
                found.append((least, list(rows)))
                left -= set(rows)
        if rule.pays(len(left), depths[0] * page_size):
            found.append((depths[0], sorted(left)))
    if not rule.worth(sum((len(rows) - 1) * least * page_size for least, rows in found)):
        return []
    return sorted(found, key=lambda group: group[1][0])


@settings(max_examples=300, deadline=None)
@given(tables(), st.sampled_from([1, 3, 16]), st.sampled_from([1, 3]),
       st.builds(SharingRule, st.integers(0, 30), st.integers(0, 90)))  # fmt: skip
def test_groups_are_those_of_the_rule(case, page_size, query_tokens, rule):
    table, pages, extra = case
    lens = pages * page_size + np.minimum(extra, page_size - 1)
    whole = np.maximum(0, lens - (query_tokens - 1)) // page_size

    def find(rule):
        groups = find_prefixes(np.pad(table, ((0, 0), (0, 1)), constant_values=-7), lens, page_size=page_size,
                               query_tokens=query_tokens, rule=rule)  # fmt: skip
        rows = [np.flatnonzero(groups.group_of_row == group).tolist() for group in range(len(groups.prefix_pages))]
        return groups, rows, list(zip(groups.prefix_pages.tolist(), rows))

    groups, rows, found = find(rule)
    assert found == stated(table, whole, page_size, rule)
    every = find(rule._replace(least_tokens=0))[2]
    saved = sum((len(members) - 1) * pages * page_size for pages, members in every)  # must be more than the least
    assert find(rule._replace(least_tokens=saved))[2] == []
    assert not saved or find(rule._replace(least_tokens=saved - 1))[2] == every
    groups.check(np.pad(table, ((0, 0), (0, 1))), lens, page_size=page_size)
    assert rule.ever_worth(len(lens), int(lens.max())) or not rows  # what is ruled out by room alone is never found


def test_documents_under_one_system_prompt():
    """Four documents of 16 rows each, three rows of the prompt alone, one of its own: the rule's fourth step."""
    table = np.zeros((68, 300), np.int32)
    fresh = iter(range(1000, 10**6))
    for row in range(68):
        table[row] = [next(fresh) for _ in range(300)]
        if row < 67:
            table[row, :32] = np.arange(32)
        if row < 64:
            table[row, 32:288] = 100 + np.arange(256) + 256 * (row % 4)
    groups = find_prefixes(table, np.full(68, 300 * 16), page_size=16, rule=SharingRule(400, 0))
    assert groups.prefix_pages.tolist() == [288] * 4  # three rows of 512 tokens do not pay
    groups = find_prefixes(table, np.full(68, 300 * 16), page_size=16, rule=ALWAYS)
    assert groups.prefix_pages.tolist() == [288] * 4 + [32]
    assert groups.group_of_row.tolist() == [row % 4 for row in range(64)] + [4, 4, 4, -1]


def test_when_sharing_pays():
    """The default is what bytes say of 32/8 heads of 128 on an H200, rounded."""
    rule = sharing_rule(DecodeShape(32, 8, 128, 16), bandwidth_gb_per_s=4000)
    assert rule.tokens_per_member == 25 and rule.least_tokens == SharingRule().least_tokens
    assert rule.worth(73244) and not rule.worth(73243)
    assert SharingRule(26, 0).pays(64, 27) and not SharingRule(26, 0).pays(64, 26)
    assert not ALWAYS.pays(1, 10**6) and not ALWAYS.pays(0, 10**6)


@pytest.mark.parametrize(
    ("table", "lens", "options", "message"),
    [
        (np.zeros((1, 1), np.int32), [33], {"page_size": 16}, r"block_table: expected int32 \[1, >=3\]"),
        (np.zeros((1, 1), np.int32), [3], {"page_size": 0}, "page_size: expected an integer >= 1, got 0"),
        (np.zeros((1, 1), np.int32), [3], {"page_size": 16, "query_tokens": 0}, "query_tokens: expected an integer"),
        (np.zeros((1, 1), np.int32), [3], {"page_size": 16, "rule": (26, 0)}, "rule: expected a SharingRule, got"),
        (np.zeros((1, 1), np.int32), [3], {"page_size": 16, "rule": SharingRule(0, 0.5)}, "rule.least_tokens: expected"),
    ],
)
def test_bad_arguments(table, lens, options, message):
    with pytest.raises(ValueError, match=message):
        find_prefixes(table, lens, **options)
