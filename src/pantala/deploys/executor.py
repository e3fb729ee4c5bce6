"""Executes a plan over the public API: wave after wave, each checked before the next; what failed is put back.

The plan and the number of finished waves are kept in the release, so that another executor can see how far this one
came. Runs in the CLI; knows no terminal: it tells what it does through `say`.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import anyio
import msgspec

from pantala.client.api import ApiClient
from pantala.deploys.health import SILENT_S, HealthWatch, NotTaken, crashes, described, exit_of
from pantala.deploys.leases import Leases, hold
from pantala.errors import CapacityError, DiskFull, NotFound, PantalaError, RequestTimeout, UserError
from pantala.kit.tasks import first_error, to_the_end
from pantala.planner.deploy import Action, Create, Destroy, Plan, ReleaseCommand, Update, Wave
from pantala.wire.api import LaunchMachineRequest, Release, UpdateReleaseRequest
from pantala.wire.machine import Machine

LAUNCHES_AT_ONCE = 8
PUT_BACK_S = 60.0
INTERRUPTED_S = 12.0
"""Within the time of the leases, which nobody refreshes once the deploy is cancelled."""
RECORD_END_S = 10.0

T = TypeVar("T")


class DeployFailed(UserError):
    """Why, and in which state the app was left."""

    status = "deploy_failed"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    wait_timeout_s: float = 300.0
    smoke_checks: bool = True
    rollback: bool = True
    lease_wait_s: float = 30.0
    silent_s: float = SILENT_S


class Executor:
    """One deploy of one app."""

    def __init__(
        self, client: ApiClient, app: str, release: Release, *, settings: Settings, say: Callable[[str], None]
    ) -> None:
        self._client = client
        self._app = app
        self._release = release
        self._settings = settings
        self._say = say
        self._health = HealthWatch(client, app, smoke_checks=settings.smoke_checks, silent_s=settings.silent_s)
        self._before: dict[str, Machine] = {}
        self._touched: list[str] = []
        self._created: list[str] = []
        self._changed = False
        """Whether anything may be otherwise than before."""
        self._left = "the deploy was interrupted"

    async def run(self, plan: Plan, machines: list[Machine]) -> None:
        """The release ends as complete, failed or (cancelled) interrupted; it is withdrawn when nothing was changed.
        Cancelled, the open wave is put back first. Raises DeployFailed, LeaseHeld and what the API raises."""
        self._before = {machine.id: machine for machine in machines}
        leased = [
            action.machine_id for wave in plan.waves for action in wave.actions if isinstance(action, Update | Destroy)
        ]
        plan_text = msgspec.json.encode(plan).decode()
        outcome, reason = "interrupted", ""
        try:
            held = hold(self._client, self._app, leased, description=self._title, wait_s=self._settings.lease_wait_s)
            async with first_error(), held as leases:
                if leased:
                    await self._close_abandoned()
                await self._record(status="running", plan=plan_text, cursor=0)
                await self._waves(plan, leases)
                outcome = "complete"
        except PantalaError as error:
            outcome, reason = "failed", error.message
            raise
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(RECORD_END_S):
                await self._record_end(outcome, reason or ("" if outcome == "complete" else self._left))

    async def _close_abandoned(self) -> None:
        """With the leases of all machines in hand nobody else is at work: what still says running was killed."""
        try:
            for release in await self._client.releases(self._app):
                if release.status in ("pending", "running") and release.version < self._release.version:
                    reason = f"its deploy ended without a word; v{self._release.version} followed"
                    ended = UpdateReleaseRequest(status="interrupted", reason=reason)
                    await self._client.update_release(self._app, release.id, ended)
                    self._say(f"    v{release.version} was left in the middle; this deploy goes on from there")
        except PantalaError as error:
            self._say(f"    releases that were left in the middle could not be marked: {error.message}")

    @property
    def _title(self) -> str:
        return f"deploy v{self._release.version}"

    async def _record_end(self, outcome: str, reason: str) -> None:
        """What the deploy did is done: that it could not be written down must not hide why it failed."""
        if outcome != "complete" and not self._changed:
            with suppress(PantalaError):  # not the newest any more: then it stays, with its reason
                await self._client.withdraw_release(self._app, self._release.id)
                self._say(f"    nothing was changed; v{self._release.version} is withdrawn")
                return
        try:
            await self._record(status=outcome, reason=reason)
        except PantalaError as error:
            self._say(f"    the release could not be marked as {outcome}: {error.message}")

    async def _waves(self, plan: Plan, leases: Leases) -> None:
        for number, wave in enumerate(plan.waves, start=1):
            self._say(f"[{number}/{len(plan.waves)}] {wave.title}")
            finished = len(self._touched), len(self._created)
            try:
                await self._wave(wave, leases)
            except PantalaError as error:
                left = await self._put_back(leases)
                raise DeployFailed(f"{error.message}; {left}", hint=error.hint) from error
            except anyio.get_cancelled_exc_class():
                await self._interrupted(leases, *finished)
                raise
            with anyio.CancelScope(shield=True):  # the next wave hears of a cancellation, and tells what is left
                await self._record(cursor=number)

    async def _wave(self, wave: Wave, leases: Leases) -> None:
        limiter = anyio.CapacityLimiter(LAUNCHES_AT_ONCE)

        async def one(action: Action) -> None:
            async with limiter:
                await self._act(action, leases, check=wave.check)

        async with first_error(), anyio.create_task_group() as tasks:
            for action in wave.actions:
                tasks.start_soon(one, action)
        if leases.lost:
            raise UserError(leases.lost, hint="someone else may be deploying this app")

    async def _act(self, action: Action, leases: Leases, *, check: bool) -> None:
        match action:
            case Create():
                await self._create(action, check=check)
            case Update():
                await self._update(action, leases, check=check)
            case Destroy():
                nonce = leases.nonce(action.machine_id)
                await self._change(self._client.destroy(self._app, action.machine_id, force=True, nonce=nonce))
                leases.forget(action.machine_id)
            case ReleaseCommand():
                await self._release_command(action)

    async def _change(self, call: Coroutine[Any, Any, T]) -> T:
        """A change that was sent is waited for even when the deploy is cancelled: what it did may have to be undone.
        One that is refused changed nothing."""
        try:
            answer = await to_the_end(call)
        except (UserError, CapacityError) as error:
            self._changed |= isinstance(error, RequestTimeout)
            raise
        except BaseException:
            self._changed = True
            raise
        self._changed = True
        return answer

    # -- actions -----------------------------------------------------------------------------------------------------

    async def _create(self, action: Create, *, check: bool) -> None:
        request = LaunchMachineRequest(config=action.config, region=action.region)
        machine = await self._change(self._client.create_machine(self._app, request))
        self._created.append(machine.id)
        if check:
            await self._wait_well(machine, since_ms=0)
            self._say(f"    machine {machine.id} [{action.group}] is up in {machine.region}")

    async def _update(self, action: Update, leases: Leases, *, check: bool) -> None:
        since_ms = _after(self._before[action.machine_id])
        nonce = leases.nonce(action.machine_id)
        request = LaunchMachineRequest(config=action.config, skip_launch=not action.warm)
        self._touched.append(action.machine_id)
        try:
            machine = await self._change(
                self._client.update_machine(self._app, action.machine_id, request, nonce=nonce)
            )
        except (UserError, CapacityError, DiskFull) as error:
            if not isinstance(error, RequestTimeout):
                self._touched.remove(action.machine_id)  # refused: it runs on as it was, there is nothing to put back
            raise
        if action.spearhead:
            await self._client.start(self._app, machine.id, nonce=nonce)
        if check and (action.warm or action.spearhead):
            try:
                await self._wait_well(machine, since_ms=since_ms)
            except NotTaken:
                if not action.spearhead:
                    self._touched.remove(action.machine_id)  # it runs on as it was
                raise
        if action.spearhead:
            await self._client.stop(self._app, machine.id, nonce=nonce)
            self._say(f"    machine {machine.id} [{action.group}] is well and asleep again")
        elif action.warm and check:
            self._say(f"    machine {machine.id} [{action.group}] is up")

    async def _wait_well(self, machine: Machine, *, since_ms: int) -> None:
        await self._health.until_well(
            machine.id, version=machine.instance_id, since_ms=since_ms, timeout_s=self._settings.wait_timeout_s
        )

    async def _release_command(self, action: ReleaseCommand) -> None:
        request = LaunchMachineRequest(config=action.config, region=action.region)
        machine = await self._change(self._client.create_machine(self._app, request))
        try:
            with anyio.fail_after(action.timeout_s):
                while machine.state not in _ENDED:
                    await anyio.sleep(0.2)
                    machine = await self._client.machine(self._app, machine.id)
        except TimeoutError:
            raise UserError(f"the release command took more than {action.timeout_s:g} s") from None
        finally:
            if machine.state not in _ENDED:
                with anyio.CancelScope(shield=True), anyio.move_on_after(INTERRUPTED_S), suppress(PantalaError):
                    await self._client.destroy(self._app, machine.id, force=True)
        failed = [event for event in crashes(machine) if (e := exit_of(event)) and e.exit_code != 0]
        if failed or machine.state in ("failed", "launch_failed"):
            lines = (await self._client.logs(self._app, machine_id=machine.id)).lines
            text = "\n".join(f"    {line.message}" for line in lines if line.provider == "app")
            reason = described(exit_of(failed[0]), when="") if failed else "could not start"
            raise UserError(f"the release command {reason}", hint=f"its output:\n{text}" if text else None)

    # -- putting back ------------------------------------------------------------------------------------------------

    async def _put_back(self, leases: Leases) -> str:
        """Undo all that this deploy did to machines; says how the app was left."""
        if not self._settings.rollback:
            return self._kept()
        if troubles := await self._undo(leases, self._touched, self._created, within_s=PUT_BACK_S):
            return troubles
        return "the previous version still serves" if self._before else "nothing was left behind"

    async def _interrupted(self, leases: Leases, touched: int, created: int) -> None:
        """Put the open wave back; machines of finished waves (the first so many) are well and stay."""
        if not self._settings.rollback:
            self._left += f"; {self._kept()}"
        else:
            open_wave = self._touched[touched:], self._created[created:]
            finished = len({*self._touched[:touched], *self._created[:created]})
            self._left += (
                f"; {await self._undo(leases, *open_wave, within_s=INTERRUPTED_S) or 'its open step was put back'}"
            )
            if finished:
                self._left += f"; the new version stays on {_machines(finished)} of finished steps"
            elif self._before:
                self._left += "; the previous version still serves"
        self._say(f"    {self._left}; `pantala deploy` begins again")

    def _kept(self) -> str:
        return f"{len(self._touched)} machine(s) keep the new version, the others the old one"

    async def _undo(self, leases: Leases, touched: Sequence[str], created: Sequence[str], *, within_s: float) -> str:
        """Also when the deploy is cancelled; empty when all was put back, else what was not."""
        with anyio.CancelScope(shield=True), anyio.move_on_after(within_s):
            await leases.refresh()  # nothing else does once the deploy is cancelled
            return await self._each_back(leases, touched, created)
        return f"not everything could be put back within {within_s:g} s"

    async def _each_back(self, leases: Leases, touched: Sequence[str], created: Sequence[str]) -> str:
        troubles: list[str] = []
        for machine_id in reversed(touched):
            before = self._before.get(machine_id)
            if before is None or before.config is None:
                continue
            self._say(f"    putting machine {machine_id} back to its previous version")
            request = LaunchMachineRequest(config=before.config, skip_launch=before.state != "started")
            try:
                await self._client.update_machine(self._app, machine_id, request, nonce=leases.nonce(machine_id))
            except PantalaError as error:
                troubles.append(f"{machine_id}: {error.message}")
        for machine_id in created:
            try:
                await self._client.destroy(self._app, machine_id, force=True)
            except NotFound:  # it destroyed itself
                continue
            except PantalaError as error:
                troubles.append(f"{machine_id}: {error.message}")
        if troubles:
            return f"not everything could be put back ({'; '.join(troubles)})"
        return ""

    async def _record(
        self,
        *,
        status: str | None = None,
        plan: str | None = None,
        cursor: int | None = None,
        reason: str | None = None,
    ) -> None:
        request = msgspec.convert(
            {"status": status, "plan": plan, "cursor": cursor, "reason": reason}, UpdateReleaseRequest
        )
        await self._client.update_release(self._app, self._release.id, request)


_ENDED = ("destroyed", "stopped", "failed", "launch_failed")


def _machines(count: int) -> str:
    return "1 machine" if count == 1 else f"{count} machines"


def _after(machine: Machine) -> int:
    """Milliseconds after everything that had happened to a machine before the deploy touched it (the host's clock)."""
    return max((event.timestamp for event in machine.events), default=0) + 1
