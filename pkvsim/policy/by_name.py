"""Which route a step takes, and why: every policy, one import.

CalibratedPolicy is the default; OraclePolicy simulates every route of every step; FixedPolicy always takes one, or the
better of FlashInfer's kernels; PaperPolicy is the paper's.
"""
from __future__ import annotations

from pkvsim.devices.route_model import ROUTES
from pkvsim.policy.calibrated import CalibratedPolicy
from pkvsim.policy.decision import Decision, Policy
from pkvsim.policy.fixed import FLASHINFER_ROUTES, FixedPolicy
from pkvsim.policy.oracle import OraclePolicy
from pkvsim.policy.paper import PAPER_ROUTES, PaperPolicy
from pkvsim.policy.paper_rules import (
    MAX_SPLITS,
    MIN_SPLITS,
    MIN_WORKQUEUE_ROWS,
    PAPER_GROUP_SIZE,
    PAPER_TILE_TOKENS,
    TARGET_CTAS,
)

__all__ = [
    "MAX_SPLITS", "MIN_SPLITS", "MIN_WORKQUEUE_ROWS", "PAPER_GROUP_SIZE", "PAPER_ROUTES", "PAPER_TILE_TOKENS",
    "POLICIES", "TARGET_CTAS", "CalibratedPolicy", "Decision", "FixedPolicy", "OraclePolicy", "PaperPolicy", "Policy",
    "make_policy", "policy_routes",
]  # fmt: skip

POLICIES = ("paper", "calibrated", "oracle", "flashinfer", *ROUTES)


def policy_routes(name: str) -> tuple[str, ...]:
    """The routes among which a policy chooses; the paper's FlashInfer is the tensor-core kernel, where there is one."""
    by_name = {
        "paper": (*FLASHINFER_ROUTES, *PAPER_ROUTES[1:]), "calibrated": ROUTES, "oracle": ROUTES,
        "flashinfer": FLASHINFER_ROUTES,
    }  # fmt: skip
    return by_name.get(name, (name,))


def make_policy(
    name: str, *, min_context: int | None = None, split_splits: int | None = None, workqueue_splits: int | None = None
) -> Policy:
    """The policy of that name: one of POLICIES, a route's name meaning that it is always taken.

    min_context is the paper's gate (16384 tokens), which the others do not have. split_splits, workqueue_splits: pinned
    splits of every row, None for the policy's own choice. Raises ValueError naming the argument.
    """
    if name == "paper":
        gate = {} if min_context is None else {"min_context": min_context}
        return PaperPolicy(**gate, split_splits=split_splits, workqueue_splits=workqueue_splits)
    if min_context is not None:
        raise ValueError(f"min_context: expected none with the policy {name}, got {min_context}")
    if name == "calibrated":
        return CalibratedPolicy(split_splits=split_splits, workqueue_splits=workqueue_splits)
    if name == "oracle":
        return OraclePolicy(split_splits=split_splits, workqueue_splits=workqueue_splits)
    if name in POLICIES:
        return FixedPolicy(name, split_splits=split_splits, workqueue_splits=workqueue_splits)
    raise ValueError(f"policy: expected one of {', '.join(POLICIES)}, got {name!r}")
