"""The operators on the GPU: torch's own checks, compiled by Inductor, exported, captured, on several streams."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from decode_ref import Case, check, make_case
from torch_paged import paged_attention  # noqa: E402

from gpu.drop_ins.torch_append import append_tokens  # noqa: E402
from gpu.drop_ins.torch_decode import ENGINES, decode_attention  # noqa: E402
from pkvsim import DecodeShape  # noqa: E402

SHAPE = DecodeShape(num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16)
LENS = [5, 900, 0, 77, 4000, 1]


def arguments(case: Case) -> tuple[torch.Tensor, ...]:
    return case.q, case.k_pages, case.v_pages, case.block_table, case.seq_lens


def finite(case: Case) -> tuple[torch.Tensor, ...]:
    """Without the NaN of unowned pages, which torch's checks do not expect in an input."""
    q, k_pages, v_pages, table, lens = arguments(case)
    return q, k_pages.nan_to_num(), v_pages.nan_to_num(), table, lens


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_against_float64(dtype: str, head_dim: int) -> None:
    shape = DecodeShape(8, 2, head_dim, 16)
    for seed, lens in enumerate((LENS, [3000], [100] * 70)):
        case = make_case(shape, lens, dtype=dtype, seed=seed)
        out, lse = decode_attention(*arguments(case))
        check(out, lse, case, dtype=dtype)


VARIANTS = ({"window": 100}, {"soft_cap": 5.0}, {"sinks": True},
            {"scale": 0.3, "window": 17, "soft_cap": 9.0, "sinks": True})


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("query_tokens", [1, 4])
@pytest.mark.parametrize("nhd", [False, True])
def test_variants_against_float64(options: dict, query_tokens: int, nhd: bool) -> None:
    case = make_case(SHAPE, [5, 900, 64, 77, 4000, 4])
    q, k_pages, v_pages, table, lens = finite(case)
    if query_tokens > 1:
        q = torch.randn(len(lens), query_tokens, *q.shape[1:], device="cuda").half()
    if nhd:
        k_pages, v_pages = (pages.transpose(1, 2).contiguous().transpose(1, 2) for pages in (k_pages, v_pages))
    options = dict(options)
    if options.get("sinks"):
        options["sinks"] = torch.linspace(-3, 5, SHAPE.num_q_heads, device="cuda")
    out, lse = decode_attention(q, k_pages, v_pages, table, lens, **options)
    expected, expected_lse = paged_attention(q, k_pages, v_pages, table, lens, **options)
    torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=2e-3)


def test_opcheck() -> None:
    for scale in (None, 0.1):
        torch.library.opcheck(torch.ops.pkv.decode_attention.default, (*finite(make_case(SHAPE, LENS)), scale))


class Layer(torch.nn.Module):
    """Something on either side of the operator, for the graph to hold and Inductor to fuse."""

    def forward(self, q, k_pages, v_pages, block_table, seq_lens):
        out, lse = decode_attention(q * 0.5, k_pages, v_pages, block_table, seq_lens)
        return out * 2 + 1, lse.exp()


def close(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiles_whole(mode: str) -> None:
    compiled = torch.compile(Layer(), fullgraph=True, mode=mode)
    for seed in range(4):  # reduce-overhead warms up, records and replays
        given = finite(make_case(SHAPE, np.random.default_rng(seed).permutation(LENS), seed=0))
        close(compiled(*given), Layer()(*given))


def test_compiles_for_every_batch_size() -> None:
    compiled = torch.compile(Layer(), fullgraph=True, dynamic=True)
    for seed, lens in enumerate((LENS, [100, 3], [64] * 33)):
        given = finite(make_case(SHAPE, lens, seed=seed))
        close(compiled(*given), Layer()(*given))


def test_exports_with_any_batch_size() -> None:
    batch, pages, columns = (torch.export.Dim(name, min=2) for name in ("batch", "pages", "columns"))
    dynamic = {"q": {0: batch}, "k_pages": {0: pages}, "v_pages": {0: pages}, "block_table": {0: batch, 1: columns},
               "seq_lens": {0: batch}}
    exported = torch.export.export(Layer(), finite(make_case(SHAPE, LENS)), dynamic_shapes=dynamic)
    given = finite(make_case(SHAPE, [30, 500, 20], seed=1))
    close(exported.module()(*given), Layer()(*given))


def test_a_captured_call_reads_lengths_that_changed_in_place() -> None:
    cases = [make_case(SHAPE, np.random.default_rng(seed).permutation(LENS), seed=seed) for seed in range(4)]
    fixed = tuple(array.clone() for array in arguments(cases[0]))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        decode_attention(*fixed)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        out, lse = decode_attention(*fixed)
    for case in cases:
        for array, new in zip(fixed, arguments(case)):
            array.copy_(new)
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        check(out, lse, case, dtype="float16")


def test_a_capture_on_a_new_stream_says_what_it_needs() -> None:
    given = arguments(make_case(DecodeShape(24, 8, 128, 16), LENS))  # no other test has an engine of this shape
    decode_attention(*given)
    with pytest.raises(RuntimeError, match="before a CUDA graph captures it"):
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream()):
            decode_attention(*given)
    torch.cuda.synchronize()
    decode_attention(*given)


def test_streams_at_the_same_time() -> None:
    streams = [torch.cuda.Stream() for _ in range(3)]
    cases = [make_case(SHAPE, np.random.default_rng(seed).integers(0, 3000, 8), seed=seed) for seed in range(12)]
    torch.cuda.synchronize()
    results = []
    for index, case in enumerate(cases):
        with torch.cuda.stream(streams[index % 3]):
            if index < 3:
                torch.cuda._sleep(50_000_000)
            results.append(decode_attention(*arguments(case)))
    torch.cuda.synchronize()
    for case, (out, lse) in zip(cases, results):
        check(out, lse, case, dtype="float16")


def test_calls_share_an_engine_and_never_wait() -> None:
    cases = [make_case(SHAPE, [50 + seed] * (seed + 1), seed=seed) for seed in range(4)]
    decode_attention(*arguments(cases[0]))
    before = len(ENGINES)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [decode_attention(*arguments(case)) for case in cases]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(ENGINES) == before
    torch.cuda.synchronize()
    for case, (out, lse) in zip(cases, results):
        check(out, lse, case, dtype="float16")


def new_tokens(count: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return tuple(torch.randn(2, count, SHAPE.num_kv_heads, SHAPE.head_dim, device="cuda").half())


def test_append_opcheck() -> None:
    _, k_pages, v_pages, table, lens = finite(make_case(SHAPE, LENS))
    offsets = torch.tensor([0, 2, 100, 100, 101, 104, 105], dtype=torch.int32, device="cuda")
    for tokens, given in ((len(LENS), None), (105, offsets)):
        torch.library.opcheck(torch.ops.pkv.append_tokens.default,
                              (*new_tokens(tokens), k_pages, v_pages, table, lens, given))


def test_tokens_appended_at_offsets_are_the_rows_last() -> None:
    counts = torch.tensor([5, 100, 0, 1, 4000, 0])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int().cuda()
    case = make_case(SHAPE, LENS)
    k_new, v_new = new_tokens(int(offsets[-1]))
    append_tokens(k_new, v_new, case.k_pages, case.v_pages, case.block_table, case.seq_lens, offsets)
    for row, (count, length) in enumerate(zip(counts.tolist(), LENS)):
        places = torch.arange(length - count, length, device="cuda")
        pages, slots = case.block_table[row, places // 16].long(), places % 16
        for pool, new in ((case.k_pages, k_new), (case.v_pages, v_new)):
            assert torch.equal(pool[pages, :, slots], new[int(offsets[row]):int(offsets[row + 1])])
    check(*decode_attention(*arguments(case)), case, dtype="float16")


class DecodeStep(torch.nn.Module):
    """Append, then attend to what was appended: the order must survive compilation and capture."""

    def forward(self, q, k_new, v_new, k_pages, v_pages, block_table, seq_lens):
        append_tokens(k_new * 1, v_new, k_pages, v_pages, block_table, seq_lens)
        return decode_attention(q, k_pages, v_pages, block_table, seq_lens)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("graph", [False, True])
def test_append_and_decode_step_after_step(compiled: bool, graph: bool) -> None:
    lens = [5, 900, 33, 75, 4001, 1]  # every row's last page has room for the steps
    case = make_case(SHAPE, lens)
    model = torch.compile(DecodeStep(), fullgraph=True) if compiled else DecodeStep()
    fixed = (case.q, *new_tokens(len(lens)), case.k_pages, case.v_pages, case.block_table, case.seq_lens)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        case.seq_lens.add_(1)
        model(*fixed)  # builds the kernels; the first step overwrites what it appended
        case.seq_lens.sub_(1)
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        if graph:
            with torch.cuda.graph(captured, stream=stream):
                case.seq_lens.add_(1)
                out, lse = model(*fixed)
        for step in range(4):
            for array, new in zip(fixed, (torch.randn_like(case.q), *new_tokens(len(lens), seed=step + 1))):
                array.copy_(new)
            if graph:
                captured.replay()
            else:
                case.seq_lens.add_(1)
                out, lse = model(*fixed)
            torch.cuda.synchronize()
            check(out, lse, case, dtype="float16")
    assert case.seq_lens.tolist() == [length + 4 for length in lens]


@pytest.mark.parametrize("at, change, name", [
    (0, lambda q: q.float(), "dtype"), (0, lambda q: q[0], "q"), (1, lambda k: k[0], "k_pages"),
    (2, lambda v: v[:1], "v_pages"), (3, lambda table: table.float(), "block_table"),
    (4, lambda lens: lens[:-1], "block_table"), (4, lambda lens: lens.long(), "seq_lens"),
])
def test_wrong_arrays_are_named(at: int, change, name: str) -> None:
    given = list(arguments(make_case(SHAPE, LENS)))
    given[at] = change(given[at])
    with pytest.raises(ValueError, match=f"^({name}): expected"):
        decode_attention(*given)
    case = make_case(SHAPE, LENS)
    check(*decode_attention(*arguments(case)), case, dtype="float16")
