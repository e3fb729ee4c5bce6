"""Imports for processes of which there are many: a library without what it takes along for others' sake.

Called by `agent/__main__.py` before anything else is imported.
"""

from __future__ import annotations

import gc
import importlib
import sys
from types import ModuleType
from typing import cast


def load(name: str, *, without: str) -> None:
    """Import a library as if an optional other one were not installed; whoever needs that imports it afterwards."""
    if name in sys.modules or without in sys.modules:
        return
    sys.modules[without] = cast("ModuleType", None)  # what Python takes for "there is none"
    try:
        importlib.import_module(name)
    finally:
        del sys.modules[without]


def collect_rarely() -> None:
    """For processes that hold the view of a whole cluster: a full collection looks at every row and nobody is answered
    meanwhile (0.3 s with 100,000 machines), so it comes after five million new objects instead of seventy thousand.
    Garbage without cycles, nearly all of it, goes at once as ever."""
    gc.set_threshold(5_000, 10, 100)
