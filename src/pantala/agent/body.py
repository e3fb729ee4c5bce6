"""The hands of a machine task: driver, network and image of one machine. Knows no journal and decides nothing.

Every operation is safe to repeat; what a crash left half done is found by the machine's id and removed by `clear`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio
import msgspec
import structlog

from pantala.agent.context import Context
from pantala.domain import containers, guests, process, signals
from pantala.domain.policies import Allowed
from pantala.domain.runtime import NetworkPlan, UnpackedImage
from pantala.drivers.protocol import PrepareSpec, Runtime
from pantala.errors import DriverError, InvalidRequest, PantalaError, TransientError
from pantala.journal import MachineRecord, Version
from pantala.wire.guest import Start
from pantala.wire.machine import ImageRef

log = structlog.get_logger()


class Body:
    def __init__(self, context: Context, machine_id: str) -> None:
        self._context = context
        self._id = machine_id
        self.doing = ""

    @asynccontextmanager
    async def _deadline(self, seconds: float, doing: str) -> AsyncGenerator[None]:
        """TransientError says what did not end in time."""
        self.doing = doing
        try:
            with anyio.move_on_after(seconds) as scope:
                yield
        finally:
            self.doing = ""
        if scope.cancelled_caught:
            raise TransientError(f"{doing} did not end within {seconds:g} s")

    async def pull(self, version: Version) -> UnpackedImage:
        """The version's images on this host. Raises what `ImageStore.ensure` raises."""
        async with self._deadline(self._context.pace.image_s, f"pulling {process.image_name(version.image)}"):
            image = await self._ensure(version.image, version.pull_token)
            others = {
                name: await self._ensure(other.image, other.pull_token) for name, other in version.other_images.items()
            }
            return msgspec.structs.replace(image, others=others) if others else image
        raise AssertionError("unreachable")

    async def _ensure(self, image: ImageRef, sealed_token: str) -> UnpackedImage:
        token = self._context.node_key.open(sealed_token).decode() if sealed_token else ""
        return await self._context.images.ensure(image, pull_token=token)

    async def prepare(self, record: MachineRecord, image: UnpackedImage) -> None:
        """PID 1 is there, blocked; whatever was there before is gone."""
        context, config = self._context, record.version.config
        async with self._deadline(context.pace.prepare_s, "preparing the machine"):
            known = await context.driver.inspect(self._id)
            if known is None or known.phase != "prepared" or known.instance_id != record.version.instance_id:
                await context.driver.clear(self._id)
            allowed = context.policies.of(record) if context.policies is not None else None
            network = await context.network.ensure(plan(record, allowed))
            host = process.hostname(config, self._id)
            await context.driver.prepare(
                PrepareSpec(
                    machine_id=self._id,
                    instance_id=record.version.instance_id,
                    image=image,
                    network=network,
                    limits=guests.resolve(config).limits(),
                    uid_base=record.uid_base,
                    hostname=host,
                    hosts=process.hosts_file(self._id, ip4=record.ip4, private_ip=record.ip6, host=host),
                    resolv_conf=process.resolv_conf(
                        context.nameserver, list((config.dns.searches if config.dns else None) or [])
                    ),
                    containers=containers.roots(config, image),
                    volumes=containers.volumes(config, image, guests.resolve(config).memory_mb),
                    root_kept=guests.root_kept(config),
                )
            )

    async def start_message(self, record: MachineRecord, image: UnpackedImage) -> Start:
        """What PID 1 will run, secrets opened for the moment of the start only."""
        version = record.version
        secrets: dict[str, str] = {}
        sealed = await self._context.journal.secrets(record.app.name)
        if sealed is not None:
            try:
                secrets = msgspec.json.decode(self._context.node_key.open(sealed.sealed), type=dict[str, str])
            except msgspec.DecodeError as error:
                raise InvalidRequest("is not an object of names and values", field="secrets") from error
        if (sealed.version if sealed else 0) < version.min_secrets_version:
            raise TransientError(
                f"secrets version {version.min_secrets_version} has not reached this host "
                f"(it has {sealed.version if sealed else 'none'})"
            )
        size = guests.resolve(version.config)
        identity = process.Identity(
            app=record.app.name,
            machine_id=record.id,
            instance_id=version.instance_id,
            region=record.region,
            image=version.image,
            private_ip=record.ip6,
            memory_mb=size.memory_mb,
        )
        message = containers.start_message(image, version.config, identity, secrets)
        doors, seating = self._context.ssh, self._context.seating
        return msgspec.structs.replace(
            message,
            ssh=doors.of(record) if doors is not None else None,
            cpus=seating.take(record.id, size) if seating is not None else [],
        )

    async def start(self, message: Start) -> None:
        async with self._deadline(self._context.pace.start_s, "starting the app"):
            await self._context.driver.start(self._id, message)

    async def suspend(self) -> None:
        async with self._deadline(self._context.pace.suspend_s, "suspending the machine"):
            await self._context.driver.suspend(self._id)

    async def resume(self) -> None:
        async with self._deadline(self._context.pace.start_s, "resuming the machine"):
            await self._context.driver.resume(self._id)

    async def ask_to_stop(self, record: MachineRecord, image: UnpackedImage | None) -> float:
        """Signal the app; the seconds after which its end is overdue."""
        stop = record.version.config.stop_config
        asked = record.desired
        signal = signals.stop_signal(stop, asked.signal, image.config.stop_signal if image else "")
        grace_s = signals.stop_timeout_s(stop, asked.timeout_s or containers.stop_timeout_s(record.version.config))
        try:
            await self._context.driver.stop(self._id, signal=signal, grace_s=grace_s)
        except DriverError as error:
            log.warning("stop was not taken; the machine will be killed", machine=self._id, error=str(error))
            return 0.0
        return grace_s + self._context.pace.stop_extra_s

    async def gone(self) -> Runtime | None:
        """Waits until PID 1 is gone; None when nothing of it can be found. A driver that fails is asked again."""
        driver = self._context.driver
        while True:
            try:
                return await driver.wait(self._id)
            except PantalaError as error:
                said = error
            try:
                if await driver.inspect(self._id) is None:
                    return None
            except PantalaError as error:
                said = error
            log.warning("machine cannot be watched", machine=self._id, error=str(said))
            await self._context.clock.sleep(1.0)

    async def clear(self, record: MachineRecord, *, for_good: bool = False) -> None:
        """Nothing is left of the runtime, nor, `for_good`, of a root that is to be kept; what it said is kept first."""
        instance_id = record.runtime_instance or record.version.instance_id
        await self._context.logs.collect(app=record.app.name, machine_id=self._id, instance_id=instance_id)
        async with self._deadline(self._context.pace.teardown_s, "removing the machine's runtime"):
            driver = self._context.driver
            await (driver.destroy(self._id) if for_good else driver.clear(self._id))
        await self._context.logs.forget(self._id, instance_id)

    async def leave_network(self) -> None:
        async with self._deadline(self._context.pace.teardown_s, "removing the machine's network"):
            await self._context.network.remove(self._id)


def plan(record: MachineRecord, allowed: Allowed | None) -> NetworkPlan:
    return NetworkPlan(
        machine_id=record.id,
        slot=record.slot,
        network=record.app.network,
        ip4=record.ip4,
        gateway4=record.gateway4,
        ip6=record.ip6,
        uid_base=record.uid_base,
        allowed=allowed,
    )
