"""What the model reads: the standard library's pydoc topics, and needles hidden in them."""
from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

import numpy as np

CITIES = ("Paris", "London", "Madrid", "Oslo", "Vienna", "Athens", "Dublin", "Prague", "Warsaw", "Lisbon")
STEPS = 8  # tokens after a context at which distributions are compared


@dataclass(frozen=True, slots=True)
class Context:
    """A text as token ids, and those that follow it."""

    ids: list[int]
    following: list[int]  # [STEPS]


@dataclass(frozen=True, slots=True)
class Needle:
    """A text with a number in it, the question for it, and its digits as token ids."""

    ids: list[int]  # up to the question
    question: list[int]
    answer: list[int]


def corpus() -> list[str]:
    """The topics, in the order of their names."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def docstrings(tokenizer, count: int = 512) -> list[int]:
    """Token ids that no topic has, whose queries say which elements of keys a model's layers look at."""
    return tokenizer.encode("\n\n".join((argparse.__doc__, statistics.__doc__))).ids[:count]


def contexts(tokenizer, count: int, shortest: int, longest: int, *, seed: int) -> list[Context]:
    """Of lengths spread evenly over [shortest, longest], from places drawn at random; texts may overlap."""
    ids = tokenizer.encode("\n\n".join(corpus())).ids
    rng = np.random.default_rng(seed)
    found = []
    for length in np.linspace(shortest, longest, count).astype(int).tolist():
        begin = int(rng.integers(0, len(ids) - length - STEPS))
        found.append(Context(ids[begin : begin + length], ids[begin + length : begin + length + STEPS]))
    return found


def needles(tokenizer, count: int, shortest: int, longest: int, *, seed: int) -> list[Needle]:
    """The secret number of a city at a random depth of a text; the question comes at its end."""
    text_ids = tokenizer.encode("\n\n".join(corpus())).ids
    rng = np.random.default_rng(seed)
    found = []
    for length in np.linspace(shortest, longest, count).astype(int).tolist():
        city, number = rng.choice(CITIES), int(rng.integers(1000, 10000))
        hidden = tokenizer.encode(f"\nThe secret number of {city} is {number}. Remember it.\n").ids
        begin, depth = int(rng.integers(0, len(text_ids) - length)), int(rng.integers(0, length - len(hidden)))
        body = text_ids[begin : begin + length - len(hidden)]
        question = tokenizer.encode(f"\n\nQuestion: What is the secret number of {city}?\nAnswer: The secret number of "
                                    f"{city} is").ids  # fmt: skip
        answer = tokenizer.encode(f" {number}").ids
        found.append(Needle(body[:depth] + hidden + body[depth:], question, answer))
    return found
