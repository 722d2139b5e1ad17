"""examples/bench_serve.py and bench_products.py as far as no GPU is needed: what is chosen, and left out, of a small one."""
from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
import bench_products  # noqa: E402
import bench_serve  # noqa: E402
from serve_bench import presets, roofline  # noqa: E402

from gpu.measure import memory  # noqa: E402
from gpu.serve.model import weights  # noqa: E402
from gpu.serve.model.config import find_config  # noqa: E402
from pkvsim.models.presets import get_model, weight_bytes  # noqa: E402

GIB = 2**30


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.2-1b", "qwen2.5-7b"])
def test_weights_are_counted_as_pkvsim_counts_them(name) -> None:
    assert weights.weights_bytes(find_config(name), torch.bfloat16) == weight_bytes(get_model(name))


def test_a_model_that_does_not_fit_is_named_before_it_is_made() -> None:
    with pytest.raises(ValueError, match=r"^model: expected at most 9.35 GiB of weights, for which memory has room, got "
                                         r"14.96 GiB of llama-3.1-8b$"):
        weights.load("llama-3.1-8b", dtype=torch.float16, device="cpu", dummy=True, room=int(9.35 * GIB))


@pytest.mark.parametrize(("gib", "chosen", "said"), [
    (140.0, "llama-3.1-8b", ""), (11.5, "llama-3.2-1b", "llama-3.2-1b in place of llama-3.1-8b"),
    (18.7, "qwen2.5-7b", "qwen2.5-7b in place of llama-3.1-8b"), (3.0, None, ""),
])  # fmt: skip
def test_the_largest_preset_that_fits_is_taken_and_told(gib, chosen, said, monkeypatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: int(gib * GIB))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(gib * GIB), int(gib * GIB)))
    args, told = bench_serve.parse_args([]), []
    console = SimpleNamespace(print=lambda line, **_: told.append(line))
    if chosen is None:
        with pytest.raises(ValueError, match="model: expected memory for 2.30 GiB, the weights of llama-3.2-1b"):
            bench_serve.choose_model(args, console)
        return
    bench_serve.choose_model(args, console)
    assert args.model == chosen and "".join(told).startswith(said) and bool(told) == bool(said)
    asked = bench_serve.parse_args(["--model", "llama-3.1-8b"])
    bench_serve.choose_model(asked, console)
    assert asked.model == "llama-3.1-8b"


def test_the_largest_of_several_that_fit_is_taken() -> None:
    sizes = {"llama-3.1-8b": 15, "llama-3.1-70b-tp4": 131, "qwen2.5-7b": 14, "llama-3.2-1b": 2}
    for room, chosen in ((200, "llama-3.1-8b"), (14, "qwen2.5-7b"), (13, "llama-3.2-1b")):
        assert presets.largest_preset("llama-3.1-8b", room=room,
                                      weights_bytes=lambda config: sizes[config.name]) == chosen


@pytest.mark.parametrize(("rows", "context", "lacks"), [(1, 1024, False), (8, 32768, True), (1, 32768, True)])
def test_cells_whose_pages_do_not_fit_are_left_out(rows, context, lacks) -> None:
    limits = SimpleNamespace(page_size=16, num_pages=2000, keep_free=20)
    server = SimpleNamespace(scheduler=SimpleNamespace(limits=limits), max_context=131072)
    llm = SimpleNamespace(server=server, options=SimpleNamespace(step_tokens=4096))
    why = roofline.lacks_room(llm, rows, context, 100)
    assert (why is not None) == lacks and (not lacks or "of which there are 1,980" in why)


@pytest.mark.parametrize("cells", ["1", "1x", "0x1024", "8x1024,", "all"])
def test_cells_that_are_none_are_named(cells, capsys) -> None:
    with pytest.raises(SystemExit):
        bench_serve.parse_args(["--cells", cells])
    assert f"--cells: expected rows x tokens, comma-separated, as 1x1024,8x32768, got {cells!r}" in capsys.readouterr().err


@pytest.mark.parametrize(("columns", "more"), [(8, ["product.cu"]), (9, [])])
def test_products_are_timed_in_every_way_that_serves_them(columns, more) -> None:
    assert [name for name, _ in bench_products.ways(columns)] == ["torch", "torch, rows.cu", *more]
