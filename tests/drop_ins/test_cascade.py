"""FlashInfer's cascade of two levels on the CPU, with a torch engine in place of the CUDA one."""
from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
from cascade_steps import CascadeStep as Step  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch_paged import TorchEngine  # noqa: E402

from gpu.drop_ins.flashinfer import cascade  # noqa: E402
from pkvsim.schedule.groups import PrefixGroups  # noqa: E402
from pkvsim.schedule.prefixes import SharingRule  # noqa: E402

HEADS = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 8, "page_size": 4}
WORKSPACE = torch.empty(0, dtype=torch.uint8)


class GroupedEngine(TorchEngine):
    """Checks that what it is told to read together is the same in every row."""

    def plan(self, seq_lens, block_table, *, groups=None) -> None:
        super().plan(seq_lens, block_table, groups=groups)
        self.groups = None if groups is None else PrefixGroups(*(array.numpy() for array in groups))
        if groups is not None:
            self.groups.check(block_table.numpy(), seq_lens.numpy(), page_size=self.shape.page_size)


class Wrapper(cascade.MultiLevelCascadeAttentionWrapper):
    rule = SharingRule(tokens_per_member=0, least_tokens=0)

    def _make_engine(self, shape, dtype, options):
        return GroupedEngine(shape, dtype, options)

    def _rule(self, shape, options):
        return self.rule

    def _groups(self, group_of_row, prefix_pages):
        return group_of_row, prefix_pages


GROUPS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=4).filter(
    lambda groups: sum(rows for rows, _ in groups) > 0)


@settings(deadline=None, max_examples=60)
@given(groups=GROUPS, data=st.data(), queries=st.sampled_from([1, 1, 2]), seed=st.integers(0, 9))
def test_rows_see_their_prefix_and_their_own(groups, data, queries, seed) -> None:
    rows = sum(count for count, _ in groups)
    own = data.draw(st.lists(st.integers(queries, 13), min_size=rows, max_size=rows))
    step = Step(groups, own, queries=queries, seed=seed)
    wrapper = Wrapper(2, WORKSPACE, "HND")
    wrapper.plan(*step.levels, *HEADS.values(), causal=queries > 1, sm_scale=0.3)
    assert torch.equal(wrapper.run(step.q, (step.k, step.v)), step.expected(scale=0.3))
    shared = any(count > 1 and pages for count, pages in groups)
    assert (wrapper._engine.groups is not None) == shared


@pytest.mark.parametrize(("rule", "read_once"), [
    (SharingRule(tokens_per_member=6, least_tokens=0), [0, 5]), (SharingRule(tokens_per_member=6, least_tokens=20), None),
])  # fmt: skip
def test_a_prefix_that_does_not_pay_is_read_row_by_row(rule: SharingRule, read_once: list[int] | None) -> None:
    step, wrapper = Step([(3, 2), (2, 5)], [5, 1, 2, 9, 4]), Wrapper(2, WORKSPACE, "HND")
    wrapper.rule = rule
    wrapper.plan(*step.levels, *HEADS.values(), logits_soft_cap=2.0)
    assert torch.equal(wrapper.run(step.q, torch.stack([step.k, step.v], 1)), step.expected(soft_cap=2.0))
    groups = wrapper._engine.groups
    assert (groups and groups.prefix_pages.tolist()) == read_once


def test_captured_runs_follow_later_plans_in_the_same_arrays() -> None:
    buffers = [[torch.zeros(size, dtype=torch.int32) for size in sizes] for sizes in ((4, 6), (4, 6), (9, 30), (3, 5))]
    wrapper = Wrapper(2, WORKSPACE, "HND", True, *buffers)
    seen = set()
    for groups in ([(3, 2), (2, 5)], [(5, 0)], [(1, 1), (2, 3), (2, 2)]):
        step = Step(groups, [5, 1, 2, 9, 4])
        wrapper.plan(*step.levels, *HEADS.values())
        assert torch.equal(wrapper.run(step.q, (step.k, step.v)), step.expected())
        seen.add(tuple(array.data_ptr() for array in wrapper._engine.tables))
    assert len(seen) == 1
    for groups, name in (([(3, 2)], "paged_kv_indptr_arr"), ([(1, 1)] * 4 + [(1, 0)], "paged_kv_indptr_arr")):
        step = Step(groups, [1] * sum(rows for rows, _ in groups))
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            wrapper.plan(*step.levels, *HEADS.values())


def changed(levels: tuple, which: int, level: int, values: object) -> list:
    copied = [list(arrays) for arrays in levels]
    copied[which][level] = torch.as_tensor(np.asarray(values, np.int32))
    return copied


@pytest.mark.parametrize("name, error, which, level, values, options", [
    ("paged_kv_last_page_len", NotImplementedError, 3, 0, [3, 4], {}),
    ("paged_kv_last_page_len", ValueError, 3, 1, [5, 1, 1, 1, 1], {}),
    ("qo_indptr_arr", ValueError, 0, 0, [0, 3, 4], {}),
    ("qo_indptr_arr", ValueError, 0, 0, [0, 5], {}),
    ("qo_indptr_arr", NotImplementedError, 0, 1, [0, 1, 2, 3, 3, 5], {}),
    ("paged_kv_indices_arr", ValueError, 2, 0, [1], {}),
    ("paged_kv_indptr_arr", ValueError, 1, 1, [0, 2, 1, 3, 4, 5], {}),
    ("cascade window_left", NotImplementedError, 3, 0, [4, 4], {"window_left": 9}),
    ("pos_encoding_mode", NotImplementedError, 3, 0, [4, 4], {"pos_encoding_mode": "ALIBI"}),
    ("use_fp16_qk_reduction", NotImplementedError, 3, 0, [4, 4], {"use_fp16_qk_reduction": True}),
    ("kv_data_type", NotImplementedError, 3, 0, [4, 4], {"kv_data_type": "bfloat16"}),
])
def test_what_is_not_served_is_refused_by_name(name, error, which, level, values, options) -> None:
    step, wrapper = Step([(3, 2), (2, 5)], [5, 1, 2, 9, 4]), Wrapper(2, WORKSPACE, "HND")
    with pytest.raises(error, match=f"^{name}"):
        wrapper.plan(*changed(step.levels, which, level, values), *HEADS.values(), **options)


def test_levels_layouts_and_runs_without_a_plan() -> None:
    with pytest.raises(NotImplementedError, match="^num_levels: expected 2"):
        Wrapper(3, WORKSPACE)
    with pytest.raises(KeyError, match="kv_layout"):
        Wrapper(2, WORKSPACE, "DNH")
    with pytest.raises(ValueError, match="^qo_indptr_buf_arr"):
        Wrapper(2, WORKSPACE, use_cuda_graph=True)
    with pytest.raises(RuntimeError, match="plan"):
        Wrapper(2, WORKSPACE).run(torch.zeros(1), (torch.zeros(1), torch.zeros(1)))
    step = Step([(2, 1)], [3, 3])
    wrapper = Wrapper(2, WORKSPACE)  # NHD
    wrapper.plan(*step.levels, *HEADS.values())
    assert torch.equal(wrapper.run(step.q, (step.k.transpose(1, 2), step.v.transpose(1, 2))), step.expected())
    for q in (step.q[:1], step.q.bfloat16()):
        with pytest.raises(ValueError, match="^q: expected"):
            wrapper.run(q, (step.k.transpose(1, 2), step.v.transpose(1, 2)))
