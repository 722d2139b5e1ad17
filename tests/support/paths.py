"""Where the tests find what is not theirs; SHARED may be missing, and tests that read it skip then."""
from pathlib import Path

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]
EXAMPLES = ROOT / "examples"
SHARED = ROOT.parent / "shared"
