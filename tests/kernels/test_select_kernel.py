"""cuda_src/select.cu and summaries.cu themselves, built for the CPU, against the rules of pkvsim.selection."""
from __future__ import annotations

import ctypes
import functools
import shutil
import tempfile
from pathlib import Path

import cpp
import ml_dtypes
import numpy as np
import nvrtc
import pytest
from decode_on_cpu import address, aligned
from paths import SUPPORT
from slow import slow_unless, slow_unless_of

from gpu.kernels import fields
from gpu.kernels.compile import SOURCE_DIR, compile_options
from gpu.kernels.launch import Arguments
from gpu.selection import variant
from pkvsim import DecodeShape
from pkvsim.selection import by_name
from pkvsim.selection.centroids import encode as encode_centroids
from pkvsim.selection.centroids import row_centroids
from pkvsim.selection.rules import Budget, Pins, top_pages
from pkvsim.selection.summaries import CODES, as_kept, encode, row_summaries

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@functools.cache
def build(defines: tuple, summaries: bool) -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp(prefix="pkv_select_"))
    try:
        for path in SOURCE_DIR.glob("*.cu*"):
            shutil.copy(path, folder)
        (folder / "mma.cuh").write_text("")
        macros = (f"-D{name}={value}" for name, value in (*defines, ("SUMMARIES", int(summaries))))
        built = cpp.build(SUPPORT / "select_harness.cpp", folder / "select.so", "-std=c++20", "-O1", "-w",
                          f"-I{folder}", f"-I{SUPPORT}", *macros)
        built.run.restype = ctypes.c_char_p
        return built
    finally:
        shutil.rmtree(folder)


def launch(kernel: str, defines: dict, grid: tuple[int, int], values: dict) -> None:
    (parameter,) = fields.KERNELS[kernel]
    written = Arguments(f"[{''.join(field.letter for field in parameter.fields)}]")
    written.write(*(values[field.name] for field in parameter.fields))
    library = build(tuple(sorted(defines.items())), kernel == "pkv_summarize_pages")
    assert library.arguments_bytes() == written.num_bytes
    complaint = library.run(ctypes.c_void_p(written.starts[0]), *grid)
    assert complaint is None, complaint


class Case:
    """A pool of keys with NaN wherever no row has a token, a step on it, and summaries that know nothing yet."""

    def __init__(self, shape: DecodeShape, dtype: str, lens: tuple[int, ...], seed: int, codes: bool = False) -> None:
        rng = np.random.default_rng(seed)
        self.shape, self.dtype, self.lens = shape, dtype, np.array(lens, np.int32)
        pages = -(-self.lens // shape.page_size)
        count = int(pages.sum()) + 2
        self.table = np.full((len(lens), int(pages.max()) + 3), 0x7FFFFFFF, np.int32)
        self.table[np.arange(self.table.shape[1]) < pages[:, None]] = rng.permutation(count)[: pages.sum()]
        scale = rng.exponential(1.0, (count, shape.num_kv_heads, 1, shape.head_dim))
        k = rng.standard_normal((count, shape.num_kv_heads, 1, shape.head_dim)) + scale * rng.standard_normal(
            (count, shape.num_kv_heads, shape.page_size, shape.head_dim))  # fmt: skip
        owned = np.zeros((count, shape.page_size), bool)
        for row, length in enumerate(lens):
            at = np.arange(length)
            owned[self.table[row, at // shape.page_size], at % shape.page_size] = True
        k.swapaxes(1, 2)[~owned] = np.nan
        self.k = aligned(k.astype(DTYPES[dtype]))
        q = rng.standard_normal((len(lens), shape.num_q_heads, shape.head_dim)) * 2
        self.q = aligned(q.astype(DTYPES[dtype]))
        self.summary_dtype = CODES if codes else None

    def summarize(self, kind: str, new_tokens: int = 2**31 - 1) -> None:
        pages = len(self.k), self.shape.num_kv_heads
        (inner, dtype), scales = variant.summary_arrays(kind, self.shape.head_dim, self.dtype, self.summary_dtype)
        unknown = np.full((*pages, *inner), 255, np.uint8) if dtype == CODES else np.full(
            (*pages, *inner), np.nan, DTYPES[dtype])  # fmt: skip
        self.summaries = aligned(unknown)
        inner, dtype = scales or ((2,), "float32")
        self.scales = aligned(np.full((*pages, *inner), np.nan, dtype))
        defines, k = variant.selection_defines(self.shape, self.dtype, kind, "maximum", self.summary_dtype), self.k
        touched = min(self.table.shape[1] * self.shape.page_size, new_tokens + self.shape.page_size - 1)
        grid = -(-(touched // self.shape.page_size + 1) // variant.WARPS), len(self.lens) * self.shape.num_kv_heads
        launch("pkv_summarize_pages", defines, grid, self.common() | {
            "k_pages": address(k), "k_page_stride": k[0].size, "k_head_stride": k[0, 0].size,
            "k_token_stride": k.shape[-1], "new_tokens": new_tokens})  # fmt: skip

    def common(self) -> dict:
        return {"summaries": address(getattr(self, "summaries", None)),
                "summary_scales": address(getattr(self, "scales", None)),
                "page_ids": address(self.table), "lengths": address(self.lens), "row_begins": 0,
                "batch_size": len(self.lens), "num_kv_heads": self.shape.num_kv_heads, "table_stride": self.table.shape[1],
                "num_pages": len(self.k), "max_tokens": self.table.shape[1] * self.shape.page_size}  # fmt: skip

    def select(self, method: str | None, *, budget: Budget, pins: Pins, chunk_pages: int, room: int,
               scores: np.ndarray | None = None, budgets: np.ndarray | None = None, warps: int = variant.WARPS):
        rule = None if method is None else by_name.method(method)
        aggregation = rule.AGGREGATION if rule else "maximum"
        defines = variant.selection_defines(self.shape, self.dtype, rule and rule.SUMMARY, aggregation,
                                            rule and self.summary_dtype, warps)
        lists, most = len(self.lens) * self.shape.num_kv_heads, self.table.shape[1]
        group = self.shape.group_size
        values, chunks = variant.page_values(self.shape, aggregation), -(-most // chunk_pages)
        work = aligned(np.full((lists, most, values), np.nan, np.float32)) if scores is None else scores
        tickets, sums = np.zeros(lists, np.int32), np.full((lists, chunks, group, 2), np.nan, np.float32)
        pages = np.full((len(self.lens), self.shape.num_kv_heads, room), -7, np.int32)
        counts = np.full(pages.shape[:2], -7, np.int32)
        given = self.common() | {
            "q": address(self.q), "scores": address(work), "sums": address(sums), "tickets": address(tickets),
            "budgets": address(budgets), "pages": address(pages), "counts": address(counts),
            "max_selected": room, "score_stride": most, "chunk_pages": chunk_pages, "sink_pages": pins.sink_pages, "recent_pages": pins.recent_pages,
            "least_pages": budget.least_pages, "parts": budget.parts, "scale": self.shape.head_dim**-0.5}
        launch("pkv_select_pages", defines, (chunks * self.shape.num_kv_heads, len(self.lens)), given)
        assert (tickets == 0).all()
        return pages, counts


CASES = [("mean_std", 128, 12, 16, "float16"), ("quest", 64, 3, 4, "bfloat16")]
CODED = [("mean_std", 128, 4, 16, "bfloat16"), ("quest", 64, 12, 4, "float16")]
OF_CENTROIDS = [("centroids", 128, 4, 16, "bfloat16"), ("centroids", 64, 12, 4, "float16"),
                ("centroids", 256, 3, 8, "float16")]


@pytest.mark.parametrize(("method", "head_dim", "group", "page_size", "dtype", "codes"),
                         slow_unless_of(
    lambda *case: case in ((*CASES[1], False), (*OF_CENTROIDS[1], False)),
    [*((*case, False) for case in (*CASES, *OF_CENTROIDS)), *((*case, True) for case in CODED)]))
def test_lists_are_those_of_the_rules(method, head_dim, group, page_size, dtype, codes) -> None:
    """A page that the rules take and the kernel leaves, or the other way, has a score as good as the last one taken."""
    shape = DecodeShape(2 * group, 2, head_dim, page_size)
    case = Case(shape, dtype, (0, 1, page_size * 40, page_size * 150 - page_size // 2), head_dim + group, codes)
    rule, budget, pins = by_name.method(method), Budget(0.2, 5), Pins(1, 2)
    case.summarize(rule.SUMMARY)
    for chunk_pages, warps in ((128, 8), (256, 8), (256, 16)):
        pages, counts = case.select(method, budget=budget, pins=pins, chunk_pages=chunk_pages, room=40, warps=warps)
        for row, length in enumerate(case.lens.tolist()):
            row_pages = -(-length // page_size)
            count = budget.pages(row_pages, pins)
            assert (counts[row] == count).all() and (pages[row, :, count:] == -7).all()
            for head in range(2 * (length > 0)):
                at = np.arange(length)
                keys = case.k[case.table[row, at // page_size], head, at % page_size].astype(np.float64)
                q = case.q[row, head * group : (head + 1) * group].astype(np.float64)
                found = as_kept(keys, page_size, rule.SUMMARY, case.summary_dtype)
                scores = rule.scores(q, found, head_dim**-0.5)
                got, want = pages[row, head, :count], top_pages(scores, count, pins)
                assert (np.diff(got) > 0).all() and got[0] >= 0 and got[-1] < row_pages
                assert set(np.flatnonzero(pins.pinned(row_pages))) <= set(got.tolist())
                edge = scores[[page for page in want if not pins.pinned(row_pages)[page]]].min(initial=np.inf)
                wrong = np.setxor1d(got, want)
                # MEAN_STD's squares are of eight bits, summaries of ten or seven; codes err only where one is a tie.
                np.testing.assert_allclose(scores[wrong], edge, rtol=0.03 if codes or dtype == "float16" else 0.1)
                assert len(wrong) <= (0.05 if codes else 0.15) * count + 2


@pytest.mark.parametrize("warps", slow_unless(lambda warps: warps == 16, [8, 16]))
def test_weights_may_lie_any_number_of_octaves_apart(warps) -> None:
    """Within 32 octaves keys are counted as they are made, and otherwise once the largest is known."""
    shape, pins, count = DecodeShape(4, 1, 64, 16), Pins(1, 2), 12
    case = Case(shape, "float16", (16 * 300,), 4)
    case.summarize("mean_std")
    for factor, least, most in ((0.25, 0, 20), (4, 33, 120)):
        q = case.q
        case.q = aligned((q.astype(np.float32) * factor).astype(np.float16))
        keys = case.k[case.table[0, :300], 0].reshape(-1, 64).astype(np.float64)
        rule = by_name.method("mean_std")
        scores = rule.scores(case.q[0].astype(np.float64), row_summaries(keys, 16, "mean_std"), 64**-0.5)
        ranked = scores[~pins.pinned(300)]
        assert least <= np.log2(ranked.max() / ranked.min()) <= most
        pages, counts = case.select("mean_std", budget=Budget(count / 300), pins=pins, chunk_pages=256, room=20, warps=warps)
        want = top_pages(scores, int(counts[0, 0]), pins)
        wrong = np.setxor1d(pages[0, 0, : counts[0, 0]], want)
        edge = min(scores[page] for page in want if not pins.pinned(300)[page])
        np.testing.assert_allclose(scores[wrong], edge, rtol=0.05)
        assert len(wrong) <= 2
        case.q = q


def test_given_scores_and_budgets_select_exactly() -> None:
    rng = np.random.default_rng(0)
    case = Case(DecodeShape(4, 2, 64, 16), "float16", (16 * 300, 16 * 77, 5, 0), 1)
    pins = Pins(2, 3)
    for scores in (rng.standard_normal((4, 2, 303)), rng.integers(-2, 3, (4, 2, 303)), np.zeros((4, 2, 303)),
                   np.exp(20 * rng.standard_normal((4, 2, 303)))):
        scores = aligned(scores.astype(np.float32))
        budgets = rng.integers(0, 330, (4, 2)).astype(np.int32)
        pages, counts = case.select(None, budget=Budget(0.1), pins=pins, chunk_pages=303, room=290, scores=scores,
                                    budgets=budgets)
        for (row, head), count in np.ndenumerate(counts):
            row_pages = -(-int(case.lens[row]) // 16)
            assert count == min(max(budgets[row, head], 5), row_pages, 290)
            want = top_pages(scores[row, head, :row_pages], count, pins)
            assert pages[row, head, :count].tolist() == want.tolist()


@pytest.mark.parametrize(("kind", "codes"), slow_unless_of(lambda kind, codes: codes == (kind == "min_max"), [
    ("mean_std", False), ("min_max", False), ("mean_std", True), ("min_max", True)]))  # fmt: skip
def test_summaries_follow_growth(kind, codes) -> None:
    """Those of the pages of the new tokens are right, whoever had these pages before; others stay as they were."""
    shape = DecodeShape(4, 2, 128, 16)
    case = Case(shape, "float16", (0, 1, 16, 17, 100), 3, codes)
    case.summarize(kind, new_tokens=20)
    for row, length in enumerate(case.lens.tolist()):
        at = np.arange(length)
        for head in range(2):
            keys = case.k[case.table[row, at // 16], head, at % 16].astype(np.float64).reshape(length, 128)
            want = row_summaries(keys, 16, kind)
            first = max(0, length - 20) // 16
            if codes:
                ids = case.table[row, : len(want)]
                made, scales = encode(want[first:], kind)
                np.testing.assert_allclose(case.scales[ids, head][first:], scales, rtol=1e-5)
                off = case.summaries[ids, head][first:].astype(int) - made
                assert np.abs(off).max(initial=0) <= 1 and (off != 0).mean() <= 0.01 if off.size else True
                assert (case.summaries[ids, head][:first] == 255).all() and np.isnan(case.scales[ids, head][:first]).all()
                continue
            got = case.summaries[case.table[row, : len(want)], head].astype(np.float64)
            np.testing.assert_allclose(got[first:], want[first:], atol=2e-3, rtol=1e-3)
            assert np.isnan(got[:first]).all()


@pytest.mark.parametrize(("head_dim", "page_size", "dtype"), slow_unless_of(lambda *case: case[0] == 64, [
    (64, 16, "float16"), (128, 16, "bfloat16"), (256, 4, "float16"), (64, 40, "bfloat16")]))  # fmt: skip
def test_centroids_follow_growth(head_dim, page_size, dtype) -> None:
    """Also of pages of one token, and of pages whose tokens are fewer keys than there are parts."""
    shape = DecodeShape(4, 2, head_dim, page_size)
    case = Case(shape, dtype, (0, 1, page_size, page_size + 1, 6 * page_size + 3), 3)
    repeated = case.table[4, 5]
    case.k[repeated] = case.k[repeated][:, np.arange(page_size) % 3]
    for new_tokens in (2**31 - 1, page_size + 4):
        case.summarize("centroids", new_tokens=new_tokens)
        check_centroids(case, new_tokens)


def check_centroids(case: Case, new_tokens: int) -> None:
    page_size = case.shape.page_size
    for row, length in enumerate(case.lens.tolist()):
        at = np.arange(length)
        for head in range(2):
            keys = case.k[case.table[row, at // page_size], head, at % page_size].astype(np.float64)
            want = encode_centroids(row_centroids(keys.reshape(length, case.shape.head_dim), page_size))
            ids, first = case.table[row, : len(want.codes)], max(0, length - new_tokens) // page_size
            codes, scales = case.summaries[ids, head], case.scales[ids, head]
            assert (codes[:first] == 255).all() and np.isnan(scales[:first]).all()
            np.testing.assert_allclose(scales[first:].astype(float), want.scales[first:].astype(float), rtol=2e-3)
            off = np.stack((codes[first:] & 15, codes[first:] >> 4)).astype(int) - np.stack(
                (want.codes[first:] & 15, want.codes[first:] >> 4))
            assert np.abs(off).max(initial=0) <= 1 and np.count_nonzero(off) <= 0.01 * off.size


def test_of_equally_far_tokens_the_first_is_taken_wherever_keys_lie() -> None:
    """Keys of few small integers, at the origin or far from it, whose distances are exact and often the same, in pages
    of every number of tokens; in some of them one token lies far from all others."""
    shape, rng = DecodeShape(4, 2, 64, 16), np.random.default_rng(7)
    case = Case(shape, "float16", (*range(1, 17), 16 * 40 - 5), 5)
    near = rng.integers(-1, 2, case.k.shape) * (rng.random(case.k.shape) < 0.2)
    near[::3, :, ::5] += rng.integers(-400, 400, (2, 1, 64))
    near += np.where(np.arange(2) == 1, 1024, 0)[:, None, None]
    case.k = aligned(np.where(np.isnan(case.k), case.k, near.astype(np.float16)))
    case.summarize("centroids")
    check_centroids(case, 2**31 - 1)
    for row, length in enumerate(case.lens.tolist()):
        at = np.arange(length)
        for head in range(2):
            want = row_centroids(case.k[case.table[row, at // 16], head, at % 16].astype(np.float64), 16).log2_counts
            got = case.scales[case.table[row, : len(want)], head, :, 1]
            assert (got == want.astype(np.float16)).all()


def test_a_long_row_selects_exactly() -> None:
    """More pages than a thread reads at once, of scores whose k-th largest has many, few or no others beside it."""
    rng, pages, pins = np.random.default_rng(5), 5003, Pins(1, 2)
    case = Case(DecodeShape(4, 4, 64, 1), "float16", (pages,), 1)
    scores = aligned(np.stack((rng.standard_normal(pages), np.exp(rng.standard_normal(pages)),
                               1 + rng.integers(0, 900, pages) * 2.0**-20, np.arange(pages) % 3 == 0),
                              )[None].astype(np.float32))  # fmt: skip
    scores = aligned(np.pad(scores, ((0, 0), (0, 0), (0, 3)), constant_values=np.nan))
    for count in (4, 500, 3500):
        got, counts = case.select(None, budget=Budget(0.1), pins=pins, chunk_pages=case.table.shape[1], room=3600,
                                  scores=scores, budgets=np.full((1, 4), count, np.int32))
        for head in range(4):
            want = top_pages(scores[0, head, :pages], count, pins)
            assert counts[0, head] == count and got[0, head, :count].tolist() == want.tolist()


@pytest.mark.parametrize(("method", "head_dim", "group", "page_size", "dtype"),
                         slow_unless_of(lambda *case: case == CASES[1], CASES))
def test_there_is_room_for_every_chunk(method, head_dim, group, page_size, dtype) -> None:
    """The shared memory that is asked for holds what a CTA keeps, whatever the number of lists cuts a row into."""
    rule, shape = by_name.method(method), DecodeShape(group, 1, head_dim, page_size)
    aggregation = rule.AGGREGATION
    for warps in (variant.WARPS, variant.WIDE_WARPS):
        defines = variant.selection_defines(shape, dtype, rule.SUMMARY, aggregation, warps=warps)
        needed = build(tuple(sorted(defines.items())), False).needed_bytes
        for max_pages in (1, 128, 4097, variant.most_pages(shape, aggregation, 227 * 1024)):
            room = variant.select_bytes(shape, max_pages, aggregation, warps)
            assert room <= 227 * 1024
            for lists in (1, 8, 512):
                chunks, each = variant.chunks(max_pages, lists, 132, variant.page_values(shape, aggregation), warps)
                assert chunks * each >= max_pages and each % (warps * 16) == 0
                assert needed(max_pages, each) <= room


def test_a_row_is_cut_for_the_gpu() -> None:
    assert variant.chunks(2048, 512, 132, 4) == (3, 768)
    assert variant.chunks(8192, 8, 132, 4) == (32, 256)
    assert variant.chunks(8192, 512, 132, 16) == (32, 256)
    assert variant.chunks(1, 1, 132) == (1, 128)
    assert variant.chunks(8192, 8, 132, 4, 16) == (16, 512)
    shape = DecodeShape(32, 8, 128, 16)
    for max_pages, lists, warps in ((8192, 8, 16), (32768, 8, 16), (4096, 16, 8), (2048, 32, 8), (8192, 64, 8),
                                    (2048, 512, 8), (256, 8, 8)):  # fmt: skip
        assert variant.warps_of(shape, max_pages, lists, 132, "softmax_mean") == warps
    assert variant.warps_of(DecodeShape(128, 8, 128, 16), 8192, 8, 132, "softmax_mean") == 8


@pytest.mark.parametrize(("capability", "head_dim", "group", "dtype", "method", "summary_dtype"), slow_unless_of(lambda *case: case[-1] == CODES and case[0] == 90 or case[1:] == (128, 4, "float16", "centroids", None), [
    (90, 128, 4, "float16", "centroids", None), (86, 64, 16, "bfloat16", "centroids", None),
    (90, 256, 8, "bfloat16", "centroids", None), (90, 128, 16, "float16", "centroids", None),
    (90, 64, 3, "float16", "centroids", None), (86, 128, 4, "float16", "mean_std", None), (90, 128, 16, "bfloat16", "mean_std", None),
    (86, 64, 16, "bfloat16", "quest", None), (90, 256, 8, "float16", "mean_std", None),
    (90, 128, 4, "float16", None, None), (90, 128, 4, "float16", "mean_std", CODES),
    (86, 256, 8, "bfloat16", "quest", CODES), (90, 128, 4, "float16", "quest", None),
    (90, 256, 4, "float16", "mean_std", None)]))  # fmt: skip
def test_they_fit_the_registers(capability, head_dim, group, dtype, method, summary_dtype) -> None:
    rule = None if method is None else by_name.method(method)
    shape = DecodeShape(group, 1, head_dim, 16)
    variant.check_shape(shape, dtype)
    aggregation = rule.AGGREGATION if rule else "maximum"
    for warps in {variant.WARPS, rule and variant.warps_of(shape, 8192, 8, 132, aggregation)} - {None}:
        defines = variant.selection_defines(shape, dtype, rule and rule.SUMMARY, aggregation, summary_dtype, warps)
        used = nvrtc.kernel_resources(SOURCE_DIR / "select.cu", capability, compile_options(defines))
        used = used["pkv_select_pages"]
        assert used.spills == used.stack == 0 and used.registers * warps * 32 <= 65536
    if rule is not None:
        for page_size in (16, 64) if method == "centroids" else (16,):  # small and large ones are made in other ways
            defines |= {"WARPS": variant.WARPS, "PAGE_SIZE": page_size}
            used = nvrtc.kernel_resources(SOURCE_DIR / "summaries.cu", capability, compile_options(defines))
            assert used["pkv_summarize_pages"].spills == used["pkv_summarize_pages"].stack == 0
