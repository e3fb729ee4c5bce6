"""One build on the platform: buildctl against the platform's BuildKit, its progress as `BuildEvent`s."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import tempfile
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE

import anyio
import anyio.to_thread
import structlog
from anyio.streams.buffered import BufferedByteReceiveStream

from pantala.builds.progress import QUIET_S, Progress
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
RESTART_WITHIN_S = 30
EPOCH = 1_735_689_600
"""Later times in an image are set to this one; those of its sources are earlier and stay."""


class BuildkitBuilder:
    """`push_registry`: `host:port` under which BuildKit reaches the registry that images name as `registry_name`.

    `folder` and `registry_folder`: where BuildKit and the registry keep what they have, if that is on this machine.
    `quiet_s`: from when on a BuildKit that has nothing to do and says nothing hangs.
    """

    def __init__(
        self,
        *,
        socket: Path,
        push_registry: str,
        registry_name: str,
        folder: Path | None = None,
        registry_folder: Path | None = None,
        quiet_s: float = QUIET_S,
    ) -> None:
        self._socket = socket
        self._push_registry = push_registry
        self._registry_name = registry_name
        self._folder = folder
        self._registry_folder = registry_folder
        self._quiet_s = quiet_s

    async def build(
        self, *, app: str, context_dir: Path, options: BuildOptions, image: str, push_token: Secret
    ) -> AsyncGenerator[BuildEvent]:
        """Build `context_dir` and push it as `image`; the last event is `done` (with the digest) or `failed`.

        A BuildKit that hangs is restarted, once: nobody's next build would end either.
        """
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
            deadline = anyio.current_time() + BUILD_TIMEOUT_S
            for remedy in (self._restart, None):
                ended = _Ended(Progress(self._quiet_s))
                async with aclosing(self._attempt(command, _environment(work), deadline, ended)) as events:
                    async for event in events:
                        yield event
                if not ended.hung or remedy is None:
                    break
                log.error("the builder hangs and is restarted", app=app, said=ended.progress.failure())
                yield BuildEvent(type="step", text="the builder did not answer any more; it is restarted, once")
                await remedy()
            if ended.full is not None:
                await self._drop_cache()
                yield BuildEvent(type="failed", text=ended.full.sentence())
            elif ended.hung:
                yield BuildEvent(
                    type="failed", text="the builder does not answer; its operator finds why in buildkitd.log"
                )
            elif anyio.current_time() >= deadline:
                yield BuildEvent(type="failed", text=f"the build took more than {BUILD_TIMEOUT_S // 60} minutes")
            elif ended.code != 0:
                log.info("build failed", app=app, code=ended.code)
                yield BuildEvent(type="failed", text=await self._explained(ended.progress.failure(), app))
            else:
                digest = json.loads(metadata.read_text())["containerimage.digest"]
                yield BuildEvent(type="done", image=image, digest=digest)

    async def _attempt(
        self, command: list[str], environment: dict[str, str], deadline: float, ended: _Ended
    ) -> AsyncGenerator[BuildEvent]:
        """Run buildctl to its end, which `ended` tells; its steps and their words on the way."""
        process = await anyio.open_process(command, env=environment, stderr=PIPE, stdout=DEVNULL)
        assert process.stderr is not None
        output = BufferedByteReceiveStream(process.stderr)
        heard_at = anyio.current_time()
        try:
            while (line := await _next_line(output, deadline)) is not None:
                if line:
                    heard_at = anyio.current_time()
                    for event in ended.progress.feed(line):
                        yield event
                quiet_at_most_s = ended.progress.quiet_at_most_s()
                ended.hung = quiet_at_most_s is not None and anyio.current_time() - heard_at > quiet_at_most_s
                if self._folder is not None and not has_room(self._folder):
                    # With what is left BuildKit can still clean up; on a disk that is really full it cannot.
                    ended.full = disk_full("this build", self._folder)
                if ended.hung or ended.full is not None:
                    process.kill()
                    break
            with anyio.CancelScope(deadline=deadline):
                await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
            with anyio.CancelScope(shield=True), anyio.move_on_after(5):
                await process.aclose()
        ended.code = process.returncode

    async def _restart(self) -> None:
        """End the daemon behind the socket; who runs it starts it again. Waits until it answers, not for ever."""
        pid = _pid_behind(self._socket)
        if pid is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for _ in range(RESTART_WITHIN_S):
            if _pid_behind(self._socket) not in (None, pid):
                return
            await anyio.sleep(1)

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


@dataclass
class _Ended:
    """How an attempt ended. `hung`: BuildKit said nothing any more. `full`: the disk left no room."""

    progress: Progress
    code: int | None = None
    hung: bool = False
    full: DiskFull | None = None


async def _next_line(stream: BufferedByteReceiveStream, deadline: float) -> bytes | None:
    """The next line, empty when none comes at once; None at the end or when the time is up."""
    with anyio.CancelScope(deadline=min(deadline, anyio.current_time() + LOOK_EVERY_S)):
        try:
            return await stream.receive_until(b"\n", PROGRESS_LINE_BYTES_MAX)
        except (anyio.IncompleteRead, anyio.EndOfStream):
            return None
    return None if anyio.current_time() >= deadline else b""


def _pid_behind(path: Path) -> int | None:
    """The process that listens on a Unix socket; None when none does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(1)
        try:
            client.connect(str(path))
            credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        except OSError:
            return None
    return struct.unpack("3i", credentials)[0]


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
