"""A step over several GPUs as a table on stdout."""
from __future__ import annotations

from rich.markup import escape

from pkvsim.pricing.counters import useful_kv_bytes
from pkvsim.reports.grid import Column, print_grid, print_line, table_console
from pkvsim.serving.costs import fit_note
from pkvsim.studies.several.kv_parallel import KVParallelStep


def print_kv_parallel(report: KVParallelStep) -> None:
    """A line a GPU, then what the merge adds and what one GPU would take."""
    console, whole = table_console(), report.whole
    lens, shape = whole.seq_lens, whole.shape
    print_line(
        console,
        f"[bold]{len(report.ranks)} x {escape(whole.device.label)}[/]: {int((lens > 0).sum()):,} rows of "
        f"{int(lens.sum()):,} tokens; of every {report.shares.cycle_pages:,} pages "
        f"{', '.join(map(str, report.shares.pages_of_rank))} to each GPU in turn",
        markup=True,
    )
    columns = [Column("GPU", "left"), *map(Column, ("tokens", "KV\nMB a layer", "closed\nus", "timeline\nus", "busy"))]
    cells = [
        [str(number), f"{int(rank.seq_lens.sum()):,}",
         f"{useful_kv_bytes(shape, rank.seq_lens, whole.options) / 1e6:,.1f}", f"{rank.routes[0].closed_us:,.1f}",
         f"{rank.routes[0].timeline_us:,.1f}", f"{rank.routes[0].busy_share:.0%}"]
        for number, rank in enumerate(report.ranks)
    ]
    print_grid(console, columns, cells)
    for number, rank in enumerate(report.ranks):
        print_line(console, f"GPU {number}: {rank.routes[0].why()}")
    one = whole.routes[0].closed_us
    print_line(
        console,
        f"- a layer: {report.layer_us:,.1f} us, the slowest GPU's {report.attention_us:,.1f} and "
        f"{report.exchange_us:,.1f} for {report.exchange_bytes / 1e3:,.1f} KB of states out of each; one GPU with all "
        f"pages: {one:,.1f} us "
        f"({report.layer_us / one if one else 1:.2f} x)",
    )
    print_line(console, f"- the link: {report.link.gb_s:,g} GB/s and {report.link.us:g} us one way; merging is an "
                        "assumption")
    print_line(console, f"- attention prices of {whole.device.name}: {fit_note(whole.device)}")
