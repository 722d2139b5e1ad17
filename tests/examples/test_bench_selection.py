"""examples/bench_selection.py as far as no GPU is needed: its cells run on float64 kernels, checks and tables included."""
from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from fake_gpu import fake_gpu

torch = pytest.importorskip("torch")
from gpu.measure.cases import StepCase  # noqa: E402
from gpu.measure.memory import NoRoom  # noqa: E402
from pkvsim import PageList, reference  # noqa: E402
from pkvsim.selection.by_name import select_pages  # noqa: E402
from pkvsim.selection.rules import Budget, Pins  # noqa: E402


def test_lists_are_ascending_and_hold_the_last_page(monkeypatch) -> None:
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    with fake_gpu():
        sys.modules.pop("bench.selection_measure", None)
        measure = importlib.import_module("bench.selection_measure")
        counts = np.array([[3, 1], [5, 2]])
        lists = measure.SelectionBench._lists(np.random.default_rng(0), 2, 20, counts)
        assert (lists.counts.numpy() == counts).all()
        for index, count in np.ndenumerate(counts):
            places = lists.pages.numpy()[index][:count]
            assert (np.diff(places) > 0).all() and places[-1] == 19 and (lists.pages.numpy()[index][count:] == -1).all()
    sys.modules.pop("bench.selection_measure", None)


class Planned:
    """An engine, summaries and a selector of a step on the CPU, in float64."""

    def __init__(self, shape, *args, **more) -> None:
        self.shape = shape

    def plan(self, seq_lens, table) -> None:
        self.lens, self.table = seq_lens.numpy(), table.numpy()

    def run(self, q, k, v, *, out, lse=None, selected=None, page_lse=None) -> None:
        step = self.shape, *(x.double().numpy() for x in (q, k, v)), self.table, self.lens
        if selected is None:
            out[...] = torch.from_numpy(reference.attention(*step)[0])
        else:
            lists = PageList(*(x.numpy() for x in selected))
            out[...] = torch.from_numpy(reference.selected_attention(*step, lists)[0])

    def update(self, *args, **more) -> None:
        pass

    def select(self, q, summaries) -> PageList:
        lists = select_pages("mean_std", self.shape, q.numpy(), summaries.k.numpy(), self.table, self.lens,
                             budget=Budget(0.1, 0), pins=Pins(1, 2))
        return PageList(*map(torch.from_numpy, lists))


def test_a_cell_is_checked_and_every_figure_is_timed(monkeypatch) -> None:
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    class Summaries(Planned):
        def __init__(self, shape, k, *, kind, summary_dtype) -> None:
            self.k = k

    with fake_gpu():
        sys.modules.pop("bench.selection_measure", None)
        measure = importlib.import_module("bench.selection_measure")
        for name, value in {"DecodeEngine": Planned, "PageSelector": Planned, "PageSummaries": Summaries,
                            "l2_bytes": lambda: 0}.items():
            monkeypatch.setattr(measure, name, value)

        def call_all(run_one, *, variants, repeats):
            for index in range(variants):
                run_one(index)
            return SimpleNamespace(median_us=1.0)

        monkeypatch.setattr(measure, "graph_time_us", call_all)
        page = 8 * 16 * 128
        monkeypatch.setattr(measure.memory, "free_bytes", lambda: 90 * page * 17 // 64)  # of centroids; a byte less would not do
        monkeypatch.setattr(measure.fi, "installed", lambda: True)  # and yet not there: a note, no time
        torch.manual_seed(0)
        pools = [torch.randn(90 * page).half() for _ in range(2)]
        k, v = (pool.view(90, 8, 16, 128) for pool in pools)
        table = np.random.default_rng(0).permutation(84).reshape(2, 42).astype(np.int32)
        q = torch.randn(2, 32, 128).half()
        monkeypatch.setattr(measure, "lay_out", lambda pool, shape, lens, **more: StepCase(
            shape, lens, 1000, table, ((k, v),), q))
        monkeypatch.setattr(StepCase, "on_gpu", lambda self: (torch.from_numpy(self.seq_lens), torch.from_numpy(table)))
        bench = object.__new__(measure.SelectionBench)
        bench.pool, bench.repeats, bench.budget = None, 1, Budget(0.1, 0)
        bench.limit = SimpleNamespace(time_us=lambda num_bytes: 1.0)
        monkeypatch.setattr(bench.__class__, "_host_us", lambda *args: {"dense": 1.0})
        result = bench.measure(2, 660)
    sys.modules.pop("bench.selection_measure", None)
    of_summaries = {f"{name}{suffix}" for name in ("summarize_one_token", "select", "everything")
                    for suffix in ("", "_8bit", "_centroids")}  # fmt: skip
    assert set(result.times) == {"dense", "attend", "attend_skewed", "dense_page_lse", *of_summaries}
    assert max(result.errors.values()) < 2e-3 and set(result.notes) == {"flashinfer_tensor_core", "flashinfer_cuda_core"}


def test_a_cell_of_the_grid_has_every_time_that_a_fit_asks_for(monkeypatch) -> None:
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    seen = []

    class Summaries(Planned):
        def __init__(self, shape, k) -> None:
            self.k = k

    with fake_gpu():
        for name in ("bench.selection_measure", "bench.selection_grid"):
            sys.modules.pop(name, None)
        grid = importlib.import_module("bench.selection_grid")

        class Paged:
            def __init__(self, **more) -> None:
                pass

            def keep(self, *given) -> bool:
                return False

        def call_all(run_one, *, variants, repeats):
            run_one(0)
            return SimpleNamespace(median_us=float(variants))

        def lay_out(pool, shape, lens, **more):
            if len(seen) == 1:
                raise NoRoom("pool-gib: expected more")
            seen.append(lens)
            table = np.arange(42, dtype=np.int32)[None]
            k, v = (torch.zeros(42, 8, 16, 128).half() for _ in range(2))
            return StepCase(shape, lens, 1000, table, ((k, v),), torch.zeros(1, 32, 128).half())

        for name, value in {"DecodeEngine": Planned, "PageSelector": Planned, "PageSummaries": Summaries,
                            "l2_bytes": lambda: 0, "graph_time_us": call_all, "lay_out": lay_out,
                            "PagedSelection": Paged, "this_device": lambda: None,
                            "GRID": ((1, 660, 0.1), (2, 660, 0.2))}.items():
            monkeypatch.setattr(grid, name, value)
        monkeypatch.setattr(StepCase, "on_gpu", lambda self: (torch.from_numpy(self.seq_lens),
                                                              torch.from_numpy(self.block_table)))
        monkeypatch.setattr(grid.memory, "free_bytes", lambda: 1 << 30)
        limit = SimpleNamespace(time_us=lambda num_bytes: 1.0)
        done, left_out = grid.measure_grid(SimpleNamespace(pool=None, repeats=1, limit=limit))
    for name in ("bench.selection_measure", "bench.selection_grid"):
        sys.modules.pop(name, None)
    assert (done.rows, done.length, done.fraction) == (1, 660, 0.1) and left_out.startswith("2 x 660, 0.2: pool-gib")
    assert set(done.times) == {"dense", "attend", "select", "everything", "policy", "summarize_one_token"}


@pytest.mark.parametrize("summaries", [1, 2])
def test_pools_leave_room_for_the_summaries_of_every_layer(summaries) -> None:
    with fake_gpu():
        sys.modules.pop("bench.selection_measure", None)
        measure = importlib.import_module("bench.selection_measure")
        pool_gib = 11.5 * 2 / 3 / measure.beside(summaries)
        view = pool_gib / 4  # of K, that a layer's pages are in
        taken = pool_gib + summaries * measure.MOST_LAYERS * measure.summary_bytes(int(view * 2**30)) / 2**30
    sys.modules.pop("bench.selection_measure", None)
    assert taken == pytest.approx(11.5 * 2 / 3, rel=1e-6)


def test_the_tables_have_a_cell_for_every_time(capsys) -> None:
    import bench_selection
    from rich.console import Console

    times = dict.fromkeys(bench_selection.SHOWN[:-1], 2.0)
    result = SimpleNamespace(rows=8, length=32768, limit_us=1.0, times=times, host_us={"dense": 3.0},
                             label="8 x 32768, 10%", over_dense=lambda name: times.get(name) and times[name] / times["dense"])
    for table in bench_selection.tables([result]):
        table.print(Console(width=200))
    shown = capsys.readouterr().out
    assert "8 x 32768" in shown and "1.000" in shown


@pytest.mark.parametrize("arguments", [["--fraction", "0"], ["--cells", "9"]])
def test_bad_arguments_are_named(arguments, capsys) -> None:
    import bench_selection
    from bench import script

    with pytest.raises(SystemExit) as stopped:
        args = bench_selection.parse_args(arguments)
        script.chosen("bench_selection", args.cells, (1, 2))
    assert arguments[0] in str(stopped.value) + capsys.readouterr().err
