"""cuda_src/shared.cu itself, built for the CPU: rows that read their common pages once, against float64 attention."""
from __future__ import annotations

import numpy as np
import nvrtc
import pytest
from decode_on_cpu import aligned, make_step, run
from slow import slow_unless
from test_decode_kernel import assert_close, expected

from gpu.kernels.compile import SOURCE_DIR, compile_options
from gpu.kernels.variant import kernel_config, read_config
from pkvsim import AttentionOptions, DecodeShape
from pkvsim.schedule.costs import MEASURED_COSTS, BalancedCosts, SharedCosts
from pkvsim.schedule.groups import PrefixGroups


def grouped(shape, dtype, options, lens, groups, **more):
    return make_step(shape, dtype, options, seed=len(lens), lens=lens, groups=PrefixGroups(*groups), **more)


# group size, head_dim, page size, dtype, CTAs, columns of a read; lengths, groups; options
CASES = {
    "one group": (4, 128, 16, "float16", 7, 16, (100, 96, 130, 33), ((0, 0, 0, -1), (5,)), {}),
    "several reads": (4, 64, 16, "float16", 9, 16, (90, 83, 80, 131, 97, 96, 85), ((0,) * 7, (5,)), {}),
    "several groups": (2, 64, 16, "bfloat16", 11, 16, (70, 150, 64, 0, 161, 144, 20, 7, 150),
                       ((1, 0, 1, 1, 0, 0, -1, -1, 0), (9, 4)), {"sinks": True}),
    "short and unused": (4, 64, 16, "float16", 5, 16, (64, 48, 47, 0, 64, 200), ((0, 0, 0, 0, 3, 2), (3, 0, 12, 2)),
                         {}),
    "few members of a wide read": (4, 128, 16, "float16", 6, 64, (100, 97, 96), ((0, 0, 0), (6,)), {}),
    "one head, many parts": (1, 64, 16, "float16", 29, 16, (400, 390, 512), ((0, 0, 0), (24,)), {"soft_cap": 4.0}),
    "query tokens": (2, 64, 16, "float16", 6, 16, (100, 82, 81, 90, 3), ((0, 0, 0, 0, -1), (5,)), {"query_tokens": 2}),
    "pages of three": (4, 64, 3, "float16", 6, 16, (100, 97, 96), ((0, 0, 0), (32,)), {}),
    "fp8": (4, 64, 16, "float16", 6, 16, (100, 97, 96), ((0, 0, 0), (6,)), {"kv_dtype": "float8_e4m3fn"}),
    "int8 by token": (4, 64, 16, "bfloat16", 6, 16, (100, 97, 96), ((0, 0, 0), (6,)),
                      {"kv_dtype": "int8", "kv_scales": "token"}),
    "head_dim 256": (4, 256, 16, "float16", 6, 16, (60, 50, 48), ((0, 0, 0), (3,)), {}),
}  # fmt: skip


# Of those that make test takes, two run by the build of PLAIN.
OFTEN = ("several reads", "several groups", "short and unused")
# That reads for one and for several warpgroups are tried with, of those that have such.
OF_WARPGROUPS = ("one group", "several groups", "query tokens")


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)],
                ids=["reads by warps", "reads by warpgroups"])
def by_warpgroups(request: pytest.FixtureRequest) -> bool:
    """Two warps read on their own, four do as a warpgroup."""
    return request.param


def ways(by_warpgroups: bool) -> dict[str, object]:
    """Of run()."""
    return {"variant": (4, 2), "read_stages": 4} if by_warpgroups else {}


@pytest.mark.parametrize("name", slow_unless(lambda name: name in OFTEN, CASES))
def test_members_get_what_they_would_alone(name, by_warpgroups) -> None:
    group, head_dim, page_size, dtype, ctas, columns, lens, groups, more = CASES[name]
    if by_warpgroups and name not in OF_WARPGROUPS:
        return
    step = grouped(DecodeShape(2 * group, 2, head_dim, page_size), dtype, AttentionOptions(**more), lens, groups)
    got = run(step, "balanced", ctas=ctas, shared_costs=SharedCosts(columns=columns), **ways(by_warpgroups))
    assert_close(got, expected(step), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [86, 90])
def test_the_variants_of_gpus(capability) -> None:
    """Reads for 40 columns by teams of four warps from rings of eight stages. One is cut over two CTAs, the second of
    which has several own spans too."""
    step = grouped(DecodeShape(4, 1, 128, 16), "float16", AttentionOptions(), (352,) * 20, ((0,) * 20, (20,)))
    got = run(step, "balanced", variant=None, read_stages=None, ctas=5, costs=MEASURED_COSTS,
              capability=capability)
    assert_close(got, expected(step), "float16")


# group size, head_dim, page size, dtype, columns of a read, CTAs; lengths, groups; options. Reads of no whole number of
# groups of tiles, several of them in a range, and more columns in a warpgroup's product than a read has.
BY_WARPGROUPS = {
    "head_dim 64": (8, 64, 16, "float16", 64, 5, (356, 352, 700, 353) * 3, ((0, 0, 1, 0) * 3, (22, 40)), {}),
    "63 columns, pages of 64": (7, 128, 64, "bfloat16", 64, 4, (459, 448, 460), ((0, 0, 0), (7,)),
                                {"sinks": True, "soft_cap": 5.0}),
    "two warpgroups": (8, 128, 16, "float16", 128, 6, (490, 482, 480, 483) * 4, ((0,) * 15 + (-1,), (30,)), {}),
    "two warpgroups, head_dim 64": (8, 64, 16, "bfloat16", 96, 5, (330, 322, 320, 323) * 4, ((0,) * 16, (20,)), {}),
    "query tokens": (4, 64, 32, "float16", 32, 7, (260, 259, 301, 258), ((0,) * 4, (8,)), {"query_tokens": 2}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_WARPGROUPS)
def test_reads_by_warpgroups(name) -> None:
    group, head_dim, page_size, dtype, columns, ctas, lens, groups, more = BY_WARPGROUPS[name]
    shape, options = DecodeShape(2 * group, 2, head_dim, page_size), AttentionOptions(**more)
    assert read_config(kernel_config(shape, dtype, 90, options=options), 90, columns=columns).read_tiles == 4
    step = grouped(shape, dtype, options, lens, groups)
    got = run(step, "balanced", variant=None, read_stages=None, ctas=ctas, shared_costs=SharedCosts(columns=columns))
    assert_close(got, expected(step), dtype)


PLAIN = DecodeShape(8, 2, 64, 16)  # with reads of 16 columns: four rows


def random_batch(rng) -> tuple[list[int], PrefixGroups]:
    """Rows and groups of which some are too short, alone or empty, and some rests are none."""
    num_groups, rows = int(rng.integers(1, 4)), int(rng.integers(2, 12))
    pages = rng.integers(0, 9, num_groups)
    groups = rng.integers(-1, num_groups, rows)
    more = rng.choice([0, 0, 1, 15, 16, 40, -20], rows)
    lens = [max(0, (int(pages[group]) * 16 if group >= 0 else 0) + int(own)) for group, own in zip(groups, more)]
    return lens, PrefixGroups(groups, pages)


@pytest.mark.parametrize("seed", range(6))
def test_random_batches(seed, by_warpgroups) -> None:
    """By one build of the kernel: few and many CTAs, so that spans are whole, cut once or cut often."""
    rng = np.random.default_rng(seed)
    lens, groups = random_batch(rng)
    step = make_step(PLAIN, "float16", AttentionOptions(), seed=seed, lens=tuple(lens), groups=groups)
    costs = BalancedCosts(int(rng.integers(0, 9)), int(rng.integers(1, 9)), int(rng.integers(0, 3)))
    shared = SharedCosts(16, *(int(rng.integers(*span)) for span in ((8, 100), (1, 16), (0, 9), (0, 40))))
    got = run(step, "balanced", ctas=int(rng.choice([1, 2, 5, 17, 40])), costs=costs, shared_costs=shared,
              **ways(by_warpgroups))
    assert_close(got, expected(step), "float16")


@pytest.mark.parametrize("case", ["none to some", "some to none", "others", "lengths", "same", "nonsense"])
def test_what_is_read_early_may_change(case, by_warpgroups) -> None:
    """Until the previous kernel ends, lengths, groups and prefixes are those of another step."""
    lens, group_of_row, pages = (100, 96, 130, 33, 120), [0, 0, 0, -1, 0], [5, 2]
    step = make_step(PLAIN, "float16", AttentionOptions(), seed=1, lens=lens, groups=PrefixGroups(group_of_row, pages))
    before = [step.lens.copy(), step.table.copy(), np.zeros(6 * 64, np.int32), np.array(group_of_row, np.int32),
              np.array(pages, np.int32)]
    if case == "none to some":
        before[3][:] = -1
    elif case == "some to none":
        step.groups.group_of_row[:] = -1
    elif case == "others":
        before[3][:], before[4][:] = [1, 1, 0, 0, 1], [1, 3]
    elif case == "lengths":
        before[0][:] = [200, 0, 7, 33, 60]
    elif case == "nonsense":
        before[0][:], before[3][:] = [-5, 2**31 - 1, 3, 2**30, 0], [2**30, 0, -7, 0, 1]
        before[4][:] = [2**31 - 1, -(2**31)]
    before = tuple(aligned(array) for array in before)
    for hurry in (False, True):
        got = run(step, "balanced", ctas=6, shared_costs=SharedCosts(columns=16), before=before, hurry=hurry,
                  **ways(by_warpgroups))
        assert_close(got, expected(step), "float16")


def word(records: np.ndarray, index: int) -> np.ndarray:
    """The index-th word of pkv::RangeWork in every CTA's record: [ctas, (value, stamp)]."""
    return records[:, 2 * index : 2 * index + 2]


def end_walks(records: np.ndarray) -> None:
    word(records, 27)[:, 0] = word(records, 34)[:, 0] = 0  # reads.x_end, rows.x_end


def of_other_lengths(records: np.ndarray) -> None:
    end_walks(records)
    records[:, 128] += 1  # the first row's


def torn(records: np.ndarray) -> None:
    end_walks(records)
    word(records, 27)[:, 1] += 1


@pytest.mark.parametrize(("change", "trusted"), [(end_walks, True), (of_other_lengths, False), (torn, False)])
def test_a_plan_is_remembered(change, trusted, by_warpgroups) -> None:
    """A record of the same step is trusted, whatever it says; one of another step, or half written, is not."""
    step = make_step(DecodeShape(4, 1, 64, 16), "float16", AttentionOptions(), seed=1, lens=(100, 96, 130, 33),
                     groups=PrefixGroups([0, 0, 0, -1], [5]))  # fmt: skip
    got = run(step, "balanced", ctas=4, shared_costs=SharedCosts(columns=16), between=change, **ways(by_warpgroups))
    if trusted:
        assert np.isnan(got[0]).all()
    else:
        assert_close(got, expected(step), "float16")


def test_rows_beside_a_group_are_those_decoded_alone(by_warpgroups) -> None:
    lens, groups = (100, 96, 130, 85), PrefixGroups([0, 0, 0, 0], [5])
    step = make_step(PLAIN, "float16", AttentionOptions(), seed=3, lens=lens, groups=groups)
    given = ways(by_warpgroups)
    together = run(step, "balanced", ctas=5, shared_costs=SharedCosts(columns=16), **given)
    step.groups = PrefixGroups([-1] * 4, [])
    alone = run(step, "balanced", ctas=5, shared_costs=SharedCosts(columns=16), **given)
    step.groups = None
    plain = run(step, "balanced", ctas=5, **given)
    assert all((a == b).all() for a, b in zip(alone, plain))  # the plain kernel's code, to the bit
    np.testing.assert_allclose(together[0], alone[0], atol=2e-3)
    np.testing.assert_allclose(together[1], alone[1], atol=1e-4)


@pytest.mark.slow  # ten seconds each
@pytest.mark.parametrize("capability", [86, 90])
def test_both_widths_fit_the_registers(capability) -> None:
    config = read_config(kernel_config(DecodeShape(32, 8, 128, 16), "float16", capability), capability)
    used = nvrtc.kernel_resources(SOURCE_DIR / "shared.cu", capability, compile_options(config.read_defines()))
    assert used["pkv_decode_shared"].spills == used["pkv_decode_shared"].stack == 0
