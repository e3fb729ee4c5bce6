"""`HostNetwork`: the network namespaces, links, addresses and firewall of one host's machines.

Works in the network namespace that the agent lives in (a box gives each host one), changes nothing outside of it, and
keeps nothing in memory: what belongs to whom is read back from files in `run_dir`, aliases of links and comments of set
elements. Called by the agent through `pantala.agent.ports.Network`.

Namespaces are pinned by bind mounts in the mount namespace of PID 1 where that may be entered, because the caller's
own may be private to it (`ip netns exec` and systemd units have such) and would take them along when it dies. Where a
pin is lost all the same while a machine runs, its namespace is found again through the machine's processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import msgspec

from pantala.domain.policies import Allowed
from pantala.domain.runtime import ListenSocket, NetworkHandle, NetworkPlan
from pantala.errors import DriverError, InternalError, NotFound
from pantala.net import commands, links, rules, sixpn, sockets
from pantala.net.rules import EgressPolicy

_FORWARDING = (
    "ipv4/ip_forward",
    "ipv6/conf/all/forwarding",
)
_LAST_METRIC = 65_535
PID_1_MOUNTS = "/proc/1/ns/mnt"
_UNREADABLE_PATH_CHARACTERS = set(" \t\n\"'\\#")


class _Kept(NetworkPlan, frozen=True, kw_only=True):
    """A plan as its file has it, with what the machine may have been allowed before: it stays until the firewall has
    been changed, so that nothing is forgotten whenever this process dies."""

    former: tuple[Allowed, ...] = ()


class HostNetwork:
    """`init` is the host's `pantala-init`, whose host side makes namespaces."""

    def __init__(
        self,
        *,
        run_dir: Path,
        init: Path,
        allow_private_ranges: bool = False,
        closed: Sequence[str] = (),
    ) -> None:
        # Paths go into `ip -batch` lines, which have no quoting worth the name.
        if _UNREADABLE_PATH_CHARACTERS & set(str(run_dir)):
            raise InternalError(f"run_dir must not hold spaces or quotes: {run_dir}")
        self._plans = run_dir / "plans"
        self._pins = run_dir / "namespaces"
        self._init = init
        self._policy = EgressPolicy(allow_private_ranges=allow_private_ranges, closed=tuple(closed))
        self._firewall = anyio.Lock()

    # --- the host --------------------------------------------------------------------------------------------------

    async def setup(self) -> None:
        """Forwarding, the platform's address, the firewall. Elements of machines stay as they are."""
        for folder in (self._plans, self._pins):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _forward()
        async with self._firewall:
            await self._nft(rules.ruleset(self._policy))
        # What no machine and no peer has is refused here rather than sent to the default gateway.
        nowhere = f"route replace unreachable {sixpn.EVERYTHING} metric {_LAST_METRIC}"
        await self._ip(["link set dev lo up", f"addr replace {sixpn.DNS}/128 dev lo nodad", nowhere])
        await self._lead_to_proxy()

    async def _lead_to_proxy(self) -> None:
        """What the firewall marked for the proxy is delivered here, although the address may be nobody's."""
        table = str(rules.ENTRY_TABLE)
        for family in ("-4", "-6"):
            there = await commands.run(["ip", family, "rule", "show", "pref", table])
            if not there.strip():
                mark = f"{rules.ENTRY_MARK}/{rules.ENTRY_MARK}"
                await commands.run(["ip", family, "rule", "add", "pref", table, "fwmark", mark, "lookup", table])
            await commands.run(["ip", family, "route", "replace", "local", "default", "dev", "lo", "table", table])

    async def teardown(self) -> None:
        """Remove every machine, the firewall and the platform's address. Forwarding stays on."""
        for machine_id in await self.list():
            await self.remove(machine_id)
        async with self._firewall:
            await self._nft(rules.teardown())
        await commands.attempt(["ip", "addr", "del", f"{sixpn.DNS}/128", "dev", "lo"])
        await commands.attempt(["ip", "-6", "route", "del", "unreachable", str(sixpn.EVERYTHING)])
        table = str(rules.ENTRY_TABLE)
        for family in ("-4", "-6"):
            await commands.attempt(["ip", family, "rule", "del", "pref", table])
            await commands.attempt(["ip", family, "route", "flush", "table", table])

    # --- machines --------------------------------------------------------------------------------------------------

    async def ensure(self, plan: NetworkPlan) -> NetworkHandle:
        """One call of the helper does it all; what it leaves when it dies half way has an owner by its plan."""
        pins = self._pins / plan.machine_id
        kept = self._note(plan)
        is_pinned = _is_pinned(pins / "net") and _is_pinned(pins / "user")
        is_in_the_way = False
        namespaces: dict[str, Any] | None = None
        if not is_pinned:
            has_link = _has_link(links.link_name(plan.machine_id))
            adopted = await self._find_process(plan) if has_link else None
            is_in_the_way = has_link and adopted is None
            await self._unpin(plan.machine_id)
            pins.mkdir(parents=True)
            namespaces = _namespaces(plan, pins, adopted)
        netns = _seen_from_here(pins / "net")
        if _is_policed(kept):
            await self._enforce([plan.machine_id])
        await self._help(
            {
                "do": "join",
                "namespaces": namespaces,
                "netns": str(netns),
                "link": links.create_link(plan),
                "replaces_link": is_in_the_way,
                "host": links.host_side(plan),
                "machine": links.machine_side(plan),
                "elements": rules.machine_elements(plan),
            }
        )
        return NetworkHandle(netns=netns, ip4=plan.ip4, ip6=plan.ip6, userns=_seen_from_here(pins / "user"))

    async def _find_process(self, plan: NetworkPlan) -> int | None:
        """A process in the namespace that holds the machine's address."""
        for pid in _one_process_per_namespace():
            show = [
                "nsenter",
                f"--net=/proc/{pid}/ns/net",
                "--",
                "ip",
                "-json",
                "addr",
                "show",
                "dev",
                links.MACHINE_LINK,
            ]
            code, out, _ = await commands.attempt(show)
            if code == 0 and any(
                address.get("local") == plan.ip6 for link in json.loads(out) for address in link.get("addr_info", [])
            ):
                return pid
        return None

    async def remove(self, machine_id: str) -> None:
        """The link, the elements, the namespaces (they live on while a process is in them), the plan."""
        async with self._firewall:
            plan = self._read_plan(machine_id)
            if plan is not None and _is_policed(plan):
                await self._nft(rules.remove_machine(plan, plan.former))
            # Before the rest, and in this turn: `police` would put elements back.
            self._plan_file(machine_id).unlink(missing_ok=True)
        name = links.link_name(machine_id)
        await self._leave(machine_id, name, [] if plan is None else rules.machine_elements(plan))
        if plan is None:
            async with self._firewall:
                await self._remove_elements(machine_id)

    async def police(self, wanted: Mapping[str, Allowed]) -> None:
        """What network policies leave machines from now on, by id, in one transaction. Machines that are not there, or
        have it so already, cost nothing. Connections that are established go on."""
        changed: list[str] = []
        for machine_id, allowed in wanted.items():
            plan = self._read_plan(machine_id)
            if plan is not None and ((plan.allowed or Allowed()) != allowed or plan.former):
                self._note(msgspec.structs.replace(plan, allowed=allowed))
                changed.append(machine_id)
        if changed:
            await self._enforce(changed)

    async def _enforce(self, machine_ids: Sequence[str]) -> None:
        """The firewall as the plan files have it at this moment, whoever wrote them last."""
        async with self._firewall:
            plans = [plan for machine_id in machine_ids if (plan := self._read_plan(machine_id)) is not None]
            await self._nft("".join(rules.add_machine(plan, plan.former) for plan in plans))
            for plan in plans:
                if plan.former and self._read_plan(plan.machine_id) == plan:
                    self._write_plan(msgspec.structs.replace(plan, former=()))

    async def list(self) -> list[str]:
        found = {path.stem for path in self._plans.glob("*.json")}
        if self._pins.is_dir():
            found |= {entry.name for entry in self._pins.iterdir()}
        links_json = json.loads(await commands.run(["ip", "-json", "link", "show"]) or "[]")
        for link in links_json:
            alias = str(link.get("ifalias", ""))
            if str(link.get("ifname", "")).startswith(links.PREFIX) and alias.startswith(links.ALIAS):
                found.add(alias.removeprefix(links.ALIAS))
        found |= {comment for _, _, comment in await self._elements()}
        return sorted(found)

    async def listening(self, machine_id: str) -> list[ListenSocket]:
        """Raises NotFound when the machine has no namespace."""
        pin = self._pins / machine_id / "net"
        if not _is_pinned(pin):
            raise NotFound(f"machine {machine_id} has no network namespace")
        inside = ["nsenter", f"--net={_seen_from_here(pin)}", "--"]
        found: list[ListenSocket] = []
        for proto in ("tcp", "udp"):
            text = await commands.run([*inside, "cat", f"/proc/net/{proto}", f"/proc/net/{proto}6"])
            found += sockets.parse(proto, text)
        return found

    # --- files -----------------------------------------------------------------------------------------------------

    def _plan_file(self, machine_id: str) -> Path:
        if "/" in machine_id or not machine_id:
            raise InternalError(f"{machine_id!r} cannot name a machine's files")
        return self._plans / f"{machine_id}.json"

    def _note(self, plan: NetworkPlan) -> _Kept:
        """Before anything is made, so that it has an owner."""
        before = self._read_plan(plan.machine_id)
        known = (before.allowed if before is not None else None) or Allowed()
        former = before.former if before is not None else ()
        allowed = known if plan.allowed is None else plan.allowed
        if before is not None and allowed != known:
            former = (*former, known)
        fields: dict[str, Any] = msgspec.structs.asdict(plan)
        fields |= {"allowed": allowed, "former": former}
        kept = _Kept(**fields)
        self._write_plan(kept)
        return kept

    def _write_plan(self, plan: _Kept) -> None:
        path = self._plan_file(plan.machine_id)
        draft = path.with_suffix(".new")
        draft.write_bytes(msgspec.json.encode(plan))
        draft.rename(path)

    def _read_plan(self, machine_id: str) -> _Kept | None:
        try:
            return msgspec.json.decode(self._plan_file(machine_id).read_bytes(), type=_Kept)
        except (OSError, msgspec.DecodeError):
            return None

    # --- namespaces ------------------------------------------------------------------------------------------------

    async def _leave(self, machine_id: str, link: str | None, elements: list[dict[str, Any]]) -> None:
        """Without a call of the helper where nothing is left but files."""
        pins = self._pins / machine_id
        pinned = [str(pins / kind) for kind in ("net", "user") if _is_pinned(pins / kind)]
        if elements or pinned or (link is not None and _has_link(link)):
            await self._help(
                {
                    "do": "leave",
                    "link": link,
                    "elements": elements,
                    "pins": pinned,
                    "mount_namespace": _other_mounts(),
                }
            )
        for kind in ("net", "user"):
            _seen_from_here(pins / kind).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            pins.rmdir()

    async def _unpin(self, machine_id: str) -> None:
        """Pins of which one is lost, and files that were to be pins."""
        await self._leave(machine_id, None, [])

    # --- tools -----------------------------------------------------------------------------------------------------

    async def _help(self, request: dict[str, Any]) -> None:
        await commands.run([str(self._init), "network"], stdin=json.dumps({"caller": os.getpid(), **request}))

    async def _ip(self, lines: list[str]) -> None:
        await commands.run(["ip", "-batch", "-"], stdin="\n".join(lines) + "\n")

    async def _nft(self, script: str) -> None:
        """In one transaction. Who changes elements holds `_firewall`."""
        await commands.run(["nft", "-f", "-"], stdin=script)

    async def _elements(self) -> list[tuple[str, str, str]]:
        """(set, element as nft writes it, machine id) of every element that carries an id."""
        code, out, _ = await commands.attempt(["nft", "-json", "list", "table", *rules.TABLE.split()])
        if code != 0:
            return []  # no table: nothing was set up
        found: list[tuple[str, str, str]] = []
        for entry in json.loads(out)["nftables"]:
            content = entry.get("set")
            if content is None or content["name"] not in rules.SETS:
                continue
            for element in content.get("elem", []):
                value = element.get("elem", {}) if isinstance(element, dict) else {}
                if comment := value.get("comment"):
                    found.append((content["name"], _element_text(value["val"]), comment))
        return found

    async def _remove_elements(self, machine_id: str) -> None:
        """By comment, when the plan is gone."""
        mine = [(name, text) for name, text, comment in await self._elements() if comment == machine_id]
        if mine:
            script = "".join(f"delete element {rules.TABLE} {name} {{ {text} }}\n" for name, text in mine)
            await self._nft(script)


def _element_text(value: dict[str, Any] | str) -> str:
    """The JSON of an interface's name or of a concatenation that begins with one, in the words of a script."""
    parts: list[str] = []
    for part in value["concat"] if isinstance(value, dict) else [value]:
        if isinstance(part, dict):
            prefix = part["prefix"]
            parts.append(f"{prefix['addr']}/{prefix['len']}")
        else:
            parts.append(str(part))
    return " . ".join([f'"{parts[0]}"', *parts[1:]])


def _forward() -> None:
    """Forwarding makes Linux ignore router advertisements; links that listen to them are told to go on."""
    base = Path("/proc/sys/net")
    for path in (base / "ipv6/conf").glob("*/accept_ra"):
        with contextlib.suppress(OSError):
            if path.read_text().strip() == "1":
                path.write_text("2")
    for name in _FORWARDING:
        try:
            if (base / name).read_text().strip() != "1":
                (base / name).write_text("1")
        except OSError as error:
            raise DriverError(f"the setting {name} cannot be made: {error.strerror}") from error


def _is_policed(plan: _Kept) -> bool:
    """It has elements besides those of every machine, or may still have."""
    return bool(plan.former) or (plan.allowed or Allowed()) != Allowed()


def _namespaces(plan: NetworkPlan, pins: Path, adopt_pid: int | None) -> dict[str, Any]:
    return {
        "uid_base": plan.uid_base,
        "netns": str(pins / "net"),
        "userns": str(pins / "user"),
        "adopt_pid": adopt_pid,
        "mount_namespace": _other_mounts(),
        "sysctls": links.SYSCTLS,
    }


def _has_link(name: str) -> bool:
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def _other_mounts() -> str | None:
    return PID_1_MOUNTS if _enters_pid_1_mounts() else None


def _enters_pid_1_mounts() -> bool:
    """Whether PID 1 has other mounts than we have, and we may make ours among them."""
    try:
        return Path("/proc/self/ns/mnt").readlink() != Path("/proc/1/ns/mnt").readlink()
    except OSError:  # a container's PID 1 may hold rights that we lack: its namespaces are closed to us then
        return False


def _seen_from_here(pin: Path) -> Path:
    """A pin as this process can open it."""
    return Path(f"/proc/1/root{pin}") if _enters_pid_1_mounts() else pin


def _is_pinned(pin: Path) -> bool:
    """A mount lies on it: another device than its folder."""
    path = _seen_from_here(pin)
    try:
        return path.stat().st_dev != path.parent.stat().st_dev
    except OSError:
        return False


def _one_process_per_namespace() -> list[int]:
    """A pid for each network namespace that is not ours."""
    seen = {Path("/proc/self/ns/net").readlink()}
    pids: list[int] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            namespace = (entry / "ns/net").readlink()
            if namespace not in seen:
                seen.add(namespace)
                pids.append(int(entry.name))
    return pids
