"""Images of one host, unpacked once per digest. Implements the agent's `ImageStore`.

    <root>/layers/<sha256 of the blob>/    a layer as a directory
    <root>/marks/                          which layers are known to be on disk (`durable.py`)
    <root>/images/<sha256>.json            an image: its layers and config; written last, so it is whole
    <root>/tmp/                            swept at start

A layer is renamed into place when it is complete, an image names only complete layers: a crash leaves only `tmp`. What
a power cut may have left half written is dropped when the store is opened, with the images that need it.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec
import structlog

from pantala.domain.runtime import ImageConfig, UnpackedImage
from pantala.errors import DiskFull, InvalidRequest, TransientError
from pantala.images.durable import Marks, replace
from pantala.images.reference import unparse
from pantala.images.registry import Descriptor, RegistryClient, host_architecture
from pantala.kit.clock import Clock
from pantala.kit.disk import room_for
from pantala.kit.ids import ulid
from pantala.kit.tasks import KeyedLocks, first_error
from pantala.wire.machine import ImageRef

log = structlog.get_logger()

LAYERS_MAX = 127
UNPACK_TIMEOUT_S = 300
UNPACKS_AT_ONCE = 2


class _Record(msgspec.Struct, frozen=True):
    layers: list[str]
    config: ImageConfig


class FileImageStore:
    def __init__(self, root: Path, registry: RegistryClient, *, boot: str = "") -> None:
        self._root = root
        self._registry = registry
        self._locks = KeyedLocks()
        self._unpacks = anyio.CapacityLimiter(UNPACKS_AT_ONCE)
        for folder in ("layers", "images"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        shutil.rmtree(root / "tmp", ignore_errors=True)
        (root / "tmp").mkdir(mode=0o700)
        self._marks = Marks(root, root / "tmp", boot=boot)
        self._drop_lost()

    async def run(self, clock: Clock) -> None:
        """Until cancelled: what was unpacked is brought to the disk, where it outlives a power cut."""
        await self._marks.run(clock)

    async def settle(self) -> None:
        """What was unpacked until now is on disk when it returns. Raises OSError."""
        await self._marks.settle()

    def _drop_lost(self) -> None:
        if lost := self._marks.drop_lost():
            log.warning("layers may have been lost with a power cut; they are pulled again", layers=len(lost))
        for path in (self._root / "images").glob("*.json"):
            record = _read(path)
            if record is None or not all(self._layer_path(layer).is_dir() for layer in record.layers):
                path.unlink()
        for left in (self._root / "tmp").iterdir():
            shutil.rmtree(left, ignore_errors=True)

    async def ensure(self, image: ImageRef, *, pull_token: str) -> UnpackedImage:
        try:
            return await self._ensure(image, pull_token)
        except DiskFull:
            await self._drop_layers(self._named())  # what came of the image before there was no room
            raise

    async def _ensure(self, image: ImageRef, pull_token: str) -> UnpackedImage:
        if image.digest and (found := await self.find(image.digest)):
            return found
        manifest = await self._registry.manifest(image, token=pull_token)
        async with self._locks.hold(manifest.digest):
            if found := await self.find(manifest.digest):
                return found
            if len(manifest.layers) > LAYERS_MAX:
                raise InvalidRequest(f"{unparse(image)} has more than {LAYERS_MAX} layers", field="config.image")
            config = await self._config(image, manifest.config, pull_token)
            async with first_error(), anyio.create_task_group() as tasks:
                for layer in {layer.digest: layer for layer in manifest.layers}.values():
                    tasks.start_soon(self._layer, image, layer, pull_token)
            record = _Record(layers=[layer.digest for layer in manifest.layers], config=config)
            with self._room_for(image):
                self._write(self._image_path(manifest.digest), msgspec.json.encode(record))
            log.info("image unpacked", image=unparse(image), digest=manifest.digest, layers=len(record.layers))
        return self._unpacked(manifest.digest, record)

    async def find(self, digest: str) -> UnpackedImage | None:
        record = _read(self._image_path(digest))
        return self._unpacked(digest, record) if record else None

    async def prune(self, keep: set[str]) -> list[str]:
        removed: list[str] = []
        for path in sorted((self._root / "images").glob("*.json")):
            digest = f"sha256:{path.stem}"
            if _read(path) is None or not (digest in keep or self._locks.busy(digest)):
                path.unlink()
                removed.append(digest)
        await self._drop_layers(self._named())
        return removed

    def _named(self) -> set[str]:
        """Layers that an image names."""
        records = (_read(path) for path in (self._root / "images").glob("*.json"))
        return {layer for record in records if record for layer in record.layers}

    async def _drop_layers(self, used: set[str]) -> None:
        """All but those, unless a pull is under way: it may be about to use any layer."""
        if self._locks.busy():
            return
        doomed: list[Path] = []
        for layer in (
            self._root / "layers"
        ).iterdir():  # without a pause: a pull that begins meanwhile sees none of them
            if f"sha256:{layer.name}" not in used:
                self._marks.forget(layer.name)
                doomed.append(layer.rename(self._root / "tmp" / ulid()))
        for tree in doomed:
            await _remove_tree(tree)

    # -- steps -------------------------------------------------------------------------------------------------------

    async def _config(self, image: ImageRef, descriptor: Descriptor, token: str) -> ImageConfig:
        path = self._root / "tmp" / ulid()
        try:
            with self._room_for(image):
                await self._registry.blob(image, descriptor, path, token=token)
            document = msgspec.json.decode(path.read_bytes())
        except msgspec.DecodeError as error:
            raise InvalidRequest(f"{unparse(image)}: its config is not JSON", field="config.image") from error
        finally:
            path.unlink(missing_ok=True)
        return image_config(image, document)

    async def _layer(self, image: ImageRef, layer: Descriptor, token: str) -> None:
        """One layer, unless it is there; shared by all images that have it."""
        final = self._layer_path(layer.digest)
        async with self._locks.hold(layer.digest), self._unpacks:
            if not final.exists():
                work = self._root / "tmp" / ulid()
                blob, tree = work.with_suffix(".blob"), work.with_suffix(".tree")
                try:
                    with self._room_for(image):
                        await self._registry.blob(image, layer, blob, token=token)
                        tree.mkdir(mode=0o755)
                        await self._unpack(image, blob, tree)
                        self._marks.add(final.name)
                        tree.rename(final)
                finally:
                    blob.unlink(missing_ok=True)
                    with anyio.CancelScope(shield=True):
                        await _remove_tree(tree)

    async def _unpack(self, image: ImageRef, blob: Path, tree: Path) -> None:
        with blob.open("rb") as source:
            try:
                with anyio.fail_after(UNPACK_TIMEOUT_S):
                    done = await anyio.run_process(
                        [sys.executable, "-m", "pantala.images.unpack", str(tree)], stdin=source, check=False
                    )
            except TimeoutError as error:
                raise InvalidRequest(
                    f"{unparse(image)}: a layer takes more than {UNPACK_TIMEOUT_S} s to unpack", field="config.image"
                ) from error
        if done.returncode == 2:
            raise InvalidRequest(f"{unparse(image)}: {done.stderr.decode().strip()}", field="config.image")
        if done.returncode == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tree))
        if done.returncode != 0:
            raise TransientError(f"unpacking {unparse(image)} failed: {done.stderr.decode()[-300:].strip()}")

    def _room_for(self, image: ImageRef) -> AbstractContextManager[None]:
        """Around the writing itself, so that what is said of the disk was true when it failed."""
        return room_for(f"the image {_short(image)}", self._root)

    def _write(self, path: Path, data: bytes) -> None:
        """Whole or not at all; a power cut may take it back, then the image is pulled again."""
        replace(path, data, work=self._root / "tmp")

    # -- paths -------------------------------------------------------------------------------------------------------

    def _image_path(self, digest: str) -> Path:
        return self._root / "images" / f"{digest.removeprefix('sha256:')}.json"

    def _layer_path(self, digest: str) -> Path:
        return self._root / "layers" / digest.removeprefix("sha256:")

    def _unpacked(self, digest: str, record: _Record) -> UnpackedImage:
        return UnpackedImage(
            digest=digest, layers=tuple(self._layer_path(layer) for layer in record.layers), config=record.config
        )


class _RunConfig(msgspec.Struct, frozen=True, rename="pascal"):
    """`config` of an OCI image config; every part may be missing or null."""

    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    env: list[str] | None = None
    user: str | None = None
    working_dir: str | None = None
    stop_signal: str | None = None
    exposed_ports: dict[str, Any] | None = None
    labels: dict[str, str] | None = None


class _ImageDocument(msgspec.Struct, frozen=True):
    architecture: str | None = None
    os: str | None = None
    config: _RunConfig | None = None


def image_config(image: ImageRef, document: Any) -> ImageConfig:
    """The parts of an OCI image config that count. Raises InvalidRequest for another platform."""
    try:
        found = msgspec.convert(document, _ImageDocument)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{unparse(image)} has no readable config: {error}", field="config.image") from error
    system, architecture = found.os or "linux", found.architecture or host_architecture()
    if system != "linux" or architecture != host_architecture():
        raise InvalidRequest(
            f"{unparse(image)} is made for {system}/{architecture}, this host needs linux/{host_architecture()}",
            field="config.image",
        )
    config = found.config or _RunConfig()
    ports = (entry.partition("/") for entry in config.exposed_ports or {})
    return ImageConfig(
        entrypoint=tuple(config.entrypoint or ()),
        cmd=tuple(config.cmd or ()),
        env={name: value for name, _, value in (entry.partition("=") for entry in config.env or ())},
        user=config.user or "",
        cwd=config.working_dir or "/",
        stop_signal=config.stop_signal or "",
        exposed_ports=tuple(sorted(int(port) for port, _, kind in ports if port.isdigit() and kind in ("", "tcp"))),
        labels=config.labels or {},
    )


def _short(image: ImageRef) -> str:
    return unparse(msgspec.structs.replace(image, digest="") if image.tag else image)


def _read(path: Path) -> _Record | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Record)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


async def _remove_tree(path: Path) -> None:
    await anyio.to_thread.run_sync(lambda: shutil.rmtree(path, ignore_errors=True))
