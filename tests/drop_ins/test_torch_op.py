"""The operator under torch's own checks, compiled and exported, on a CPU kernel of the tests; its cache of engines."""
from __future__ import annotations

import threading

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
from torch_paged import TorchEngine, paged_attention, serve_op_on_cpu
from torch_paged import append_tokens as append_reference

from gpu.drop_ins import torch_append
from gpu.drop_ins import torch_decode as torch_op
from gpu.drop_ins.torch_append import WriterCache, append_tokens
from gpu.drop_ins.torch_decode import EngineCache, decode_attention
from pkvsim.options import PLAIN

serve_op_on_cpu()


def step(lens: list[int], *, dtype: torch.dtype = torch.float16, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """q, k_pages, v_pages, block_table, seq_lens of 6 query and 2 KV heads of 8, pages of 4."""
    torch.manual_seed(seed)
    columns = max(1, max(-(-length // 4) for length in lens))
    table = torch.randperm(len(lens) * columns).to(torch.int32).view(len(lens), columns)
    pages = (len(lens) * columns, 2, 4, 8)
    q, k, v = (torch.randn(size).to(dtype) for size in ((len(lens), 6, 8), pages, pages))
    return q, k, v, table, torch.tensor(lens, dtype=torch.int32)


VARIANTS = [{}, {"scale": 0.25}, {"window": 3, "soft_cap": 5.0}, {"sinks": torch.linspace(-1, 3, 6)}]


@pytest.mark.parametrize("options", VARIANTS)
def test_opcheck(options) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        torch.library.opcheck(torch.ops.pkv.decode_attention.default, step([5, 0, 9], dtype=dtype), options)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("query_tokens", [1, 3])
@pytest.mark.parametrize("value_dim", [8, 5])
def test_variants_reach_the_engine_and_the_fake_kernel(options, query_tokens, value_dim) -> None:
    q, k, v, table, lens = step([5, 30, 9])
    v = v[..., :value_dim].contiguous()
    q = q if query_tokens == 1 else torch.stack([q] * query_tokens, 1)
    arguments = q, k, v, table, lens
    expected = paged_attention(*arguments, **options)
    found = run(torch_engines(), arguments, **options)
    sinks = {"sinks": options["sinks"].to("meta")} if "sinks" in options else {}
    fake = decode_attention(*(array.to("meta") for array in arguments), **options | sinks)
    for one, other, shape_only in zip(found, expected, fake, strict=True):
        assert torch.equal(one, other)
        assert (one.shape, one.dtype) == (shape_only.shape, shape_only.dtype)


class Layer(torch.nn.Module):
    """Something on either side of the operator, for the graph to hold."""

    def forward(self, q, k_pages, v_pages, block_table, seq_lens):
        out, lse = decode_attention(q * 2, k_pages, v_pages, block_table, seq_lens, 0.3)
        return out + 1, lse.exp()


def test_compiles_whole_and_for_every_batch_size() -> None:
    compiled = torch.compile(Layer(), backend="aot_eager", fullgraph=True, dynamic=True)
    for seed, lens in enumerate(([5, 9], [1, 2, 3], [40, 0, 7, 8])):
        arguments = step(lens, seed=seed)
        for found, expected in zip(compiled(*arguments), Layer()(*arguments)):
            assert torch.equal(found, expected)


def test_exports_with_any_batch_size() -> None:
    batch, pages, columns = (torch.export.Dim(name, min=2) for name in ("batch", "pages", "columns"))
    dynamic = {"q": {0: batch}, "k_pages": {0: pages}, "v_pages": {0: pages}, "block_table": {0: batch, 1: columns},
               "seq_lens": {0: batch}}
    exported = torch.export.export(Layer(), step([5, 9, 2]), dynamic_shapes=dynamic)
    assert "pkv.decode_attention" in str(exported.graph)
    arguments = step([3, 20, 7, 1, 6], seed=1)
    for found, expected in zip(exported.module()(*arguments), Layer()(*arguments)):
        assert torch.equal(found, expected)


def test_fake_kernel_names_what_is_wrong() -> None:
    q, k, v, table, lens = (array.to("meta") for array in step([5, 9]))
    out, lse = decode_attention(q, k, v, table, lens)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (2, 6), torch.float32)
    with pytest.raises(ValueError, match="^q: expected"):
        decode_attention(q[0], k, v, table, lens)
    with pytest.raises(ValueError, match="^k_pages: expected"):
        decode_attention(q, k[0], v, table, lens)


def torch_engines() -> EngineCache:
    return EngineCache(TorchEngine)


def run(cache: EngineCache, arguments: tuple, *, stream: int = 1, capturing: bool = False, **options: object):
    return cache.run(*arguments, **options, stream=stream, capturing=capturing)


def test_one_engine_for_each_stream_shape_dtype_and_option() -> None:
    made = []

    def make(shape, dtype, options):
        made.append((shape, dtype, options))
        return TorchEngine(shape, dtype, options)

    cache = EngineCache(make)
    for seed in range(3):  # other lengths, pages and batch sizes are the same engine's
        arguments = step([5] * (seed + 1), seed=seed)
        out, lse = run(cache, arguments)
        expected, expected_lse = paged_attention(*arguments)
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert torch.equal(run(cache, arguments, scale=0.5)[0], paged_attention(*arguments, 0.5)[0])
    assert len(cache) == 1 and made[0][1:] == ("float16", PLAIN)
    run(cache, arguments, stream=2)
    run(cache, arguments, window=4)
    run(cache, step([5], dtype=torch.bfloat16))
    run(cache, (arguments[0][:, :2].contiguous(), *arguments[1:]))
    run(cache, (*arguments[:3], arguments[3].long(), arguments[4]))  # whose kernel is another
    assert len(cache) == len(made) == 6


def test_the_last_used_engines_are_kept_and_those_of_captured_graphs(monkeypatch) -> None:
    monkeypatch.setattr(torch_op, "MAX_ENGINES", 3)
    made, drained = [], []

    class Engine(TorchEngine):
        def drain(self) -> None:
            drained.append(self.options.window)

    def make(shape, dtype, options):
        made.append(options.window)
        return Engine(shape, dtype, options)

    cache, arguments = EngineCache(make), step([5, 9])
    run(cache, arguments, window=1)
    run(cache, arguments, window=1, capturing=True)
    for window in (2, 3, 4, 2, 5, 6, 1):
        run(cache, arguments, window=window)
    assert drained == [3, 4] and made == [1, 2, 3, 4, 5, 6]  # 2 was used again, 1 is captured
    assert len(cache) == 3 + 1
    run(cache, arguments, window=3)
    assert made[-1] == 3 and drained == [3, 4, 2]


def test_queries_that_are_not_contiguous() -> None:
    q, *rest = step([5, 9])
    strided = q.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(run(torch_engines(), (strided, *rest))[0], paged_attention(q, *rest)[0])


def test_a_capture_may_use_an_engine_but_not_build_one() -> None:
    cache = torch_engines()
    arguments = step([5, 9])
    with pytest.raises(RuntimeError, match="before a CUDA graph"):
        run(cache, arguments, capturing=True)
    run(cache, arguments)
    run(cache, arguments, capturing=True)


def test_threads_on_one_stream_get_their_own_results() -> None:
    cache = torch_engines()
    cases = [step([5 + seed, 9], seed=seed) for seed in range(6)]
    wrong = []

    def work(arguments) -> None:
        expected = paged_attention(*arguments)[0]
        wrong.extend(1 for _ in range(20) if not torch.equal(run(cache, arguments)[0], expected))

    threads = [threading.Thread(target=work, args=(arguments,)) for arguments in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(cache) == 1


def append_step(lens: list[int], new: list[int] | None, *, dtype: torch.dtype = torch.float16) -> tuple:
    """k_new, v_new, k_pages, v_pages, block_table, seq_lens, token_offsets; without `new` one token a row."""
    _, k_pages, v_pages, table, seq_lens = step(lens, dtype=dtype)
    offsets = None if new is None else torch.tensor([0, *new], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tokens = torch.randn(2, len(lens) if new is None else sum(new), 2, 8).to(dtype)
    return *tokens, k_pages, v_pages, table, seq_lens, offsets


@pytest.mark.parametrize("new", [None, [1, 4, 0]])
def test_append_opcheck(new) -> None:
    torch.library.opcheck(torch.ops.pkv.append_tokens.default, append_step([5, 4, 9], new))


class DecodeStep(torch.nn.Module):
    """Append, then attend to what was appended: the order must survive compilation."""

    def forward(self, q, k_new, v_new, k_pages, v_pages, block_table, seq_lens):
        append_tokens(k_new * 2, v_new, k_pages, v_pages, block_table, seq_lens)
        return decode_attention(q, k_pages, v_pages, block_table, seq_lens)[0] + 1


def test_append_and_decode_compile_whole_and_export() -> None:
    def arguments() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        return torch.randn(3, 6, 8).half(), *append_step([5, 4, 9], None)[:-1]

    expected_step = arguments()
    expected = DecodeStep()(*expected_step)
    exported = torch.export.export(DecodeStep(), arguments()).module()
    for run_step in (torch.compile(DecodeStep(), backend="aot_eager", fullgraph=True), exported):
        found_step = arguments()
        assert torch.equal(run_step(*found_step), expected)
        for found, pages in zip(found_step, expected_step):
            assert torch.equal(found, pages)
    assert not torch.equal(arguments()[3], expected_step[3]), "nothing was appended"


def test_one_writer_for_each_shape_and_dtype(monkeypatch) -> None:
    made = []

    class Writer:
        def append(self, k_new, v_new, k_pages, v_pages, *, seq_lens, block_table, token_offsets):
            append_reference(k_new, v_new, k_pages, v_pages, block_table, seq_lens, token_offsets)

    def make(shape, dtype):
        made.append((shape.num_kv_heads, shape.page_size, shape.head_dim, dtype))
        return Writer()

    cache = WriterCache(make)
    with pytest.raises(RuntimeError, match="before a CUDA graph"):
        cache.append(*append_step([5, 4], None), capturing=True)
    for dtype in (torch.float16, torch.bfloat16):
        for lens, new in (([5, 4], None), ([9, 9, 9], [0, 9, 2])):
            found, expected = (append_step(lens, new, dtype=dtype) for _ in range(2))
            for one, other in zip(found[:2], expected[:2]):
                other.copy_(one)
            cache.append(*found, capturing=bool(new))
            append_reference(*expected)
            assert torch.equal(found[2], expected[2]) and torch.equal(found[3], expected[3])
    assert made == [(2, 4, 8, "float16"), (2, 4, 8, "bfloat16")]
    monkeypatch.setattr(torch_append, "MAX_WRITERS", 1)
    for dtype in (torch.float16, torch.bfloat16, torch.float16):
        cache.append(*append_step([5, 4], None, dtype=dtype), capturing=False)
    assert len(cache) == 1 and [kind for *_, kind in made[2:]] == ["bfloat16", "float16"]
    with pytest.raises(ValueError, match="^k_pages: expected"):
        cache.append(*append_step([5], None)[:2], torch.zeros(3), *append_step([5], None)[3:], capturing=False)
