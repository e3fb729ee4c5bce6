"""Long runs with full counts: `make soak`. They use the rigs of the end-to-end and integration tiers."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "e2e"), str(TESTS / "integration")]
