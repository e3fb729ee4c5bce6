"""Where the native programs are: `pantala-proxy`, `pantala-init` and the third-party ones beside them."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

from pantala.errors import InternalError


def find(name: str) -> Path:
    """The program `name`: `PANTALA_BIN_DIR` first, then beside this Python, the checkout's build, then PATH."""
    candidates = [Path(sysconfig.get_path("scripts")) / name]
    if folder := os.environ.get("PANTALA_BIN_DIR"):
        candidates.insert(0, Path(folder) / name)
    checkout = Path(__file__).resolve().parents[3]
    if (checkout / "Cargo.toml").is_file():
        candidates += sorted((checkout / "target").glob(f"*/release/{name}"))
        candidates.append(checkout / ".cache" / "bin" / name)
    if on_path := shutil.which(name):
        candidates.append(Path(on_path))
    for candidate in candidates:
        if candidate.is_file() and os.access(candidate, os.X_OK):
            return candidate
    raise InternalError(f"the program {name} is not installed; looked at {', '.join(map(str, candidates))}")
