"""Machines as containers: `ContainerDriver`."""

from pantala.drivers.container.driver import ContainerDriver

__all__ = ["ContainerDriver"]
