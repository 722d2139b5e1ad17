"""Steps whose rows read together, on a fake GPU: what the kernel is told, what is refused, what a graph keeps."""
from __future__ import annotations

import numpy as np
import pytest
from fake_gpu import fake_gpu, memory

from gpu.kernels.variant import kernel_config, most_readers, read_config
from pkvsim import AttentionOptions, DecodeShape
from pkvsim.schedule.costs import SharedCosts
from pkvsim.schedule.groups import PrefixGroups
from pkvsim.schedule.prefixes import SharingRule

SHAPE = DecodeShape(8, 2, 64, 16)
LENS = np.array([100, 96, 130, 33], np.int32)


@pytest.fixture(scope="module")
def gpu():
    with fake_gpu() as gpu:
        yield gpu


def make_engine(**options):
    from gpu.decode_engine import DecodeEngine

    return DecodeEngine(SHAPE, **options)


def tables(gpu):
    rng = np.random.default_rng(0)
    table = rng.permutation(40).astype(np.int32).reshape(4, 10)
    table[1, :6] = table[2, :6] = table[0, :6]
    return {"seq_lens": gpu.array(LENS.copy()), "block_table": gpu.array(table)}


def run(gpu, engine):
    """The values of the launch of the last kernel that decodes."""
    rng = np.random.default_rng(1)
    pages = [gpu.array(rng.standard_normal((40, 2, 16, 64)).astype(np.float16)) for _ in range(2)]
    seen = []
    plan = engine.schedule_engine._plan
    decode = plan.decode
    plan.decode = lambda grid, args, stream, pairs: (seen.append(dict(zip(decode.given, args))),
                                                     decode(grid, args, stream, pairs))
    engine.run(gpu.array(rng.standard_normal((4, 8, 64)).astype(np.float16)), *pages)
    plan.decode = decode
    return seen[-1]


def test_the_kernel_is_told_the_groups(gpu) -> None:
    engine, given = make_engine(), tables(gpu)
    groups = PrefixGroups([0, 0, 0, -1], [6])
    engine.plan(**given, groups=groups)
    values = run(gpu, engine)
    assert memory(values["group_of_row"], np.int32, (4,)).tolist() == [0, 0, 0, -1]
    assert memory(values["prefix_pages"], np.int32, (values["num_groups"],)).tolist() == [6]
    assert values["columns"] == engine.schedule_engine._shared.config.read_columns
    device = type("Groups", (), {"group_of_row": gpu.array(groups.group_of_row),
                                 "prefix_pages": gpu.array(groups.prefix_pages)})  # fmt: skip
    engine.plan(**given, groups=device)
    plan = engine.schedule_engine._plan
    engine.plan(**given, groups=device)
    assert engine.schedule_engine._plan is plan  # passes unlooked at
    values = run(gpu, engine)
    assert values["group_of_row"] == device.group_of_row.data.ptr
    assert values["prefix_pages"] == device.prefix_pages.data.ptr
    engine.plan(**given)
    assert "group_of_row" not in run(gpu, engine)


def test_the_workspace_is_empty_and_grows(gpu) -> None:
    engine = make_engine()
    engine.plan(**tables(gpu), groups=PrefixGroups([0, 0, 0, -1], [6]))
    config, shared = engine.schedule_engine._shared.config, engine.schedule_engine._plan.groups
    need = config.workspace_bytes(engine.schedule_engine.num_ctas, 4 * SHAPE.num_kv_heads)
    assert (memory(shared.workspace_at, np.uint8, (need,)) == 0xFF).all()
    lens = np.full(9, 20, np.int32)
    engine.plan(gpu.array(lens), gpu.array(np.zeros((9, 2), np.int32)), groups=PrefixGroups([-1] * 9, []))
    assert engine.schedule_engine._plan.groups.workspace_at != shared.workspace_at


def test_auto_finds_once_a_plan_and_once_a_capture(gpu, monkeypatch) -> None:
    monkeypatch.setattr("gpu.kernels.launch.capture_id", lambda stream: capture)
    engine, given = make_engine(sharing_rule=SharingRule(0, 0)), tables(gpu)
    engine.plan(**given, groups="auto")
    finder = next(kernel for kernel in reversed(gpu.kernels) if kernel.name == "pkv_find_prefixes")
    values = run(gpu, engine)
    assert memory(values["group_of_row"], np.int32, (4,)).tolist() == [0, 0, 0, -1]
    assert memory(values["prefix_pages"], np.int32, (values["num_groups"],)).tolist() == [6, 0]
    run(gpu, engine)
    assert finder.launches == 1
    engine.plan(**given, groups="auto")
    run(gpu, engine)
    assert finder.launches == 2
    gpu.capturing = True
    try:
        for capture in (7, 7, 8):  # noqa: B007  the lambda above reads it
            run(gpu, engine)
        assert finder.launches == 4
        assert engine.schedule_engine._in_graphs[-1][-1] == engine.schedule_engine._plan.groups.owned
    finally:
        gpu.capturing = False


def test_auto_is_a_plain_step_where_no_rows_of_the_table_could_save_enough(gpu) -> None:
    """Four rows of ten pages: at most 480 tokens are read by three rows that need not."""
    for least, reads in ((480, False), (479, True)):
        engine, given = make_engine(sharing_rule=SharingRule(0, least)), tables(gpu)
        engine.plan(**given, groups="auto")
        assert ("group_of_row" in run(gpu, engine)) == reads
        first = engine.schedule_engine._plan
        engine.plan(**given, groups="auto")
        assert engine.schedule_engine._plan is first  # passes unlooked at
        engine.plan(**given, groups=PrefixGroups([0, 0, 0, -1], [6]))  # who is told is not asked whether it pays
        assert "group_of_row" in run(gpu, engine)
        counts = gpu.array(np.arange(0, 50, 10, dtype=np.int32))
        engine.plan(given["seq_lens"], indptr=counts, indices=gpu.array(np.arange(40, dtype=np.int32)), groups="auto")
        assert engine.schedule_engine._plan.groups is not None


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_what_reads_by_warpgroups_cost(gpu, kv_dtype) -> None:
    """The kernel and what its reads cost in the schedule go together; 8-bit pages are read by warps."""
    engine = make_engine(sharing_rule=SharingRule(0, 0), options=AttentionOptions(kv_dtype=kv_dtype))
    engine.plan(**tables(gpu), groups="auto")
    shared = engine.schedule_engine._shared
    decode = next(kernel for kernel in reversed(gpu.kernels) if kernel.name == "pkv_decode_shared")
    assert decode.defines["READ_TILES"] == shared.config.read_tiles == (4 if kv_dtype is None else 0)
    wide = engine.schedule_engine._shared_reads(256).costs
    assert (wide.columns, wide.tile) == (64, 12 if kv_dtype is None else 24)


@pytest.mark.parametrize(("groups", "options", "words"), [
    (PrefixGroups([0, 0, 0], [1]), {}, r"group_of_row: expected int32 \[4\]"),
    ("found", {}, 'groups: expected PrefixGroups or "auto"'),
    (PrefixGroups([0] * 4, [1]), {"options": AttentionOptions(window=9)}, "window: expected None with groups"),
    (PrefixGroups([0] * 4, [1]), {"schedule": "workqueue"}, "groups: expected None for schedule 'workqueue'"),
    (PrefixGroups([0] * 4, [1]), {"shared_costs": SharedCosts(columns=4)}, "groups: expected at most"),
    (PrefixGroups([0] * 4, np.zeros(20000, np.int64)), {}, "groups: expected at most .* rows and groups together"),
])  # fmt: skip
def test_what_is_refused(gpu, groups, options, words) -> None:
    engine = make_engine(**options)
    with pytest.raises(ValueError, match=words):
        engine.plan(**tables(gpu), groups=groups)


@pytest.mark.parametrize("groups", [object(), ([0, 0, 0, -1], [6]), 5])
def test_what_are_no_groups_is_named_by_validate_too(gpu, groups) -> None:
    with pytest.raises(ValueError, match="^groups: expected PrefixGroups"):
        make_engine().plan(**tables(gpu), groups=groups, validate=True)


def test_a_prefix_longer_than_any_row_is_named_whatever_its_length(gpu) -> None:
    """Also of CSR, where its pages would fill the host's memory."""
    counts = gpu.array(np.arange(0, 50, 10, dtype=np.int32))
    csr = {"indptr": counts, "indices": gpu.array(np.arange(40, dtype=np.int32))}
    with pytest.raises(ValueError, match=r"^prefix_pages\[0\]: expected at most the 6 full pages of row 0, got 2147483647"):
        make_engine().plan(gpu.array(LENS.copy()), **csr, groups=PrefixGroups([0, 0, -1, -1], [2**31 - 1]),
                           validate=True)


def test_a_refused_plan_leaves_what_the_last_one_reads_with(gpu, monkeypatch) -> None:
    """Its reads are of their own width, and its groups are found where the kernel looks for them."""
    monkeypatch.setattr("gpu.kernels.launch.capture_id", lambda stream: 5)
    engine, given = make_engine(sharing_rule=SharingRule(0, 0)), tables(gpu)
    engine.plan(**given, groups="auto")
    wanted, many = run(gpu, engine), engine.schedule_engine._shared.most_readers * 2 // 3 + 2
    with pytest.raises(ValueError, match="^groups: expected at most .* rows and groups together"):
        engine.plan(gpu.array(np.full(many, 16, np.int32)), gpu.array(np.zeros((many, 20), np.int32)), groups="auto")
    gpu.capturing = True
    memory(wanted["group_of_row"], np.int32, (4,))[:] = -5
    try:
        values = run(gpu, engine)
    finally:
        gpu.capturing = False
    assert {name: values[name] for name in ("columns", "group_of_row", "num_groups")} == {
        name: wanted[name] for name in ("columns", "group_of_row", "num_groups")}
    assert memory(values["group_of_row"], np.int32, (4,)).tolist() == [0, 0, 0, -1]


@pytest.mark.parametrize("change, named", [
    (lambda gpu, given: given | {"seq_lens": gpu.array(np.repeat(LENS, 2))[::2]}, "seq_lens: expected contiguous"),
    (lambda gpu, given: given | {"seq_lens": LENS}, "seq_lens: expected an array on cuda:0"),
    (lambda gpu, given: {"seq_lens": gpu.array(LENS[:0]), "block_table": gpu.array(np.zeros((0, 10), np.int32))},
     "seq_lens: expected at least one row"),
    (lambda gpu, given: given | {"block_table": [[1]]}, "block_table: expected"),
])  # fmt: skip
def test_tables_that_no_prefixes_are_found_in_are_named(gpu, change, named) -> None:
    from gpu.engine.prefixes import find_prefixes

    given = tables(gpu)
    found = find_prefixes(**given, page_size=16, rule=SharingRule(0, 0))
    assert found.group_of_row.get().tolist() == [0, 0, 0, -1]
    with pytest.raises(ValueError, match=f"^{named}"):
        find_prefixes(**change(gpu, given), page_size=16)


def test_validate_compares_the_pages(gpu) -> None:
    engine = make_engine()
    engine.plan(**tables(gpu), groups=PrefixGroups([0, 0, 0, -1], [6]), validate=True)
    with pytest.raises(ValueError, match=r"group_of_row\[3\]: expected the page ids of row 0"):
        engine.plan(**tables(gpu), groups=PrefixGroups([0, 0, 0, 0], [2]), validate=True)


@pytest.mark.parametrize("capability", [86, 90])
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("group", [1, 3, 4, 8, 16])
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_a_variant_that_reads_for_groups_fits(capability, head_dim, group, kv_dtype) -> None:
    options = AttentionOptions(kv_dtype=kv_dtype, kv_scales="token" if kv_dtype else None)
    config = kernel_config(DecodeShape(group, 1, head_dim, 16), "float16", capability, options=options)
    try:
        found = read_config(config, capability)
    except ValueError as error:
        # A team of two warps on a small GPU serves 16 columns of such heads.
        assert (head_dim > 128 and group == 16) and "groups: expected at most" in str(error)
        return
    assert found.read_columns % group == 0 and found.read_columns >= 2 * group
    assert most_readers(found, capability) >= 512
