"""One build on the platform: buildctl against the platform's BuildKit, its progress as `BuildEvent`s."""

from __future__ import annotations

import base64
import json
import re
import shutil
import tempfile
from collections.abc import AsyncGenerator
from datetime import datetime
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

import anyio
import anyio.to_thread
import msgspec
import structlog
from anyio.streams.buffered import BufferedByteReceiveStream

from pantala.errors import DiskFull
from pantala.kit import binaries
from pantala.kit.disk import disk_full, has_room
from pantala.kit.secret import Secret
from pantala.wire.api import BuildEvent, BuildOptions

log = structlog.get_logger()

BUILD_TIMEOUT_S = 1_800
PROGRESS_LINE_BYTES_MAX = 4 * 1024 * 1024
PRUNE_WITHIN_S = 20
LOOK_EVERY_S = 0.1
"""How often a build's disk is looked at: a fast writer fills what is kept free in a second."""
ERROR_CHARACTERS_MAX = 2_000
STEP_CHARACTERS_MAX = 90
EPOCH = 1_735_689_600
"""Later times in an image are set to this one; those of its sources are earlier and stay."""
_DIGEST = re.compile(r"@sha256:[0-9a-f]{64}")
_NOISE = re.compile(r"^\[internal\] |^resolve image config|^exporting|^sha256:|^importing cache")


class BuildkitBuilder:
    """`push_registry`: `host:port` under which BuildKit reaches the registry that images name as `registry_name`.

    `folder` and `registry_folder`: where BuildKit and the registry keep what they have, if that is on this machine.
    """

    def __init__(
        self,
        *,
        socket: Path,
        push_registry: str,
        registry_name: str,
        folder: Path | None = None,
        registry_folder: Path | None = None,
    ) -> None:
        self._socket = socket
        self._push_registry = push_registry
        self._registry_name = registry_name
        self._folder = folder
        self._registry_folder = registry_folder

    async def build(
        self, *, app: str, context_dir: Path, options: BuildOptions, image: str, push_token: Secret
    ) -> AsyncGenerator[BuildEvent]:
        """Build `context_dir` and push it as `image`; the last event is `done` (with the digest) or `failed`."""
        with tempfile.TemporaryDirectory(prefix="pantala-build-") as scratch:
            work = Path(scratch)
            write_credential(work, self._push_registry, push_token)
            metadata = work / "metadata.json"
            command = build_command(
                socket=self._socket,
                context=context_dir,
                options=options,
                target=image.replace(self._registry_name, self._push_registry, 1),
                metadata=metadata,
            )
            progress = Progress()
            process = await anyio.open_process(command, env=_environment(work), stderr=PIPE, stdout=DEVNULL)
            assert process.stderr is not None
            output = BufferedByteReceiveStream(process.stderr)
            deadline = anyio.current_time() + BUILD_TIMEOUT_S
            full: DiskFull | None = None
            try:
                while (events := await _next_events(output, progress, deadline)) is not None:
                    for event in events:
                        yield event
                    if self._folder is not None and not has_room(self._folder):
                        # With what is left BuildKit can still clean up; on a disk that is really full it cannot.
                        full = disk_full("this build", self._folder)
                        process.kill()
                        break
                with anyio.CancelScope(deadline=deadline):
                    await process.wait()
            finally:
                if process.returncode is None:
                    process.kill()
                with anyio.CancelScope(shield=True), anyio.move_on_after(5):
                    await process.aclose()
            if full is not None:
                await self._drop_cache()
                yield BuildEvent(type="failed", text=full.sentence())
            elif anyio.current_time() >= deadline:
                yield BuildEvent(type="failed", text=f"the build took more than {BUILD_TIMEOUT_S // 60} minutes")
            elif process.returncode != 0:
                log.info("build failed", app=app, code=process.returncode)
                yield BuildEvent(type="failed", text=await self._explained(progress.failure(), app))
            else:
                digest = json.loads(metadata.read_text())["containerimage.digest"]
                yield BuildEvent(type="done", image=image, digest=digest)

    async def _explained(self, failure: str, app: str) -> str:
        """What BuildKit and the registry say of a full disk names neither the disk nor a remedy."""
        said: DiskFull | None = None
        if self._folder is not None and "no space left on device" in failure.lower():
            said = disk_full("this build", self._folder)
            await self._drop_cache()
        elif self._registry_folder is not None and "failed to push" in failure and not has_room(self._registry_folder):
            said = disk_full("the image in the registry", self._registry_folder)
            await anyio.to_thread.run_sync(drop_uploads, self._registry_folder, app)
        return f"{failure}\n{said.sentence()}" if said else failure

    async def _drop_cache(self) -> None:
        """Everything that no build uses, until the next one finds room: a step that was cut off ends a little later."""
        command = [str(binaries.find("buildctl")), f"--addr=unix://{self._socket}", "prune"]
        log.warning("the builds' disk is full; their cache is dropped")
        with anyio.move_on_after(PRUNE_WITHIN_S):
            while self._folder is not None:
                await anyio.run_process(command, check=False)
                if has_room(self._folder):
                    return
                await anyio.sleep(0.5)


def drop_uploads(registry_folder: Path, app: str) -> None:
    """What a failed push left half sent, on a disk that needs the room; the registry itself keeps it for a week."""
    repository = registry_folder / "docker" / "registry" / "v2" / "repositories" / app
    shutil.rmtree(repository / "_uploads", ignore_errors=True)


class Progress:
    """Turns BuildKit's raw progress into steps with their time, and remembers what explains a failure."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._told: set[str] = set()
        self._error = ""
        self._tail: list[str] = []

    def feed(self, line: bytes) -> list[BuildEvent]:
        try:
            status: dict[str, Any] = msgspec.json.decode(line)
        except msgspec.DecodeError:
            self._remember(line.decode(errors="replace").strip())
            return []
        events: list[BuildEvent] = []
        for vertex in status.get("vertexes") or ():
            events += self._vertex(vertex)
        for entry in status.get("logs") or ():
            text = base64.b64decode(entry.get("data") or "").decode(errors="replace").rstrip()
            for part in text.splitlines():
                self._remember(part)
                events.append(BuildEvent(type="log", text=part))
        return events

    def failure(self) -> str:
        """Why the build failed: the failing step's own words, then the last lines of its output."""
        lines = [*self._tail[-12:], self._error] if self._error else self._tail[-12:]
        return "\n".join(line for line in lines if line)[-ERROR_CHARACTERS_MAX:] or "the build failed without a word"

    def _vertex(self, vertex: dict[str, Any]) -> list[BuildEvent]:
        digest, name = str(vertex.get("digest")), str(vertex.get("name") or "")
        if vertex.get("error"):
            self._error = str(vertex["error"])
        if not vertex.get("completed") or digest in self._told or _NOISE.match(name):
            return []
        self._told.add(digest)
        took_ms = 0 if vertex.get("cached") else _between_ms(vertex.get("started"), vertex["completed"])
        suffix = " (cached)" if vertex.get("cached") else ""
        return [BuildEvent(type="step", text=f"{_shortened(name)}{suffix}", took_ms=took_ms)]

    def _remember(self, line: str) -> None:
        self._tail = [*self._tail[-30:], line]


async def _next_events(
    stream: BufferedByteReceiveStream, progress: Progress, deadline: float
) -> list[BuildEvent] | None:
    """The events of the next line, none when it does not come at once; None at the end or when the time is up."""
    with anyio.CancelScope(deadline=min(deadline, anyio.current_time() + LOOK_EVERY_S)):
        try:
            return progress.feed(await stream.receive_until(b"\n", PROGRESS_LINE_BYTES_MAX))
        except (anyio.IncompleteRead, anyio.EndOfStream):
            return None
    return None if anyio.current_time() >= deadline else []


def build_command(*, socket: Path, context: Path, options: BuildOptions, target: str, metadata: Path) -> list[str]:
    folder, _, filename = options.dockerfile.rpartition("/")
    command = [
        str(binaries.find("buildctl")),
        f"--addr=unix://{socket}",
        "build",
        "--progress=rawjson",
        "--frontend=dockerfile.v0",
        f"--local=context={context}",
        f"--local=dockerfile={context / folder}",
        f"--opt=filename={filename}",
        # Times inside the image do not depend on when it was built: the same source gives the same digest.
        f"--opt=build-arg:SOURCE_DATE_EPOCH={EPOCH}",
        f"--output=type=image,name={target},push=true,oci-mediatypes=true,compression=gzip,rewrite-timestamp=true",
        f"--metadata-file={metadata}",
    ]
    if options.target:
        command.append(f"--opt=target={options.target}")
    if options.no_cache:
        command.append("--no-cache")
    return command + [f"--opt=build-arg:{name}={value}" for name, value in sorted(options.args.items())]


def write_credential(folder: Path, registry: str, token: Secret) -> None:
    """A Docker config that only this build reads: BuildKit sends the token as it is and asks nobody for another."""
    path = folder / "config.json"
    path.touch(mode=0o600)
    path.write_text(json.dumps({"auths": {registry: {"registrytoken": token.reveal()}}}))


def _environment(work: Path) -> dict[str, str]:
    return {"DOCKER_CONFIG": str(work), "HOME": str(work), "PATH": "/usr/bin:/bin"}


def _shortened(name: str) -> str:
    """A step's name on one line: runs of spaces and full digests say nothing to a reader."""
    text = _DIGEST.sub("", " ".join(name.split()))
    return text if len(text) <= STEP_CHARACTERS_MAX else text[: STEP_CHARACTERS_MAX - 1] + "…"


def _between_ms(started: str | None, completed: str) -> int:
    if not started:
        return 0
    begin, end = datetime.fromisoformat(started), datetime.fromisoformat(completed)
    return max(0, round((end - begin).total_seconds() * 1000))
