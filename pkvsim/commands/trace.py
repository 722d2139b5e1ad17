"""pkvsim trace."""
from __future__ import annotations

import json
from typing import Annotated, Optional

import typer

from pkvsim.commands.errors import one_line_errors
from pkvsim.commands.shared_options import AsJson, Jitter, Limit, RateScale, Seed


def trace(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A request trace; its format is seen from its content.")],
    rate_scale: RateScale = 1.0,
    jitter: Jitter = 0.0,
    limit: Limit = None,
    seed: Seed = 0,
    plot: Annotated[Optional[str], typer.Option(help="Draw rate and lengths to this .png or .svg file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Shows what is in a request trace: rates, lengths and how many prompt blocks repeat.

    Reads Azure LLM inference CSV, Mooncake JSON lines, BurstGPT CSV, vidur CSV, and the paper's CSV or JSON
    (prompt_len, decode_len, arrival).

    \b
    Examples:
      pkvsim trace AzureLLMInferenceTrace_code.csv
      pkvsim trace conversation_trace.jsonl --limit 1000 --rate-scale 2 --json
      pkvsim trace BurstGPT_1.csv --plot burstgpt.svg
    """
    with one_line_errors():
        from pkvsim.traces.readers import load_requests
        from pkvsim.traces.summary import summary

        requests = load_requests(file, rate_scale=rate_scale, jitter_s=jitter, limit=limit, seed=seed)
        figures = summary(requests)
        if plot is not None:
            from pkvsim.reports.plot_trace import plot_trace

            plot_trace(requests, plot)
    if as_json:
        typer.echo(json.dumps(figures.to_dict(), indent=2, allow_nan=False))
        return
    from pkvsim.reports.table_trace import print_trace

    print_trace(figures)
