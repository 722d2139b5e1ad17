"""The README's Python examples, for the tests that run them."""
from __future__ import annotations

import re

from paths import ROOT

README = ROOT / "README.md"


def example(section: str) -> str:
    """The first Python block under the heading `section`."""
    text = README.read_text().split(f"\n## {section}\n", 1)[1]
    return re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
