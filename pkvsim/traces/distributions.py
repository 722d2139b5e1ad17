"""Distributions of lengths and times that a load is drawn from, and their texts as options have them.

    1024                        always that
    100-2000                    uniform, both ends included
    lognormal:mean=1024,p99=8192   by two of: mean or p50, and p90, p99, cv or sigma; also max=
    exponential:mean=10         also max=
    file:PATH                   drawn from the requests of a trace file, with replacement
"""
from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from pkvsim.shapes import MAX_TOKENS
from pkvsim.traces.readers import read_requests

NORMAL_QUANTILES = {"p90": 1.2815515655446004, "p99": 2.3263478740408408}
NUMBER = r"[0-9]+\.?[0-9]*(?:[eE][+-]?[0-9]{1,2})?"
RANGE = re.compile(rf"\s*({NUMBER})(?:\s*-\s*({NUMBER}))?\s*")
SYNTAX = "a number, a range like 100-2000, lognormal:mean=1024,p99=8192, exponential:mean=10"
FILE = "file:"
MAX_TURNS = 10**4  # requests of a conversation
MAX_THINK_S = 1e9


@dataclass(frozen=True, slots=True)
class Uniform:
    """From low to high, both included; a constant where they are equal."""

    low: float
    high: float

    @property
    def mean(self) -> float:
        return (self.low + self.high) / 2


@dataclass(frozen=True, slots=True)
class Lognormal:
    """exp of a normal distribution of mean mu and standard deviation sigma; draws above most become most."""

    mu: float
    sigma: float
    most: float = math.inf

    @property
    def mean(self) -> float:
        """Of the draws before most cuts them."""
        return math.exp(self.mu + self.sigma**2 / 2)


@dataclass(frozen=True, slots=True)
class Exponential:
    """Of this mean; draws above most become most."""

    mean: float
    most: float = math.inf


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Drawn from values float64 [n], with replacement."""

    values: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.values.mean())


Distribution = Uniform | Lognormal | Exponential | Samples


def constant(value: float) -> Uniform:
    """The distribution of one value."""
    return Uniform(value, value)


def parse_distribution(option: str, text: str, *, least: float, most: float, whole: bool = False) -> Distribution:
    """The distribution that `text` describes (not file:, which needs a reader), its numbers in [least, most] and
    integers where `whole`. Raises ValueError naming the option, on one line."""
    match = RANGE.fullmatch(text)
    if match is not None:
        low = _number(option, match[1], least, most, whole)
        high = low if match[2] is None else _number(option, match[2], least, most, whole)
        if low > high:
            raise ValueError(f"{option}: expected a range from low to high, got {text!r}")
        return Uniform(low, high)
    name, colon, rest = text.partition(":")
    if not colon or name.strip() not in ("lognormal", "exponential"):
        raise ValueError(f"{option}: expected {SYNTAX}, got {text!r}")
    named: dict[str, float] = {}
    for part in rest.split(","):
        key, _, value = part.partition("=")
        key = key.strip()
        if key in named:
            raise ValueError(f"{option}: {key}: expected once, got {text!r}")
        is_spread = key in ("cv", "sigma")
        named[key] = _number(f"{option}: {key}", value, 0 if is_spread else least, 10 if is_spread else most, False)
    if name.strip() == "exponential":
        if not set(named) <= {"mean", "max"} or "mean" not in named:
            raise ValueError(f"{option}: expected exponential:mean=10 with or without max=, got {text!r}")
        return Exponential(named["mean"], named.get("max", math.inf))
    return _lognormal(option, text, named)


def parse_tokens(option: str, text: str, column: str) -> Distribution:
    """The text of --input-tokens or --output-tokens; column (prompt_tokens or output_tokens) is what file: takes.

    Raises ValueError naming the option or the file.
    """
    if text.startswith(FILE):
        trace = read_requests(text.removeprefix(FILE))
        return Samples((trace.prompt_tokens if column == "prompt_tokens" else trace.output_tokens).astype(np.float64))
    try:
        return parse_distribution(option, text, least=1, most=MAX_TOKENS, whole=True)
    except ValueError as error:
        raise ValueError(str(error).replace(SYNTAX, f"{SYNTAX}, file:PATH")) from None


def parse_turns(option: str, text: str) -> Distribution:
    """The text of --turns: requests of a conversation."""
    return parse_distribution(option, text, least=1, most=MAX_TURNS, whole=True)


def parse_think(option: str, text: str) -> Distribution:
    """The text of --think-time: seconds."""
    return parse_distribution(option, text, least=0, most=MAX_THINK_S)


def _lognormal(option: str, text: str, named: dict[str, float]) -> Lognormal:
    """By two of its figures; mean = exp(mu + sigma^2 / 2), quantile = exp(mu + z sigma), cv^2 = exp(sigma^2) - 1."""
    cap = named.pop("max", math.inf)
    middles = [key for key in ("mean", "p50") if key in named]
    spreads = [key for key in ("p90", "p99", "cv", "sigma") if key in named]
    if len(middles) != 1 or len(spreads) != 1 or len(named) != 2:
        expected = "lognormal: with mean= or p50=, and p90=, p99=, cv= or sigma="
        raise ValueError(f"{option}: expected {expected}, got {text!r}")
    middle, spread = named[middles[0]], named[spreads[0]]
    if middle <= 0:
        raise ValueError(f"{option}: {middles[0]}: expected a number > 0, got {middle:g}")
    if spreads[0] == "sigma":
        sigma = spread
    elif spreads[0] == "cv":
        sigma = math.sqrt(math.log1p(spread**2))
    else:
        z = NORMAL_QUANTILES[spreads[0]]
        # Of the mean, a quantile is exp(z sigma - sigma^2 / 2) times as much, which is largest at sigma = z.
        largest = math.exp(z**2 / 2) if middles[0] == "mean" else math.inf
        if not middle <= spread <= middle * largest:
            limit = "" if largest == math.inf else f" and at most {largest:.3g} times it"
            raise ValueError(f"{option}: {spreads[0]}: expected at least {middles[0]}{limit}, got {spread:g}")
        ratio = math.log(spread / middle)
        sigma = ratio / z if middles[0] == "p50" else z - math.sqrt(max(z**2 - 2 * ratio, 0.0))
    mu = math.log(middle) - (sigma**2 / 2 if middles[0] == "mean" else 0.0)
    return Lognormal(mu, sigma, cap)


def draw(distribution: Distribution, count: int, generator: np.random.Generator) -> np.ndarray:
    """float64 [count]."""
    if isinstance(distribution, Uniform):
        if distribution.low == distribution.high:
            return np.full(count, float(distribution.low))
        return generator.uniform(distribution.low, distribution.high, count)
    if isinstance(distribution, Lognormal):
        return np.minimum(generator.lognormal(distribution.mu, distribution.sigma, count), distribution.most)
    if isinstance(distribution, Exponential):
        return np.minimum(generator.exponential(distribution.mean, count), distribution.most)
    return distribution.values[generator.integers(0, len(distribution.values), count)]


def draw_whole(
    distribution: Distribution, count: int, generator: np.random.Generator, *, least: int, most: int
) -> np.ndarray:
    """int64 [count] in [least, most]: a range draws its integers evenly, others are rounded."""
    if isinstance(distribution, Uniform):
        low, high = math.ceil(distribution.low), math.floor(distribution.high)
        return np.clip(generator.integers(low, high + 1, count), least, most)
    return np.clip(np.rint(draw(distribution, count, generator)), least, most).astype(np.int64)


def _number(option: str, text: str, least: float, most: float, whole: bool) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{option}: expected a number, got {text!r}") from None
    if not least <= value <= most or (whole and value != int(value)):
        kind = "an integer" if whole else "a number"
        raise ValueError(f"{option}: expected {kind} in [{least:.10g}, {most:.10g}], got {text.strip()}")
    return value
