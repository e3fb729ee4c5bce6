"""What the files of `pantala machine` share."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import click

from pantala.errors import LeaseHeld, NotFound

WAIT_S = 60

signal_option = click.option(
    "-s", "--signal", metavar="NAME", help="SIGTERM, TERM; default that of the config, else SIGINT."
)
timeout_option = click.option(
    "--timeout", "--time", type=click.IntRange(min=0), metavar="SECONDS", help="Kill what has not ended by then."
)


def signal_name(given: str | None) -> str | None:
    """As the API spells it: `term` and `SIGTERM` are the same."""
    return given if not given or given.isdigit() else "SIG" + given.upper().removeprefix("SIG")


def in_seconds(given: int | None) -> str | None:
    return None if given is None else f"{given}s"


@contextmanager
def named(app: str, machine_id: str) -> Generator[None]:
    """The API's `machine not found` with the machine's name in it; who holds it, and how to see until when."""
    try:
        yield
    except LeaseHeld as error:
        raise LeaseHeld(
            f"machine {machine_id}: {error.message}",
            hint=f"`pantala machine leases view -a {app}` says for how long; `pantala machine leases clear` ends it",
        ) from error
    except NotFound as error:
        if not error.message.startswith("machine not found"):
            raise
        raise NotFound(
            f"machine {machine_id} not found in the app {app}", hint=f"`pantala machine list -a {app}` shows them"
        ) from error
