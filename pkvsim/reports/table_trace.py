"""A trace's figures as tables on stdout, its histograms as bars."""
from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pkvsim.traces.summary import LengthSummary, TraceSummary

TEXT_CELLS = 36  # what the histogram's columns other than the bars take
EIGHTHS = " ▏▎▍▌▋▊▉█"


def print_trace(trace: TraceSummary) -> None:
    """What `pkvsim trace` shows."""
    console = Console(highlight=False)
    console.print(f"[bold]{escape(trace.name)}[/]: {trace.requests:,} requests in {_seconds(trace.duration_s)}")
    if trace.rate_per_s is not None:
        gaps = "" if trace.interarrival_cv is None else f", inter-arrival CV {trace.interarrival_cv:.2f}"
        console.print(f"{trace.rate_per_s:.{2 if trace.rate_per_s >= 0.1 else 5}f} requests/s{gaps}")
    if trace.prefix_reuse is not None:
        console.print(
            f"{trace.prefix_reuse:.1%} of {trace.prompt_blocks:,} prompt blocks of {trace.block_tokens} tokens "
            "are hits of an infinite prefix cache",
            soft_wrap=True,
        )
    if trace.follow_ups:
        console.print(f"{trace.follow_ups:,} requests wait for the end of an earlier one of their conversation")
    for note in trace.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    console.print(_percentiles(trace))
    cells = max(4, min(32, (console.width - TEXT_CELLS) // 2))
    console.print(_histogram(trace, cells=cells, blocks="utf" in console.encoding.lower()))


def _percentiles(trace: TraceSummary) -> Table:
    table = Table(title="tokens per request", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("p50", "p90", "p99", "max", "mean", "total"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, tokens in (("prompt", trace.prompt), ("output", trace.output)):
        values = (tokens.p50, tokens.p90, tokens.p99, tokens.max, tokens.mean, tokens.total)
        table.add_row(name, *(f"{value:,.0f}" for value in values))
    return table


def _histogram(trace: TraceSummary, *, cells: int, blocks: bool) -> Table:
    """Bars of at most `cells` cells, of block characters or of #."""
    table = Table(title="requests by tokens, each row up to the next", title_justify="left")
    table.add_column("tokens", justify="right", no_wrap=True)
    for name in ("prompt", "output"):
        table.add_column(name, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True, min_width=cells)
    prompts, outputs = _counts(trace.prompt), _counts(trace.output)
    for low in sorted(prompts | outputs):
        row = []
        for counts in (prompts, outputs):
            count = counts.get(low, 0)
            row += [f"{count:,}" if count else "", _bar(count / max(counts.values()), cells, blocks=blocks)]
        table.add_row(f"{low:,}", *row)
    return table


def _counts(tokens: LengthSummary) -> dict[int, int]:
    return dict(zip(tokens.bin_edges, tokens.bin_counts))


def _bar(share: float, cells: int, *, blocks: bool) -> str:
    """A bar of `share` of the cells, to an eighth of a cell; anything above nothing shows."""
    eighths = round(share * cells * 8)
    if share > 0 and eighths == 0:
        eighths = 1
    if not blocks:  # a terminal that cannot encode block characters
        return "#" * -(-eighths // 8)
    return EIGHTHS[-1] * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def _seconds(seconds: float) -> str:
    for name, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:,.1f} s"
