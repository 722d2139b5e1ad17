"""Text of a trace file, read piece by piece: plain, .gz or .zst (known by content), or "-" for standard input."""
from __future__ import annotations

import gzip
import io
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

STANDARD_INPUT = "-"
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # how files of these formats begin
BUFFER_BYTES = 1 << 20


class TextSource:
    """UTF-8 text that is read once, from its start; a byte order mark is left out.

    Everything that goes wrong while it is read (disk, decompression, decoding) is a ValueError naming it.
    """

    def __init__(self, name: str, binary: io.BufferedReader, errors: tuple[type[Exception], ...]) -> None:
        self.name = name  # for messages: the path as given
        self._errors = errors
        with self._named():
            head = binary.peek(BUFFER_BYTES)
        self.empty = not head
        # No CSV header starts with a bracket or brace.
        self.is_json = re.match(rb"(\xef\xbb\xbf)?\s*[\[{]", head) is not None
        self._text = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")

    def read(self, size: int) -> str:
        """The next `size` characters, fewer only at the end."""
        with self._named():
            return self._text.read(size)

    def lines(self) -> Iterator[str]:
        """The lines that are left, their endings kept."""
        with self._named():
            for line in self._text:  # noqa: UP028 `yield from` would close the stream along with this generator
                yield line

    def detach(self) -> None:
        """Ends the reading and leaves the binary stream open."""
        self._text.detach()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            raise cannot_read(self.name, error) from None


def cannot_read(name: str, error: Exception) -> ValueError:
    """The ValueError for a file that cannot be read."""
    return ValueError(f"{name}: cannot read: {getattr(error, 'strerror', None) or error or type(error).__name__}")


@contextmanager
def open_source(path: str | Path) -> Iterator[TextSource]:
    """Opens a path, or standard input for "-". Raises ValueError naming it."""
    name = source_name(path)
    with ExitStack() as stack:
        try:
            if str(path) == STANDARD_INPUT:
                if sys.stdin is None:
                    raise ValueError(f"{name}: cannot read: it is closed")
                raw: Any = sys.stdin.buffer
            else:
                raw = stack.enter_context(open(path, "rb", buffering=BUFFER_BYTES))
            head = raw.peek(len(ZSTD))
        except OSError as error:
            raise cannot_read(name, error) from None
        errors: tuple[type[Exception], ...] = (OSError, EOFError, UnicodeDecodeError, zlib.error)
        if head.startswith(GZIP):
            raw = stack.enter_context(gzip.open(raw, "rb"))
        elif head.startswith(ZSTD):
            raw, zstd_error = _open_zstd(name, raw)
            errors += (zstd_error,)
        binary = raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw, BUFFER_BYTES)
        source = TextSource(name, binary, errors)
        try:
            yield source
        finally:
            source.detach()  # or standard input would be closed along with the text


def source_name(path: str | Path) -> str:
    """How messages call a path."""
    return "standard input" if str(path) == STANDARD_INPUT else str(path)


def trace_name(path: str | Path) -> str:
    """A trace's name: the file's, without folders and without .gz, .zst and the format's suffix."""
    if str(path) == STANDARD_INPUT:
        return "stdin"
    path = Path(path)
    return Path(path.stem).stem if path.suffix in (".gz", ".zst", ".zstd") else path.stem


def _open_zstd(name: str, raw: BinaryIO) -> tuple[Any, type[Exception]]:
    """A readable stream of what a Zstandard file holds, and the error that it raises for damage."""
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd  # the same module for earlier versions
    except ImportError:
        raise ValueError(f"{name}: before Python 3.14 a .zst file needs `pip install backports.zstd`") from None
    return zstd.open(raw, "rb"), zstd.ZstdError
