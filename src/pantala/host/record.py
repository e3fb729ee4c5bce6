"""What a server remembers of being a host: `<root>/host.json`, written by `init` and `join`, read by `run` and `leave`.

<root>/host/      the host's state (`place.py`)        <root>/logs/       logs of its processes
<root>/control/   first host: the control plane's      <root>/registry/   first host: images
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from pantala.builds.daemon import BuildDaemon
from pantala.errors import InvalidRequest, NotFound
from pantala.host.builds import Builds
from pantala.host.control import Platform
from pantala.host.identity import load_joined
from pantala.host.place import Place
from pantala.host.processes import control_processes, host_processes
from pantala.host.settings import Tuning
from pantala.host.supervisor import Process
from pantala.host.tunnels import own_tunnel
from pantala.kit.files import write_private

ROOT = Path("/var/lib/pantala")
RUN = Path("/run/pantala/host")
BUILDS_NETNS = "pantala-builds"


class FirstHost(msgspec.Struct, frozen=True, kw_only=True):
    """What the first host has beside the others' parts. `mirrored`: registries that are not in reach and that the
    platform's stands in for."""

    platform: Platform
    builds: Builds
    mirrored: list[str]

    def builder(self) -> BuildDaemon:
        return BuildDaemon(
            root=Path(self.platform.builder_state),
            socket=Path(self.platform.builder),
            registry=self.platform.registry,
            mirrored=tuple(self.mirrored),
        )


class HostRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`systemd`: its units run the processes; otherwise `pantala host run` does."""

    root: str
    place: Place
    tuning: Tuning
    systemd: bool
    first: FirstHost | None = None

    @property
    def root_dir(self) -> Path:
        return Path(self.root)

    def processes(self) -> list[Process]:
        """Writes the settings anew and says what to start. Raises NotFound when the host has not joined."""
        joined = load_joined(self.place)
        if joined is None:
            raise NotFound(f"there is no {self.place.joined}", hint="`pantala host join TOKEN` makes this a host")
        self.place.make_folders()
        own = [*own_tunnel(self.place), *host_processes(self.place, joined, self.tuning)]
        if self.first is None:
            return own
        control = control_processes(
            self.place,
            self.first.platform,
            builder=self.first.builder(),
            builds_netns=self.first.builds.netns,
        )
        return [*control, *own]


def save_record(record: HostRecord) -> None:
    record.root_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_private(record.root_dir / "host.json", msgspec.json.format(msgspec.json.encode(record), indent=2))


def load_record(root: Path) -> HostRecord | None:
    path = root / "host.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=HostRecord)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"{path}: {error}") from error
