"""bench_several as far as no GPU is needed: cells, how their pages lie, options."""
from __future__ import annotations

import types

import bench_several
import numpy as np
import pytest
import several
import without_gpu
from several_bench.cells import CELLS, SeveralCell, local_tables, whole_table


@pytest.mark.parametrize("script", ["examples.bench_several", "examples.several"])
def test_help_and_a_machine_without_a_gpu(script) -> None:
    done = without_gpu.run_main(script)
    assert "--ranks" in done.stdout and "needs a CUDA GPU" in done.stderr


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_every_page_of_a_row_is_some_ranks(ranks) -> None:
    for cell in (SeveralCell("even", 3, 1000), SeveralCell("skewed", 2, 4000, (7, 3))):
        shares = cell.shares(ranks)
        tables = local_tables(cell, shares)
        each = max(table.size for table in tables)
        whole = whole_table(tables, each, shares)
        assert whole.shape == (cell.rows, -(-cell.tokens // 16)) and len(np.unique(whole)) == whole.size
        rank, place = shares.place(np.arange(whole.shape[1]))
        for r, table in enumerate(tables):
            assert (whole[:, rank == r] // each == r).all() and (whole[:, rank == r] % each == table[:, place[rank == r]]).all()
            assert shares.local_lens(cell.lengths(), r).max() <= table.shape[1] * 16
    skewed = CELLS[6].shares(2)
    assert skewed.pages_of_rank == (7, 3) and CELLS[6].kv_bytes() == 131072 * 4096


def test_options(capsys) -> None:
    assert bench_several.parse_args(["--owners", "row,all"]).owners == ("row", "all")
    with pytest.raises(SystemExit):
        bench_several.parse_args(["--owners", "row,nobody"])
    assert "--owners: expected some of all, row, head, got 'row,nobody'" in capsys.readouterr().err
    assert several.parse_args(["--tokens", "5"]).tokens == 5


@pytest.mark.parametrize("option", ["--gpus 0", "--ranks 1", "--repeats 0"])
def test_numbers_that_cannot_be(capsys, option) -> None:
    with pytest.raises(SystemExit):
        bench_several.parse_args(option.split())
    assert f"{option.split()[0]}: expected at least" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--tokens -1", "--ranks 9", "--ranks 1", "--steps 0"])
def test_what_the_example_cannot_run(capsys, option) -> None:
    with pytest.raises(SystemExit) as ended:
        several.main(option.split())
    assert ended.value.code == 2 and f"several: error: {option.split()[0][2:]}: expected an integer" in capsys.readouterr().err


@pytest.mark.parametrize("owner", ["row", "all", "head"])
def test_the_table_compares_whatever_owner_was_asked_for(owner) -> None:
    us = {"one": 20.0, "alone": 10.0, f"several, {owner}": 12.0}
    result = types.SimpleNamespace(cell="cell", ways={way: (one, one) for way, one in us.items()},
                                   by_rank={way: (one, one) for way, one in us.items()})
    ((*_, over_one, adds),) = bench_several.table([result], 2).rows
    assert (over_one, adds) == ("0.600", "+2.0")
