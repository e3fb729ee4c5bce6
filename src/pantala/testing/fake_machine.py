"""One machine of the fake agent (`fake_agent.py`); tests may look at it and change it."""

from __future__ import annotations

from pantala.domain.machine import State
from pantala.kit import ids
from pantala.wire import node as wire
from pantala.wire.api import Lease, MachineVersion
from pantala.wire.machine import CheckStatus, Event, ImageRef, Machine, MachineConfig


class FakeMachine:
    def __init__(self, call: wire.CreateMachine, *, node: str, ip: str, now: str) -> None:
        self.id = call.machine_id
        self.app = call.app
        self.name = call.name
        self.region = call.region
        self.node = node
        self.ip = ip
        self.generation = call.generation
        self.config: MachineConfig = call.config
        self.image: ImageRef = call.image
        self.instance_id = ids.ulid()
        self.older: list[MachineVersion] = []
        self.signals: list[int] = []
        self.memory_mib = 0
        self.state = State.CREATED
        self.cordoned = call.cordoned
        self.hidden = False
        self.created_at = self.updated_at = now
        self.events: list[Event] = []
        self.checks: list[CheckStatus] = []
        self.lease: Lease | None = None
        self.secrets: dict[str, str] = {}

    def document(self, *, nonce: str | None = None) -> Machine:
        return Machine(
            id=self.id,
            name=self.name,
            state=self.state.value,
            region=self.region,
            instance_id=self.instance_id,
            version=self.instance_id,
            private_ip=self.ip,
            created_at=self.created_at,
            updated_at=self.updated_at,
            image_ref=self.image,
            events=list(self.events),
            checks=list(self.checks),
            host_status="ok",
            cordoned=self.cordoned,
            config=self.config,
            nonce=nonce,
            node=self.node,
            isolation="none",
        )
