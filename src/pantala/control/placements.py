"""`POST /v1/platform/placements`: where machines would go. Nothing is reserved: a creation right after may differ."""

from __future__ import annotations

from pantala.auth.grants import Action, Principal
from pantala.control import regions
from pantala.control.access import Access
from pantala.control.context import Context
from pantala.control.nodes import Nodes
from pantala.domain import guests
from pantala.errors import InvalidRequest, NotOffered
from pantala.planner import simulation
from pantala.planner.placement import Ask, Fleet
from pantala.wire.machine import Guest, MachineConfig
from pantala.wire.platform import COUNT_MAX, PlacementsRequest, PlacementsResponse, RegionPlacement

WEIGHT_MAX = 1_000_000
MIB = 1024 * 1024


class Placements:
    def __init__(self, context: Context, access: Access, nodes: Nodes) -> None:
        self._context = context
        self._access = access
        self._nodes = nodes

    async def simulate(self, principal: Principal, request: PlacementsRequest) -> PlacementsResponse:
        """Raises CapacityError when not all have room."""
        org = await self._access.org(principal, request.org_slug, Action.READ)
        if request.volume_name:
            raise NotOffered("volume_name: volumes are not offered by this version; leave it out")
        region_weight, spread_weight = _weights(request.weights or {})
        here, default = await self._nodes.regions()
        size = guests.resolve(MachineConfig(guest=request.compute or Guest(cpu_kind="performance", cpus=1)))
        ask = Ask(
            org=org.id,
            regions=regions.expand(request.region or f"{default},any", here=here, default=default),
            cpus=size.cpus,
            shared_cpu=size.cpu_kind == "shared",
            memory_mib=size.memory_mb,
            disk_mib=-(-(request.volume_size_bytes or 0) // MIB),
            shared_kernel=self._context.settings.shared_kernel,
            isolation=size.isolation,
        )
        fleet: Fleet = (await self._nodes.fleet()).copy()
        if request.count:
            found = simulation.place(
                fleet, ask, count=request.count, region_weight=region_weight, spread_weight=spread_weight
            )
        else:
            found = simulation.room(fleet, ask, limit=COUNT_MAX)
        rows = [
            RegionPlacement(
                region=one.region,
                count=one.machines,
                concurrency=one.nodes,
                Region=one.region,
                Count=one.machines,
                Concurrency=one.nodes,
            )
            for one in found
        ]
        return PlacementsResponse(regions=rows, Regions=rows)


def _weights(given: dict[str, int]) -> tuple[int, int]:
    for name, value in given.items():
        if name not in ("region", "spread"):
            raise InvalidRequest(f"{name!r} is not one of region, spread", field="weights")
        if not 0 <= value <= WEIGHT_MAX:
            raise InvalidRequest(f"must be 0 to {WEIGHT_MAX}", field=f"weights.{name}")
    return given.get("region", simulation.REGION_WEIGHT), given.get("spread", simulation.SPREAD_WEIGHT)
