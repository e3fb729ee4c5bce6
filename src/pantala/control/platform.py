"""What the platform says of itself: its regions."""

from __future__ import annotations

from pantala.control import regions
from pantala.control.nodes import Nodes
from pantala.wire.api import RegionsResponse


class Platform:
    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes

    async def regions(self) -> RegionsResponse:
        """The regions of this cluster. `Nearest` is the default one: one control plane serves all of them."""
        capacity = await self._nodes.capacity_by_region()
        codes, default = await self._nodes.regions()
        described = [regions.describe(code, capacity=capacity.get(code, 0)) for code in codes]
        return RegionsResponse(regions=described, nearest=default, Regions=described, Nearest=default)
