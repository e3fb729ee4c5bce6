"""A host's part of the private network: `HostNetwork` and the addresses it works with."""

from pantala.net.host import HostNetwork

__all__ = ["HostNetwork"]
