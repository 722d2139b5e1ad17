"""What the README shows runs as shown."""
from __future__ import annotations

import re

import numpy as np
from readme import README, example

from pkvsim import reference


def test_cpu_example(capsys) -> None:
    names: dict = {}
    exec(example("Without a GPU"), names)
    expected, expected_lse = reference.attention(*(names[name] for name in ("shape", "q", "k_pages", "v_pages", "block_table", "seq_lens")))
    np.testing.assert_allclose(names["out"], expected, atol=1e-12)
    np.testing.assert_allclose(names["lse"], expected_lse, atol=1e-12)
    assert "1 launch" in capsys.readouterr().out


def test_links_and_folders_exist() -> None:
    text = README.read_text()
    for path in [*re.findall(r"\]\(([^)h][^)]*)\)", text), *re.findall(r"`((?:\w+/)+(?:\w+\.\w+)?)`", text)]:
        assert (README.parent / path).exists(), path
