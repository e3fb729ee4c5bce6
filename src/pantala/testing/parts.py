"""Factories for `AgentSettings`, so that a real agent process can run without root: `pantala.testing.parts:driver`."""

from __future__ import annotations

from pantala.agent.settings import AgentSettings
from pantala.kit.clock import Clock
from pantala.testing.driver import ScriptedDriver
from pantala.testing.host import FakeImages, FakeNetwork

_DRIVER = ScriptedDriver()


def driver(settings: AgentSettings, clock: Clock) -> ScriptedDriver:
    del settings, clock
    return _DRIVER


def network(settings: AgentSettings, clock: Clock) -> FakeNetwork:
    del settings, clock
    return FakeNetwork(_DRIVER)


def images(settings: AgentSettings, clock: Clock) -> FakeImages:
    del settings, clock
    return FakeImages()
