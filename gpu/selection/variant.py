"""The selecting kernels' variants and launches. Needs neither CuPy nor a GPU."""
from __future__ import annotations

from typing import NamedTuple

from gpu.kernels.variant import DTYPES
from pkvsim import DecodeShape
from pkvsim.selection.centroids import CENTROIDS, ELEMENTS_PER_BYTE, PARTS
from pkvsim.selection.methods import mean_std
from pkvsim.selection.served import HEAD_DIMS, most_group_size
from pkvsim.selection.summaries import CODES, MEAN_STD, MIN_MAX, check_form

WARPS, WIDE_WARPS = 8, 16  # of a CTA; of one that selects from a long list, where others would find no SM to score on
# Value of SCORING by the kind of summary; None: scores are given.
SCORINGS = {None: 0, MEAN_STD: 1, MIN_MAX: 2, CENTROIDS: 3}
AGGREGATIONS = {"maximum": 0, "softmax_mean": 1}  # value of AGGREGATION
PAGES_AT_ONCE = WARPS * 16  # pages that a CTA scores at a time at least: SCORED_PAGES of each warp
WARPS_PER_SM = 16
LEAST_CHUNKS = 3  # of a long list: while one CTA selects, others score, which takes CTAs that end at different times
WIDE_PAGES = 8192  # of a long list: of 4,096 pages each, twice as many lists took an H200 1.1 to 1.9 us more
MAX_LISTS = 65535  # of a launch: its grid's second axis
MOST_WIDE_ELEMENTS = 1024  # of a group's queries
QUERY_BOUNDARY_BYTES = 16  # where queries begin, of which a lane reads so many at once
LOGIT_BYTES = 2048  # for each warp at most, of a chunk whose logits become weights


def check_shape(shape: DecodeShape, dtype: str) -> None:
    """Raises ValueError naming what the kernels do not serve."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if shape.head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim: expected one of {HEAD_DIMS} where pages are selected, got {shape.head_dim}")
    most = most_group_size(shape.head_dim)
    if shape.group_size > most:
        raise ValueError(f"group_size: expected at most {most} of head_dim {shape.head_dim} where pages are selected, "
                         f"got {shape.group_size}")


class SummaryArrays(NamedTuple):
    """What is kept of each page and KV head: (shape, dtype) of summaries, and of their scales where there are any."""

    array: tuple[tuple[int, ...], str]
    scales: tuple[tuple[int, ...], str] | None


def summary_arrays(kind: str, head_dim: int, dtype: str, summary_dtype: str | None) -> SummaryArrays:
    """dtype: of the pages. Raises ValueError naming summary_dtype."""
    check_form(kind, summary_dtype)
    if kind == CENTROIDS:
        return SummaryArrays(((PARTS, head_dim // ELEMENTS_PER_BYTE), CODES), ((PARTS, 2), "float16"))
    return SummaryArrays(((2, head_dim), summary_dtype or dtype), None if summary_dtype is None else ((2,), "float32"))


def selection_defines(shape: DecodeShape, dtype: str, summary: str | None, aggregation: str,
                      summary_dtype: str | None = None, warps: int = WARPS) -> dict[str, int]:
    """Compile-time constants of select.cu and summaries.cu."""
    return {"HEAD_DIM": shape.head_dim, "GROUP_SIZE": shape.group_size, "PAGE_SIZE": shape.page_size,
            "DTYPE_BF16": DTYPES[dtype], "WARPS": warps, "SCORING": SCORINGS[summary],
            "AGGREGATION": AGGREGATIONS[aggregation], "DEVIATIONS": mean_std.DEVIATIONS,
            "SUMMARY_CODES": int(summary_dtype == CODES or summary == CENTROIDS)}


def page_values(shape: DecodeShape, aggregation: str) -> int:
    """Floats that are kept of a page until it is selected: pkv::PAGE_VALUES, 1 of scores that are given."""
    return 1 << (shape.group_size - 1).bit_length() if aggregation == "softmax_mean" else 1


def select_bytes(shape: DecodeShape, max_pages: int, aggregation: str, warps: int = WARPS) -> int:
    """Bytes of pkv::SelectMemory and what lies behind it, of rows of so many pages in chunks of any size."""
    values = page_values(shape, aggregation)
    top = (2048 + 2 * warps + 4) * 4  # pkv::TopPages, in whole 16 bytes
    own = -(-(top + 2 * warps * values * 4 + 4) // 16) * 16
    factors = (max_pages // (warps * 16) + 1) * values
    words = -(-(max_pages + 2 * -(-max_pages // 32)) // 4) * 4  # pkv::select_words
    return own + max(LOGIT_BYTES * warps, (words + factors) * 4)


def most_pages(shape: DecodeShape, aggregation: str, limit_bytes: int) -> int:
    """Pages of a row that so many bytes are enough for."""
    most = limit_bytes // 4
    while select_bytes(shape, most, aggregation) > limit_bytes:
        most -= PAGES_AT_ONCE
    return most


def chunks(max_pages: int, num_lists: int, num_sms: int, values: int = 1, warps: int = WARPS) -> tuple[int, int]:
    """(CTAs of each list, pages that each scores) of a step whose rows have room for max_pages: CTAs enough for the
    GPU, no fewer than LEAST_CHUNKS of each list, of no fewer pages than one scores at a time, nor more than there is
    room for the logits of. values: page_values()."""
    wanted = max(LEAST_CHUNKS, -(-num_sms * (WARPS_PER_SM // warps) // max(1, num_lists)))
    each, at_once = -(-max_pages // wanted), warps * 16
    each = min(-(-each // at_once) * at_once, LOGIT_BYTES * warps // (4 * values))
    return -(-max_pages // each), each


def warps_of(shape: DecodeShape, max_pages: int, num_lists: int, num_sms: int, aggregation: str) -> int:
    """Warps of a CTA: WIDE_WARPS for few long lists, which end at about one time, so that what one CTA selects no other
    scores meanwhile; where the CTAs are one for nearly each SM, and registers are enough (pkv::SELECT_CTAS)."""
    if max_pages < WIDE_PAGES or shape.head_dim > 128 or shape.group_size * shape.head_dim > MOST_WIDE_ELEMENTS:
        return WARPS
    ctas = num_lists * chunks(max_pages, num_lists, num_sms, page_values(shape, aggregation), WIDE_WARPS)[0]
    return WIDE_WARPS if 3 * num_sms <= 4 * ctas <= 4 * num_sms else WARPS
