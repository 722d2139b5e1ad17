"""Where a command's requests come from: a trace file and what is done to it, or a load that is made up.

A command that takes these options has one parameter `source: RequestOptions = RequestOptions()` and the decorator
pkvsim.commands.options.group.with_option_groups, which gives the command line one option for each of its fields.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from pkvsim.commands.options.group import OptionGroup
from pkvsim.commands.shared_options import Jitter, Limit, RateScale, Seed

if TYPE_CHECKING:
    from pkvsim.traces.requests import RequestTrace

DEFAULT_REQUESTS = 1000
LENGTHS = "a number, a range (100-2000), lognormal:mean=1024,p99=8192, or file:PATH for a trace's own"


@dataclass(frozen=True, slots=True)
class RequestOptions(OptionGroup):
    """The options as they are given; None or the default where they are not."""

    rate_scale: RateScale = 1.0
    jitter: Jitter = 0.0
    limit: Limit = None
    seed: Seed = 0
    time_unit: Annotated[
        Optional[str], typer.Option(help="Unit of a file's arrivals: s, ms, us, ns or steps; else its own.")
    ] = None
    step_seconds: Annotated[
        Optional[float], typer.Option(help="Seconds of an arrival step of the paper's format; 0.02 by default.")
    ] = None
    input_tokens: Annotated[
        Optional[str], typer.Option(help=f"Instead of a file, requests with prompts of so many tokens: {LENGTHS}.")
    ] = None
    output_tokens: Annotated[Optional[str], typer.Option(help="Output tokens of such requests: the same.")] = None
    requests: Annotated[
        Optional[int], typer.Option(help=f"How many such requests; {DEFAULT_REQUESTS:,} by default.")
    ] = None
    rate: Annotated[
        Optional[float],
        typer.Option(help="Requests per second: a file's are scaled to it; made-up ones without it come all at once."),
    ] = None
    arrivals: Annotated[
        Optional[str],
        typer.Option(help="poisson (default), constant, or gamma:0.5 (burstiness as in vLLM's benchmark)."),
    ] = None
    concurrency: Annotated[
        Optional[int],
        typer.Option(help="Most requests in flight; without --rate the next one is sent when one ends (closed loop)."),
    ] = None
    turns: Annotated[
        Optional[str], typer.Option(help="Requests of a conversation, each prompt with the earlier ones: as lengths.")
    ] = None
    think_time: Annotated[
        Optional[str], typer.Option(help="Seconds from an answer to the next turn: 10, 5-30 or exponential:mean=10.")
    ] = None
    shared_prefix: Annotated[
        Optional[int], typer.Option(help="Tokens that all prompts begin with, on top of --input-tokens.")
    ] = None

    def load(self, file: str | None) -> RequestTrace:
        """The requests of the file, or of the load that the options describe. Raises ValueError naming an option."""
        if file is None and self.input_tokens is None and self.output_tokens is None:
            raise ValueError("trace: expected a request trace, or --input-tokens and --output-tokens in place of one")
        return self._made_up() if file is None else self._from_file(file)

    def _from_file(self, file: str) -> RequestTrace:
        from pkvsim.traces.readers import PAPER_STEP_S, load_requests
        from pkvsim.traces.requests import at_rate, closed_loop

        self._refuse(
            "a load without a file",
            ("input_tokens", "output_tokens", "requests", "arrivals", "turns", "think_time", "shared_prefix"),
        )
        trace = load_requests(
            file,
            rate_scale=self.rate_scale,
            jitter_s=self.jitter,
            limit=self.limit,
            seed=self.seed,
            step_s=PAPER_STEP_S if self.step_seconds is None else self.step_seconds,
            time_unit=self.time_unit,
        )
        if self.rate is not None:
            trace = at_rate(trace, self.rate)
        if self.concurrency is None:
            return trace
        return closed_loop(trace, self.concurrency, keep_arrivals=self.rate is not None)

    def _made_up(self) -> RequestTrace:
        from pkvsim.traces.distributions import constant, parse_think, parse_tokens, parse_turns
        from pkvsim.traces.requests import first_requests, jitter, scale_rate
        from pkvsim.traces.synthetic import Gaps, make_load, parse_gaps

        self._refuse("a trace file", ("time_unit", "step_seconds"))
        if self.input_tokens is None or self.output_tokens is None:
            missing = "input_tokens" if self.input_tokens is None else "output_tokens"
            raise ValueError(f"{missing}: expected, as a load without a file needs both lengths")
        if self.arrivals is not None and self.rate is None:
            raise ValueError("arrivals: expected only with --rate")
        if self.think_time is not None and self.turns is None:
            raise ValueError("think_time: expected only with --turns")
        trace = make_load(
            input_tokens=parse_tokens("input_tokens", self.input_tokens, "prompt_tokens"),
            output_tokens=parse_tokens("output_tokens", self.output_tokens, "output_tokens"),
            requests=DEFAULT_REQUESTS if self.requests is None else self.requests,
            rate_per_s=self.rate,
            gaps=Gaps() if self.arrivals is None else parse_gaps("arrivals", self.arrivals),
            concurrency=self.concurrency,
            turns=constant(1) if self.turns is None else parse_turns("turns", self.turns),
            think_s=constant(0.0) if self.think_time is None else parse_think("think_time", self.think_time),
            shared_prefix_tokens=self.shared_prefix or 0,
            seed=self.seed,
        )
        if self.limit is not None:
            trace = first_requests(trace, self.limit)
        return jitter(scale_rate(trace, self.rate_scale), self.jitter, seed=self.seed)

    def _refuse(self, what: str, names: tuple[str, ...]) -> None:
        """Options that say nothing here would be ignored without a word otherwise."""
        given = [name for name in names if getattr(self, name) is not None]
        if given:
            raise ValueError(f"{given[0]}: expected only with {what}")
