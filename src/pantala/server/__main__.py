"""`python -m pantala.server --settings FILE`."""

from __future__ import annotations

import sys

from pantala.server.main import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
