"""gpu.tune on little memory: the steps that fit are the same for every variant of a shape."""
from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from gpu import tune  # noqa: E402
from gpu.measure import cases  # noqa: E402
from gpu.measure.pools import BenchPool, pool_elements  # noqa: E402
from pkvsim import DecodeShape  # noqa: E402


@pytest.mark.parametrize("gib, fitting", [(0.001, ()), (0.08, tune.CELLS[:3])])
def test_steps_that_fit(monkeypatch, gib, fitting) -> None:
    monkeypatch.setattr(cases, "l2_bytes", lambda: 3 << 20)
    pool = BenchPool.__new__(BenchPool)
    pool.flat = torch.empty(pool_elements(gib), dtype=torch.float16)
    shape = DecodeShape(8, 2, 64, 16)
    found = tune.fitting_cells(shape, pool)
    assert found == fitting
    assert [tune.laid_out(shape, pool, *cell).q.shape[0] for cell in found] == [rows for rows, _ in found]


@pytest.mark.parametrize("wrong, named", [
    (["--calculate", "75"], "calculate: expected"), (["--group-sizes", "4", "0"], "group-sizes: expected"),
    (["--group-sizes", "129"], "group-sizes: expected"), (["--jobs", "0"], "jobs: expected"),
    (["--pool-gib", "nan"], "pool-gib: expected"), (["-o", "."], "out: expected a file")])  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_measured(monkeypatch, tmp_path, capsys, wrong, named) -> None:
    monkeypatch.setattr(tune, "tuned_table", lambda *args: pytest.fail("measured"))
    monkeypatch.setattr(tune, "calculated_table", lambda *args: pytest.fail("calculated"))
    monkeypatch.setattr(tune, "lacks_gpu", lambda program: False)
    assert tune.main(["-o", str(tmp_path / "t.json"), *wrong]) == 2
    assert f"gpu.tune: error: {named}" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_tables_folder_is_made(tmp_path) -> None:
    path = tmp_path / "tables" / "t.json"
    assert tune.main(["--calculate", "86", "-o", str(path)]) == 0 and path.exists()


def test_a_calculated_table_needs_no_gpu(tmp_path) -> None:
    path = tmp_path / "t.json"
    assert tune.main(["--calculate", "86", "-o", str(path)]) == 0 and path.exists()
