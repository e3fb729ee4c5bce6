"""`python -m pantala.agent`."""

import sys

from pantala.kit import lean


def start() -> int:
    # To print on terminals structlog loads rich: a tenth of an agent's start and memory, and agents write JSON.
    lean.load("structlog", without="rich")
    from pantala.agent.main import main

    return main()


sys.exit(start())
