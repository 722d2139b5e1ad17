"""A trace's figures as tables on stdout, its histograms as bars."""
from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from pkvsim.reports.grid import Column, print_grid, print_line, table_console
from pkvsim.traces.summary import LengthSummary, TraceSummary

TEXT_CELLS = 36  # The histogram's other columns take so many cells.
MOST_COLUMNS = 80  # that the bars fill, however wide the terminal
EIGHTHS = " ▏▎▍▌▋▊▉█"


def print_trace(trace: TraceSummary) -> None:
    """What `pkvsim trace` shows."""
    console = table_console()
    print_line(
        console,
        f"[bold]{escape(trace.name)}[/]: {trace.requests:,} requests in {_seconds(trace.duration_s)}",
        markup=True,
    )
    if trace.rate_per_s is not None:
        gaps = "" if trace.interarrival_cv is None else f", inter-arrival CV {trace.interarrival_cv:.2f}"
        print_line(console, f"{trace.rate_per_s:.{2 if trace.rate_per_s >= 0.1 else 5}f} requests/s{gaps}")
    if trace.prefix_reuse is not None:
        print_line(
            console,
            f"{trace.prefix_reuse:.1%} of {trace.prompt_blocks:,} prompt blocks of {trace.block_tokens} tokens "
            "are hits of an infinite prefix cache",
        )
    if trace.follow_ups:
        print_line(
            console, f"{trace.follow_ups:,} requests wait for the end of an earlier one of their conversation"
        )
    for note in trace.notes:
        print_line(console, f"note: {note}")
    _print_percentiles(console, trace)
    width = min(console.width, MOST_COLUMNS)
    cells = max(4, min(32, (width - TEXT_CELLS) // 2))
    _print_histogram(console, trace, cells=cells, blocks="utf" in console.encoding.lower())


def _print_percentiles(console: Console, trace: TraceSummary) -> None:
    heads = ("p50", "p90", "p99", "max", "mean", "total")
    rows = []
    for name, tokens in (("prompt", trace.prompt), ("output", trace.output)):
        values = (tokens.p50, tokens.p90, tokens.p99, tokens.max, tokens.mean, tokens.total)
        rows.append((name, *(f"{value:,.0f}" for value in values)))
    print_grid(
        console, [Column("", "left"), *(Column(head) for head in heads)], rows, title="tokens per request"
    )


def _print_histogram(console: Console, trace: TraceSummary, *, cells: int, blocks: bool) -> None:
    """Bars of at most `cells` cells, of block characters or of #."""
    bars = Column("".ljust(cells), "left")
    columns = [Column("tokens"), Column("prompt"), bars, Column("output"), bars]
    prompts, outputs = _counts(trace.prompt), _counts(trace.output)
    rows = []
    for low in sorted(prompts | outputs):
        row = [f"{low:,}"]
        for counts in (prompts, outputs):
            count = counts.get(low, 0)
            row += [f"{count:,}" if count else "", _bar(count / max(counts.values()), cells, blocks=blocks)]
        rows.append(row)
    print_grid(console, columns, rows, title="requests by tokens, each row up to the next")


def _counts(tokens: LengthSummary) -> dict[int, int]:
    return dict(zip(tokens.bin_edges, tokens.bin_counts))


def _bar(share: float, cells: int, *, blocks: bool) -> str:
    """A bar of `share` of the cells, to an eighth of a cell; anything above nothing shows."""
    eighths = round(share * cells * 8)
    if share > 0 and eighths == 0:
        eighths = 1
    if not blocks:  # The terminal cannot encode block characters.
        return "#" * -(-eighths // 8)
    return EIGHTHS[-1] * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def _seconds(seconds: float) -> str:
    for name, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:,.1f} s"
