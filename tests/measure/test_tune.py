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


def test_a_calculated_table_needs_no_gpu(tmp_path) -> None:
    path = tmp_path / "t.json"
    assert tune.main(["--calculate", "86", "-o", str(path)]) == 0 and path.exists()
