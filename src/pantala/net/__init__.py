"""A host's part of the private network: `HostNetwork`, `PeerLinks` to other hosts, and the addresses they work with."""

from pantala.net.entrances import Address, EntrancePlan, Entrances, plan_entrances
from pantala.net.host import HostNetwork
from pantala.net.peers import Peer, PeerLinks, PeerNode, plan_peers

__all__ = [
    "Address",
    "EntrancePlan",
    "Entrances",
    "HostNetwork",
    "Peer",
    "PeerLinks",
    "PeerNode",
    "plan_entrances",
    "plan_peers",
]
