"""pkvsim trace."""
from __future__ import annotations

import json
from typing import Annotated, Optional

import typer

from pkvsim.commands.errors import one_line_errors
from pkvsim.commands.load_options import RequestOptions
from pkvsim.commands.options.group import with_option_groups
from pkvsim.commands.shared_options import AsJson


@with_option_groups
def trace(
    file: Annotated[
        Optional[str],
        typer.Argument(metavar="FILE", help="A request trace, or - for standard input; its content says the format."),
    ] = None,
    source: RequestOptions = RequestOptions(),
    plot: Annotated[Optional[str], typer.Option(help="Draw rate and lengths to this .png or .svg file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Shows what is in a request trace, or in a load that is made up: rates, lengths, repeated prompt blocks.

    Reads what Azure, Mooncake, Bailian, BurstGPT, Splitwise, vidur, AIPerf, LLMServingSim and ShareGPT publish, the
    results of vLLM's benchmark, and CSV or JSON of your own (prompt_len, decode_len, arrival); also .gz and .zst.

    \b
    Examples:
      pkvsim trace AzureLLMInferenceTrace_code.csv
      pkvsim trace conversation_trace.jsonl --limit 1000 --rate-scale 2 --json
      pkvsim trace BurstGPT_1.csv --plot burstgpt.svg
      pkvsim trace --input-tokens lognormal:mean=1024,p99=8192 \\
          --output-tokens 50-500 --rate 4
      pkvsim trace --input-tokens 200 --output-tokens 300 --turns 1-8 \\
          --think-time exponential:mean=10 --rate 4
    """
    with one_line_errors():
        from pkvsim.traces.summary import summary

        requests = source.load(file)
        figures = summary(requests)
        if plot is not None:
            from pkvsim.reports.plot_trace import plot_trace

            plot_trace(requests, plot)
    if as_json:
        typer.echo(json.dumps(figures.to_dict(), indent=2, allow_nan=False))
        return
    from pkvsim.reports.table_trace import print_trace

    print_trace(figures)
