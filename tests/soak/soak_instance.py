"""Which box the long runs use, so that several may run on one machine: `PANTALA_SOAK_INSTANCE=5 make soak`."""

from __future__ import annotations

import os

INSTANCE = int(os.environ.get("PANTALA_SOAK_INSTANCE", "3"))
