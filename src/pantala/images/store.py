"""Images of one host, unpacked once per digest. Implements the agent's `ImageStore`.

    <root>/layers/<sha256 of the blob>/    a layer as a directory
    <root>/marks/                          which layers are known to be on disk (`durable.py`)
    <root>/facts/<sha256 of the blob>      what the layer's directory does not show (`unpack.Facts`)
    <root>/images/<sha256>.json            an image: its layers and config; written last, so it is whole
    <root>/tmp/                            swept at start

A layer is renamed into place when it is complete, an image names only complete layers: a crash leaves only `tmp`. What
a power cut may have left half written is dropped when the store is opened, with the images that need it.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec
import structlog

from pantala.domain.runtime import ImageConfig, ImageLimits, UnpackedImage
from pantala.errors import DiskFull, InvalidRequest, TransientError, UserError
from pantala.images import union
from pantala.images.config import image_config, read_diff_ids
from pantala.images.durable import Marks, replace
from pantala.images.reference import unparse
from pantala.images.registry import FIELD, Descriptor, Manifest, RegistryClient
from pantala.kit.clock import Clock
from pantala.kit.disk import check_reserve, remove_tree, room_for
from pantala.kit.ids import ulid
from pantala.kit.tasks import KeyedLocks, first_error
from pantala.wire.machine import ImageRef

log = structlog.get_logger()

UNPACKS_AT_ONCE = 2
CONFIG_TYPES = (
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
)
LAYER_TYPES = (
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
)
PACKED = ("", "+gzip", "+zstd", ".gzip", ".zstd")


class _Record(msgspec.Struct, frozen=True):
    layers: list[str]
    config: ImageConfig


class _Facts(msgspec.Struct, frozen=True):
    """`unpack.Facts`, as this store keeps them. A layer from before they were kept has none."""

    diff_id: str = ""
    bytes: int = 0
    implicit: list[str] = []
    opaque_root: bool = False


class FileImageStore:
    def __init__(
        self, root: Path, registry: RegistryClient, *, boot: str = "", limits: ImageLimits | None = None
    ) -> None:
        self._root = root
        self._limits = limits or ImageLimits()
        self._registry = registry
        self._locks = KeyedLocks()
        self._unpacks = anyio.CapacityLimiter(UNPACKS_AT_ONCE)
        for folder in ("layers", "images", "facts"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        remove_tree(root / "tmp")
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
            remove_tree(left)
        for facts in (self._root / "facts").iterdir():
            if not (self._root / "layers" / facts.name).exists():
                facts.unlink()

    async def ensure(self, image: ImageRef, *, pull_token: str) -> UnpackedImage:
        try:
            return await self._ensure(image, pull_token)
        except (DiskFull, UserError):
            await self._drop_layers(self._named())  # what came of the image before it failed
            raise

    async def _ensure(self, image: ImageRef, pull_token: str) -> UnpackedImage:
        if image.digest and (found := await self.find(image.digest)):
            return found
        manifest = await self._registry.manifest(image, token=pull_token)
        async with self._locks.hold(manifest.digest):
            if found := await self.find(manifest.digest):
                return found
            self._judge(image, manifest)
            config, diff_ids = await self._config(image, manifest, pull_token)
            await self._layers(image, manifest, diff_ids, pull_token)
            layers = await self._fitted([layer.digest for layer in _distinct(manifest.layers)], image)
            record = _Record(layers=layers, config=config)
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
                self._facts_path(f"sha256:{layer.name}").unlink(missing_ok=True)
                doomed.append(layer.rename(self._root / "tmp" / ulid()))
        for tree in doomed:
            await _remove_tree(tree)

    # -- steps -------------------------------------------------------------------------------------------------------

    def _judge(self, image: ImageRef, manifest: Manifest) -> None:
        """What can be said before anything is fetched. Raises InvalidRequest."""
        name, limits = unparse(image), self._limits
        if manifest.config.media_type not in CONFIG_TYPES:
            raise InvalidRequest(
                f"{name} is no container image: its config is of the type {manifest.config.media_type[:200]!r}",
                field=FIELD,
            )
        if manifest.config.size > limits.config_bytes:
            raise InvalidRequest(
                f"{name}: its config {manifest.config.digest} has {manifest.config.size} bytes, "
                f"at most {limits.config_bytes} are taken",
                field=FIELD,
            )
        if not manifest.layers:
            raise InvalidRequest(f"{name} has no layers: there is nothing in it to run", field=FIELD)
        if len(manifest.layers) > limits.layers:
            raise InvalidRequest(
                f"{name} has {len(manifest.layers)} layers, at most {limits.layers} are taken", field=FIELD
            )
        for layer in manifest.layers:
            if not any(layer.media_type == kind + packed for kind in LAYER_TYPES for packed in PACKED):
                raise InvalidRequest(
                    f"{name}: its layer {layer.digest} is of the type {layer.media_type[:200]!r}, which holds no files",
                    field=FIELD,
                )

    async def _config(self, image: ImageRef, manifest: Manifest, token: str) -> tuple[ImageConfig, list[str]]:
        """What the image says of itself, and what each layer has to be when it is unpacked."""
        path = self._root / "tmp" / ulid()
        try:
            with self._room_for(image):
                await self._registry.blob(image, manifest.config, path, token=token)
            document = msgspec.json.decode(path.read_bytes())
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidRequest(
                f"{unparse(image)}: its config {manifest.config.digest} is not JSON: {error}", field=FIELD
            ) from error
        finally:
            path.unlink(missing_ok=True)
        found = image_config(image, document)
        diff_ids = read_diff_ids(document)
        if diff_ids and len(diff_ids) != len(manifest.layers):
            raise InvalidRequest(
                f"{unparse(image)}: its config names {len(diff_ids)} layers (rootfs.diff_ids), "
                f"its manifest {len(manifest.layers)}",
                field=FIELD,
            )
        return found, diff_ids

    async def _layers(self, image: ImageRef, manifest: Manifest, diff_ids: list[str], token: str) -> None:
        """All layers are there and are those that the config names."""
        total = 0

        async def one(layer: Descriptor, diff_id: str) -> None:
            nonlocal total
            await self._layer(image, layer, token)
            facts = self._facts(layer.digest)
            if diff_id and facts.diff_id and facts.diff_id != diff_id:
                raise InvalidRequest(
                    f"{unparse(image)}: its layer {layer.digest} unpacks to {facts.diff_id}, its config "
                    f"(rootfs.diff_ids) says {diff_id}",
                    field=FIELD,
                )
            total += facts.bytes
            if total > self._limits.image_bytes:
                raise InvalidRequest(
                    f"{unparse(image)} unpacks to more than {self._limits.image_bytes} bytes", field=FIELD
                )

        expected = diff_ids or [""] * len(manifest.layers)
        wanted = {(layer.digest, diff_id): layer for layer, diff_id in zip(manifest.layers, expected, strict=True)}
        async with first_error(), anyio.create_task_group() as tasks:
            for (_, diff_id), layer in wanted.items():
                tasks.start_soon(one, layer, diff_id)

    async def _fitted(self, digests: list[str], image: ImageRef) -> list[str]:
        """The layers to mount: none that a later one hides whole, and each as it has to be over those below it."""
        hidden = max((index for index, digest in enumerate(digests) if self._facts(digest).opaque_root), default=0)
        layers: list[str] = []
        for digest in digests[hidden:]:
            implicit = self._facts(digest).implicit
            lower = [self._layer_path(layer) for layer in layers]
            fits = await anyio.to_thread.run_sync(union.plan, lower, implicit) if lower and implicit else []
            if fits:
                layers.append(await self._fit(digest, fits, image))
            else:
                layers.append(digest)
        return layers

    async def _fit(self, digest: str, fits: list[union.Fit], image: ImageRef) -> str:
        name = union.name(digest, fits)
        final = self._layer_path(name)
        async with self._locks.hold(name):
            if not final.exists():
                tree = self._root / "tmp" / f"{ulid()}.tree"
                try:
                    with self._room_for(image):
                        copied = await anyio.run_process(
                            ["cp", "-al", "--", str(self._layer_path(digest)), str(tree)], check=False
                        )
                        if copied.returncode != 0:
                            check_reserve(self._root)
                            said = copied.stderr.decode(errors="replace").strip()[-300:]
                            raise TransientError(f"a layer of {unparse(image)} cannot be fitted: {said}")
                        await anyio.to_thread.run_sync(union.apply, tree, fits)
                        self._marks.add(final.name)
                        tree.rename(final)
                finally:
                    with anyio.CancelScope(shield=True):
                        await _remove_tree(tree)
        return name

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
                        facts = await self._unpack(image, layer, blob, tree)
                        self._write(self._facts_path(layer.digest), facts)
                        self._marks.add(final.name)
                        tree.rename(final)
                finally:
                    blob.unlink(missing_ok=True)
                    with anyio.CancelScope(shield=True):
                        await _remove_tree(tree)

    async def _unpack(self, image: ImageRef, layer: Descriptor, blob: Path, tree: Path) -> bytes:
        """The layer's facts, as JSON."""
        limits, name = self._limits, f"{unparse(image)}: its layer {layer.digest}"
        bounds = {
            "entries": limits.layer_entries,
            "bytes": limits.layer_bytes,
            "ratio": limits.ratio,
            "ratio_from_bytes": limits.ratio_from_bytes,
        }
        command = [sys.executable, "-X", "utf8", "-m", "pantala.images.unpack", str(tree), json.dumps(bounds)]
        with blob.open("rb") as source:
            try:
                with anyio.fail_after(limits.unpack_s):
                    done = await anyio.run_process(command, stdin=source, check=False)
            except TimeoutError as error:
                raise InvalidRequest(f"{name} takes more than {limits.unpack_s:g} s to unpack", field=FIELD) from error
        said = done.stderr.decode(errors="replace").strip()
        if done.returncode == 2:
            raise InvalidRequest(f"{name}: {said}", field=FIELD)
        if done.returncode == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tree))
        if done.returncode != 0:
            raise TransientError(f"unpacking {unparse(image)} failed: {said[-300:]}")
        return done.stdout

    def _facts(self, digest: str) -> _Facts:
        try:
            # Paths may hold bytes that are no text, which only this reader takes.
            return msgspec.convert(json.loads(self._facts_path(digest).read_bytes()), _Facts)
        except (FileNotFoundError, ValueError, msgspec.ValidationError):
            return _Facts()

    def _room_for(self, image: ImageRef) -> AbstractContextManager[None]:
        """Around the writing itself, so that what is said of the disk was true when it failed."""
        return room_for(f"the image {_short(image)}", self._root)

    def _write(self, path: Path, data: bytes) -> None:
        """Whole or not at all; a power cut may take it back, then the image is pulled again."""
        replace(path, data, work=self._root / "tmp")

    # -- paths -------------------------------------------------------------------------------------------------------

    def _image_path(self, digest: str) -> Path:
        return self._root / "images" / f"{digest.removeprefix('sha256:')}.json"

    def _facts_path(self, digest: str) -> Path:
        return self._root / "facts" / digest.removeprefix("sha256:")

    def _layer_path(self, digest: str) -> Path:
        return self._root / "layers" / digest.removeprefix("sha256:")

    def _unpacked(self, digest: str, record: _Record) -> UnpackedImage:
        return UnpackedImage(
            digest=digest, layers=tuple(self._layer_path(layer) for layer in record.layers), config=record.config
        )


def _distinct(layers: list[Descriptor]) -> list[Descriptor]:
    """A layer that comes again covers all that it brought before, and cannot be mounted twice."""
    last = {layer.digest: index for index, layer in enumerate(layers)}
    return [layer for index, layer in enumerate(layers) if last[layer.digest] == index]


def _short(image: ImageRef) -> str:
    return unparse(msgspec.structs.replace(image, digest="") if image.tag else image)


def _read(path: Path) -> _Record | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Record)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


async def _remove_tree(path: Path) -> None:
    await anyio.to_thread.run_sync(remove_tree, path)
