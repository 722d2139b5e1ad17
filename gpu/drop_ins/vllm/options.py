"""What vLLM's --additional-config says to this package. Needs no vLLM."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

KEY = "persistentkv"


@dataclass(frozen=True, slots=True)
class PluginOptions:
    """The keys below "persistentkv", with their defaults."""

    shared_prefixes: bool = False  # pages that rows begin with in common are read once for all of them


def read_options(additional_config: object) -> PluginOptions:
    """The options in VllmConfig.additional_config: a mapping, or an object of somebody else's, which says nothing here.

    Raises ValueError naming the key where one below "persistentkv" is unknown or its value is no bool.
    """
    given = additional_config.get(KEY, {}) if isinstance(additional_config, Mapping) else {}
    known = tuple(field.name for field in fields(PluginOptions))
    if not isinstance(given, Mapping):
        raise ValueError(f"additional_config[{KEY!r}]: expected an object with keys among {', '.join(known)}, "
                         f"got {given!r}")
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"additional_config[{KEY!r}]: expected keys among {', '.join(known)}, got {name!r}")
        if not isinstance(value, bool):
            raise ValueError(f"additional_config[{KEY!r}][{name!r}]: expected true or false, got {value!r}")
    return PluginOptions(**given)
