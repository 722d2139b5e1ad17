"""What the live scheduler serves, tells of a step, and asks of KV beyond the pages."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pkvsim.memory.prefix_cache import KINDS, LRU, NONE
from pkvsim.serving.live.page_book import NewPages
from pkvsim.serving.orders import FCFS, KVSHARE, ORDERS, SHORTEST
from pkvsim.serving.state import Limits

SERVED_ORDERS = (FCFS, SHORTEST, KVSHARE)  # the others look at all requests before any has run


@dataclass(frozen=True, slots=True, eq=False)
class LiveStep:
    """What runs in a step, requests by their keys; as pkvsim.serving.scheduler.StepWork has it, and with pages.

    ends [chunks] bool: whether a chunk ends its prompt and so gives a token. new_pages: what requests have beyond the
    pages that earlier steps told of; all pages of those admitted, which a preempted one gets anew.
    """

    decode: np.ndarray  # [rows] int64
    decode_lens: np.ndarray  # [rows] int64, the token decoded from included
    prefill: np.ndarray  # [chunks] int64
    prefill_begins: np.ndarray  # [chunks] int64
    prefill_tokens: np.ndarray  # [chunks] int64
    ends: np.ndarray  # [chunks] bool
    admitted: np.ndarray  # int64
    preempted: np.ndarray  # int64
    new_pages: list[NewPages]

    @property
    def tokens(self) -> int:
        """Tokens computed by the step."""
        return len(self.decode) + int(self.prefill_tokens.sum())


def check_served(limits: Limits) -> None:
    """ValueError for an order or a prefix cache that needs to know of requests beforehand."""
    if limits.order not in SERVED_ORDERS:
        names = ", ".join(ORDERS[order] for order in SERVED_ORDERS)
        raise ValueError(f"order: expected one of {names}, got {ORDERS[limits.order]}")
    if limits.cache_kind not in (NONE, LRU):
        raise ValueError(f"prefix_cache: expected none or lru, got {KINDS[limits.cache_kind]}")
    if limits.order == KVSHARE and limits.cache_kind == NONE:
        raise ValueError("order: kvshare orders by what a prefix cache holds, expected prefix_cache lru with it")


class PromptLoads(Protocol):
    """Loads of prompts' blocks from tiers beyond the pages, each asked for when its request is admitted. A request has
    its pages meanwhile, and no chunk of it is planned before the scheduler knows how much of it has come."""

    def begin(
        self, key: int, *, blocks: Sequence[bytes], cached: int, target: int, pages: list[int], own: int
    ) -> int | None:  # fmt: skip
        """A request of that key runs, with `cached` tokens that it found in its pages and `target` to be there. blocks:
        the keys of its prompt's whole pages, by which the scheduler knows them too. How many tokens are there at once,
        less than the target; None where some are on their way. own: pages up to that one, behind those tokens, are the
        request's alone: what is loaded goes to no others, as who else has them may compute them meanwhile, or have done
        so, and a load that fails writes what it should not."""

    def arrived(self) -> list[tuple[int, int | None]]:
        """(key, tokens that are in its pages) of requests whose loads have ended since the last call, None of those
        that have waited for another's load, for which begin() is to be called again."""

    def cancel(self, key: int) -> None:
        """The request gives its pages back: when this returns nothing is written to them any more."""
