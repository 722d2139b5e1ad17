"""Records of a CSV or JSON text, one after the other, each with the line it begins on."""
from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pkvsim.traces.sources import TextSource

DECODER = json.JSONDecoder()
SCAN: Callable[[str, int], tuple[Any, int]] = DECODER.scan_once  # type: ignore[attr-defined]  # raw_decode's core
WINDOW = 1 << 20  # characters of a JSON text that are read at a time
NEAR_END = 16  # characters: as near to a window's end a token may be cut off
SPACE = re.compile(r"[ \t\r\n]*")
SEPARATORS = re.compile(r"[ \t\r\n,]*")
WRAPPED = re.compile(r'\{\s*"requests"\s*:\s*(?=\[)')


def names(columns: Iterable[Any]) -> str:
    """Column names for an error message, on one line however odd they are."""
    shown = ", ".join(name if name.isprintable() else ascii(name) for name in map(str, columns))
    return (shown if len(shown) <= 200 else shown[:200] + " ...") or "none"


def csv_rows(source: TextSource) -> Iterator[tuple[int, list[str]]]:
    """The header, its names stripped and distinct, then rows as wide as it; blank lines are left out.

    With each row the line it begins on: a quoted cell may span lines.
    """
    reader = csv.reader(source.lines())
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            if len(cells) == len(header) and cells:
                yield line, cells
            elif any(cell.strip() for cell in cells):
                if header:
                    missing = f": column {names(header[len(cells):])} missing" if len(cells) < len(header) else ""
                    raise ValueError(f"{source.name}:{line}: expected {len(header)} columns, got {len(cells)}{missing}")
                header = [cell.strip() for cell in cells]
                twice = {name for name in header if header.count(name) > 1}
                if twice:
                    raise ValueError(f"{source.name}:{line}: column {names(sorted(twice))}: expected once")
                yield line, header
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{source.name}:{line}: {error}") from None


def json_rows(source: TextSource) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of JSON lines, of an array, or of the array in an object's first key "requests"."""
    text = _Window(source)
    text.skip(SPACE)
    wrapped = text.skip(WRAPPED)
    in_array = text.startswith("[")
    text.position += in_array
    while True:
        text.skip(SEPARATORS)
        if text.at_end() and not in_array:
            return
        if in_array and text.startswith("]"):
            break
        line = text.line()
        record = text.decode()
        if not isinstance(record, dict):
            raise ValueError(f"{source.name}:{line}: expected an object per request, got {ascii(record):.200}")
        yield line, record
        yield from text.whole_lines()
    if wrapped:
        text.finish_object()  # so that a file cut off after the array is seen


class _Window:
    """The part of a JSON text that is at hand: values are decoded from its start and leave it."""

    def __init__(self, source: TextSource) -> None:
        self.source = source
        self.text = source.read(WINDOW)
        self.position = 0  # of the next character, in text
        self._lines_before, self._counted = 1, 0  # the line at _counted, a place in text
        self._last = len(self.text) < WINDOW  # nothing comes after text

    def line(self) -> int:
        """The line of the next character."""
        self._lines_before += self.text.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._lines_before

    def at_end(self) -> bool:
        return self.position >= len(self.text) and not self._more()

    def startswith(self, character: str) -> bool:
        return not self.at_end() and self.text.startswith(character, self.position)

    def skip(self, pattern: re.Pattern[str]) -> bool:
        """Whether the pattern comes next and takes a character or more; they are passed over."""
        passed = False
        while True:
            match = pattern.match(self.text, self.position)
            if match is not None and match.end() > self.position:
                passed, self.position = True, match.end()
            if self.position < len(self.text) or not self._more():
                return passed

    def decode(self) -> Any:
        """The value that comes next; ValueError naming line and column."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - NEAR_END
                if cut_off and self._more():
                    continue
                column = error.pos - self.text.rfind("\n", 0, error.pos)
                line = self.line() + self.text.count("\n", self.position, error.pos)
                raise ValueError(f"{self.source.name}:{line}: column {column}: {error.msg}") from None
            except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
                raise ValueError(f"{self.source.name}:{self.line()}: {error}") from None
            if isinstance(value, (int, float)) and end >= len(self.text) - NEAR_END and self._more():
                continue  # more digits may follow
            self.position = end
            return value

    def whole_lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The objects that follow one to a line, with their lines, while all of each is at hand: the fast way."""
        while self.text.startswith("\n{", self.position):
            begin = self.position + 1
            try:
                record, end = SCAN(self.text, begin)
            except (StopIteration, ValueError, RecursionError):  # cut off, or wrong, which decode tells apart
                return
            self.position = begin
            line = self.line()
            self.position = end
            yield line, record

    def finish_object(self) -> None:
        """Checks that what follows an object's first value, just before its bracket, completes the object."""
        while self._more():
            pass
        at, self.text = self.line(), '{"requests": [' + self.text[self.position :]
        self.position = self._counted = 0
        self._lines_before = at
        self.decode()

    def _more(self) -> bool:
        """Drops what has been decoded and reads on; False, and nothing changed, at the end."""
        if self._last:
            return False
        self.line()
        kept = self.text[self.position :]
        size = max(WINDOW, len(kept))  # a value longer than a window is tried again at twice the length
        added = self.source.read(size)
        self._last = len(added) < size
        self._counted = self.position = 0
        self.text = kept + added
        return bool(added)
