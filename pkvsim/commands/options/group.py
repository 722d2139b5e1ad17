"""Commands that take whole groups of options: a parameter whose default is a frozen dataclass of options."""
from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_type_hints


@dataclass(frozen=True, slots=True)
class OptionGroup:
    """What groups have in common: their fields are options, with a default each."""

    def given(self) -> dict[str, bool]:
        """Which options differ from their defaults."""
        return {field.name: getattr(self, field.name) != field.default for field in fields(self)}


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for every field of a group in place of each parameter whose default is one.

    typer reads a command's options from its signature, which is therefore written here; it calls with keywords.
    """
    groups: dict[str, type] = {}
    parameters: list[inspect.Parameter] = []
    signature = inspect.signature(command, eval_str=True)
    for name, parameter in signature.parameters.items():
        if is_dataclass(parameter.default) and not isinstance(parameter.default, type):
            groups[name] = type(parameter.default)
            parameters += _options(groups[name])
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    return run


def _options(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(group)
    ]
