"""Replicas that help each other out of a full memory, as a table on stdout."""
from __future__ import annotations

from collections.abc import Sequence

from pkvsim.reports.grid import Column, print_grid, print_line, table_console
from pkvsim.studies.lend.run import LendResult


def print_lend(results: Sequence[LendResult], about: str) -> None:
    """A line a way."""
    console = table_console()
    print_line(console, about)
    heads = (
        "served", "tokens\na second", "first token\np50 ms", "\np99 ms", "latency\np50 ms", "\np99 ms",
        "borrowed\npages",
        "moved", "swapped", "again", "lenders'\nms", "exchange\nms",
    )  # fmt: skip
    print_grid(console, [Column("way", "left"), *map(Column, heads)], [_cells(result) for result in results])
    rejected = {result.way: result.tally.rejected for result in results if result.tally.rejected}
    if rejected:
        words = ", ".join(f"{way} {count:,}" for way, count in rejected.items())
        print_line(console, f"- rejected, as no memory could ever hold them: {words}")
    print_line(console, "- prices are plain rooflines; host memory, the merge and shares of the peak are assumptions")


def _cells(result: LendResult) -> list[str]:
    figures, tally = result.to_dict(), result.tally

    def ms(name: str) -> str:
        return "-" if figures[name] is None else f"{figures[name]:,.1f}"

    return [
        result.way, f"{figures['served']:,}", f"{figures['tokens_per_s']:,.1f}", ms("first_token_p50_ms"),
        ms("first_token_p99_ms"), ms("latency_p50_ms"), ms("latency_p99_ms"), f"{tally.borrowed_pages:,}",
        f"{tally.moves:,}", f"{tally.swaps:,}", f"{tally.recomputes:,}", f"{tally.lent_us / 1e3:,.1f}",
        f"{tally.exchange_us / 1e3:,.1f}",
    ]  # fmt: skip
