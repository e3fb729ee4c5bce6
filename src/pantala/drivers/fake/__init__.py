"""Machines in memory, for tests and simulation."""

from pantala.drivers.fake.driver import FakeDriver
from pantala.drivers.fake.world import FakeApp, FakeWorld

__all__ = ["FakeApp", "FakeDriver", "FakeWorld"]
