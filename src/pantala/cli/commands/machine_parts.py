"""What the files of `pantala machine` share."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from pantala.errors import NotFound

WAIT_S = 60


@contextmanager
def named(app: str, machine_id: str) -> Generator[None]:
    """The API's `machine not found` with the machine's name in it."""
    try:
        yield
    except NotFound as error:
        if not error.message.startswith("machine not found"):
            raise
        raise NotFound(
            f"machine {machine_id} not found in the app {app}", hint=f"`pantala machine list -a {app}` shows them"
        ) from error
