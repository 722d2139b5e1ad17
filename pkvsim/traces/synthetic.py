"""A load without a file: requests of given lengths that arrive at a rate, or from a number of waiting clients.

Five streams of random numbers, one each for prompt lengths, output lengths, gaps, turns and think times, so that
changing one option leaves the draws of the others as they are.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pkvsim.shapes import MAX_TOKENS, check_int
from pkvsim.traces.distributions import MAX_TURNS, Distribution, Samples, constant, draw, draw_whole
from pkvsim.traces.requests import MAX_SEED, RequestTrace, renumber

BLOCK_TOKENS = 16  # tokens of a block of the prompts of conversations: vLLM's default block size
MAX_LOAD_REQUESTS = 10**7
MAX_RATE = 1e9  # requests per second, and the least is its reciprocal
NAMED_GAPS = {"poisson": 1.0, "constant": math.inf}  # burstiness by name
GAMMA = "gamma:"
MAX_BURSTINESS = 1e6
ARRIVALS_SYNTAX = "poisson, constant, or gamma:BURSTINESS like gamma:0.5"


@dataclass(frozen=True, slots=True)
class Gaps:
    """Gaps between arrivals: gamma of shape `burstiness` and mean 1 / rate, as `vllm bench serve --burstiness` has it.

    1 is a Poisson process, less comes in bursts (the gaps' CV is 1 / sqrt(burstiness)), infinity is one constant gap.
    """

    burstiness: float = 1.0


def make_load(
    *,
    input_tokens: Distribution,
    output_tokens: Distribution,
    requests: int,
    rate_per_s: float | None = None,
    gaps: Gaps = Gaps(),
    concurrency: int | None = None,
    turns: Distribution = constant(1),
    think_s: Distribution = constant(0.0),
    shared_prefix_tokens: int = 0,
    seed: int = 0,
    name: str = "load",
) -> RequestTrace:
    """`requests` requests, the same for equal arguments.

    input_tokens, output_tokens: tokens of each prompt and output, rounded and at least 1. Two Samples of one length
    keep their pairs: a request has prompt and output of one request of the file.
    rate_per_s, gaps: when requests arrive, from 0 s on; of conversations, when they begin, so often that requests
    arrive at rate_per_s on average (turns considered). None: all are there at 0 s.
    concurrency: at most so many requests in flight. Without a rate this is a closed loop: a request is sent when one
    ends. It becomes the trace's `concurrency`, and the serving loop keeps to it.
    turns: requests of a conversation. Each turn's prompt is all of the turns before it, outputs included, and
    input_tokens more; it is sent think_s after the end of the turn before it (`after`, `think_us`), and its
    arrival_s is the earliest that this can be, as if the turn before took no time. `requests` cuts off the last ones.
    shared_prefix_tokens: tokens that all prompts begin with, on top of input_tokens (a system prompt).
    Loads with turns or a shared prefix have block hashes, one for 16 tokens; others share nothing and have none.
    Raises ValueError naming the argument.
    """
    count = check_int("requests", requests, 1, MAX_LOAD_REQUESTS)
    check_int("shared_prefix_tokens", shared_prefix_tokens, 0, MAX_TOKENS)
    if rate_per_s is not None and not 1 / MAX_RATE <= rate_per_s <= MAX_RATE:
        raise ValueError(f"rate_per_s: expected a number in [{1 / MAX_RATE:g}, {MAX_RATE:g}], got {rate_per_s!r}")
    if not gaps.burstiness > 0:
        raise ValueError(f"burstiness: expected a number > 0, got {gaps.burstiness!r}")
    streams = np.random.SeedSequence(check_int("seed", seed, 0, MAX_SEED)).spawn(5)
    input_rng, output_rng, gap_rng, turn_rng, think_rng = (np.random.Generator(np.random.PCG64(s)) for s in streams)
    if isinstance(input_tokens, Samples) and isinstance(output_tokens, Samples):
        output_rng = np.random.Generator(np.random.PCG64(streams[0]))  # the same draws, so pairs stay together
    new_tokens = draw_whole(input_tokens, count, input_rng, least=1, most=MAX_TOKENS)
    outputs = draw_whole(output_tokens, count, output_rng, least=1, most=MAX_TOKENS)
    session, turn = _sessions(turns, count, turn_rng)
    begins = np.flatnonzero(turn == 0)  # [sessions]
    think = np.where(turn > 0, draw(think_s, count, think_rng), 0.0)
    said = np.cumsum(new_tokens + outputs)  # of all requests up to this one, itself included
    prompts = shared_prefix_tokens + said - np.append(0, said)[begins][session] - outputs
    if int((prompts + outputs).max()) > MAX_TOKENS:
        longest = int((prompts + outputs).max())
        raise ValueError(f"input_tokens: expected at most {MAX_TOKENS} tokens in a conversation, got {longest}")
    starts = _starts(len(begins), None if rate_per_s is None else rate_per_s / (count / len(begins)), gaps, gap_rng)
    waited = np.cumsum(think)
    arrival = starts[session] + waited - waited[begins][session]
    order = np.argsort(arrival, kind="stable")
    chatty = bool((turn > 0).any())
    hashes, offsets = None, None
    if chatty or shared_prefix_tokens >= BLOCK_TOKENS:
        hashes, offsets = _blocks(prompts[order], session[order], shared_prefix_tokens)
    previous = np.where(turn > 0, np.arange(count) - 1, -1).astype(np.int32)
    return RequestTrace(
        name=name,
        arrival_s=arrival[order],
        prompt_tokens=prompts[order],
        output_tokens=outputs[order],
        block_hashes=hashes,
        block_offsets=offsets,
        block_tokens=0 if hashes is None else BLOCK_TOKENS,
        session=session[order].astype(np.int32) if chatty else None,
        after=renumber(previous, order) if chatty else None,
        think_us=think[order] * 1e6 if chatty else None,
        concurrency=concurrency,
        notes=_notes(rate_per_s, gaps, concurrency, len(begins) if chatty else None, seed),
    )


def _sessions(turns: Distribution, count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(conversation, turn within it) of each request, conversation after conversation, int64 [count] each."""
    lengths = draw_whole(turns, count, generator, least=1, most=MAX_TURNS)
    ends = np.cumsum(lengths)
    used = int(np.searchsorted(ends, count)) + 1  # conversations that begin
    session = np.repeat(np.arange(used), lengths[:used])[:count]
    return session, np.arange(count) - np.append(0, ends)[session]


def _starts(count: int, rate_per_s: float | None, gaps: Gaps, generator: np.random.Generator) -> np.ndarray:
    """When conversations begin, seconds from 0 on, float64 [count]."""
    if rate_per_s is None:
        return np.zeros(count)
    if math.isinf(gaps.burstiness):
        return np.arange(count) / rate_per_s
    drawn = generator.gamma(gaps.burstiness, 1 / (rate_per_s * gaps.burstiness), count - 1)
    return np.append(0.0, np.cumsum(drawn))


def _blocks(prompts: np.ndarray, session: np.ndarray, shared_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Block hashes of prompts int64 [n], end to end, and their offsets int64 [n + 1].

    Full blocks within the shared prefix are 0, 1, ...; other full blocks of a conversation are numbered along it, as
    a later prompt begins with an earlier one; the last, partly filled block of a prompt is nobody else's.
    """
    n = len(prompts)
    blocks, full = -(-prompts // BLOCK_TOKENS), prompts // BLOCK_TOKENS
    offsets = np.append(0, np.cumsum(blocks))
    longest = np.zeros(int(session.max()) + 1, np.int64)  # [sessions] full blocks
    np.maximum.at(longest, session, full)
    shared = shared_tokens // BLOCK_TOKENS
    first = shared + np.append(0, np.cumsum(longest))  # [sessions + 1]; the last is where partial blocks begin
    owner = np.repeat(np.arange(n), blocks)
    depth = np.arange(offsets[-1]) - offsets[:-1][owner]
    hashes = np.where(depth < shared, depth, first[session[owner]] + depth)
    hashes = np.where(depth < full[owner], hashes, first[-1] + owner)
    return hashes, offsets


def _notes(
    rate_per_s: float | None, gaps: Gaps, concurrency: int | None, sessions: int | None, seed: int
) -> tuple[str, ...]:
    """How the load was made."""
    burstiness = gaps.burstiness
    kind = "Poisson" if burstiness == 1 else "constant" if math.isinf(burstiness) else f"gamma {burstiness:g}"
    notes = [f"made up, seed {seed}: " + ("all at 0 s" if rate_per_s is None else f"{rate_per_s:g} requests/s, {kind}")]
    if concurrency is not None:
        closed = "" if rate_per_s else ": one is sent when one ends"
        notes.append(f"at most {concurrency:,} requests in flight{closed}")
    if sessions is not None:
        notes.append(f"{sessions:,} conversations: a turn waits for the one before it, and thinks")
    return tuple(notes)


def parse_gaps(option: str, text: str) -> Gaps:
    """The text of --arrivals. Raises ValueError naming the option."""
    if text in NAMED_GAPS:
        return Gaps(NAMED_GAPS[text])
    try:
        burstiness = float(text.removeprefix(GAMMA)) if text.startswith(GAMMA) else math.nan
    except ValueError:
        burstiness = math.nan
    if not 1 / MAX_BURSTINESS <= burstiness <= MAX_BURSTINESS:
        raise ValueError(f"{option}: expected {ARRIVALS_SYNTAX}, got {text!r}")
    return Gaps(burstiness)
