"""The pkvsim command run inside the test's process."""
from __future__ import annotations

import sys

import pytest

from pkvsim import cli
from pkvsim.compiled.notice import NOTICE


def pkvsim(capsys, monkeypatch, *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr, without a first run's notice that it compiles."""
    monkeypatch.setattr(sys, "argv", ["pkvsim", *args])
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    return stopped.value.code, out, err.replace(NOTICE + "\n", "")


def azure_trace(requests: int) -> str:
    """A trace file's text: a request a second, each longer than the one before."""
    rows = "".join(f"2023-11-16 18:00:{at:02d}.0000000,{900 + 37 * at},{20 + at}\n" for at in range(requests))
    return "TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows
