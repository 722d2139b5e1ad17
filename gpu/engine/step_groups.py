"""What a planned step knows of the rows that share pages."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu.engine.prefixes import PrefixFinder


@dataclass(slots=True)
class StepGroups:
    """The groups of a planned step. `kept` are arrays behind the addresses, the caller's or the engine's own."""

    group_of_row: int  # address, [batch_size] int32
    prefix_pages: int  # address, [num_groups] int32
    num_groups: int
    workspace_at: int
    kept: tuple
    owned: tuple  # of those, and with the workspace, what nothing but the engine keeps
    copied: bool  # they are copies of what is on the host
    finder: PrefixFinder | None = None  # finds them anew in every step
    found_in: int | None = field(default=None)  # where that was: a capture's number, 0 outside of any

    def arguments(self) -> tuple[int, int, int]:
        return self.group_of_row, self.prefix_pages, self.num_groups
