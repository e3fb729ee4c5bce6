"""Commands about this machine. Their code is loaded by name: the CLI itself knows neither control plane nor agent."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import click

    up: click.Command
    down: click.Command
    box: click.Command
    doctor: click.Command
    images: click.Command


def __getattr__(name: str) -> Any:
    return getattr(importlib.import_module("pantala.box.commands"), name)
