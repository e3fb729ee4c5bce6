"""Common base images made from Debian packages, for places where no container registry is in reach.

`pantala images bootstrap [NAME…]` makes them once into a cache of OCI content; `pantala up` pushes what the cache holds
to the platform's registry, where builds look when the registry that a Dockerfile names does not answer. A version that
Debian does not carry is refused, naming those that can be made.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import msgspec

from pantala.errors import InvalidRequest, TransientError
from pantala.images.platforms import host_architecture
from pantala.images.registry import RegistryClient
from pantala.wire.machine import ImageRef

SUITE = "bookworm"
EPOCH = 1_735_689_600
"""Timestamps in bases do not depend on when they were made."""

MMDEBSTRAP_TIMEOUT_S = 900
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """One base: Debian packages, shell run with the new root as `$1`, and the image's config.

    `bare`: nothing but the packages' files, no Debian around them.
    """

    repository: str
    tags: tuple[str, ...]
    packages: tuple[str, ...] = ()
    hook: str = ""
    bare: bool = False
    env: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ("bash",)
    ports: tuple[int, ...] = ()
    stop_signal: str = ""

    @property
    def name(self) -> str:
        return f"{self.repository.removeprefix('library/')}:{self.tags[0]}"


RECIPES = (
    Recipe(
        repository="library/python",
        tags=("3.11-slim", "3.11-slim-bookworm", "3-slim", "slim", "3.11", "3"),
        packages=("ca-certificates", "python3", "python3-pip", "python3-venv"),
        hook=(
            'ln -s /usr/bin/python3 "$1/usr/local/bin/python"; ln -s /usr/bin/python3 "$1/usr/local/bin/python3"; '
            'ln -s /usr/bin/pip3 "$1/usr/local/bin/pip"; rm -f "$1/usr/lib/python3.11/EXTERNALLY-MANAGED"'
        ),
        env=("LANG=C.UTF-8", "PYTHON_VERSION=3.11", "PIP_ROOT_USER_ACTION=ignore"),
        cmd=("python3",),
    ),
    Recipe(repository="library/debian", tags=("bookworm-slim", "bookworm", "12-slim", "12", "stable-slim", "latest")),
    Recipe(
        repository="library/nginx",
        tags=("1.22", "1", "stable", "latest"),
        packages=("ca-certificates", "nginx-light"),
        hook=(
            'ln -sf /dev/stdout "$1/var/log/nginx/access.log"; ln -sf /dev/stderr "$1/var/log/nginx/error.log"; '
            'mkdir -p "$1/usr/share/nginx/html"'
        ),
        cmd=("nginx", "-g", "daemon off;"),
        ports=(80,),
        stop_signal="SIGQUIT",
    ),
    Recipe(
        repository="library/redis",
        tags=("7.0", "7", "latest"),
        packages=("redis-server",),
        # In the memory of its machine, for everyone who reaches it: that is its private network.
        cmd=("redis-server", "--bind", "*", "-::*", "--protected-mode", "no", "--save", ""),
        ports=(6379,),
    ),
    Recipe(
        repository="library/busybox",
        tags=("1.35", "stable", "latest"),
        packages=("busybox-static",),
        bare=True,
        hook=(
            'mkdir -p "$1/tmp" "$1/root" "$1/etc" "$1/bin"; chmod 1777 "$1/tmp"; rm -rf "$1/usr/share"; '
            'for name in $("$1/bin/busybox" --list); do [ -e "$1/bin/$name" ] || ln -s busybox "$1/bin/$name"; done; '
            'echo root:x:0:0:root:/root:/bin/sh > "$1/etc/passwd"; echo root:x:0: > "$1/etc/group"'
        ),
        cmd=("sh",),
    ),
)


def recipe_for(name: str) -> Recipe:
    """The recipe of `python:3.11-slim`. Raises InvalidRequest, naming what can be made."""
    repository, _, tag = name.partition(":")
    for recipe in RECIPES:
        if recipe.repository.removeprefix("library/") == repository and (not tag or tag in recipe.tags):
            return recipe
    offered = ", ".join(f"{r.repository.removeprefix('library/')}:{'|'.join(r.tags)}" for r in RECIPES)
    raise InvalidRequest(f"{name} cannot be made from Debian packages; these can: {offered}", field="name")


class BaseCache:
    """OCI content of made bases: `blobs/sha256/…` and one `<repository>.json` each, written last."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._blobs = root / "blobs" / "sha256"

    def made(self) -> list[Recipe]:
        return [recipe for recipe in RECIPES if self._marker(recipe).is_file()]

    def make(self, recipe: Recipe, *, say: Callable[[str], None]) -> None:
        """Make a base unless the cache has it. Raises TransientError when packages cannot be fetched."""
        if self._marker(recipe).is_file():
            return
        self._blobs.mkdir(parents=True, exist_ok=True)
        say(f"making {recipe.name} from Debian packages (about a minute)")
        work = self._root / f"making.{os.getpid()}"
        try:
            layer, diff_id = self._layer(recipe, work)
            config = self._keep(_json(_config(recipe, diff_id)))
            manifest = _json(_manifest(config, layer))
            self._keep(manifest)
            fresh = self._marker(recipe).with_suffix(f".{os.getpid()}")
            fresh.write_text(
                json.dumps({"manifest": _digest(manifest), "blobs": [layer["digest"], config["digest"]]}) + "\n"
            )
            fresh.rename(self._marker(recipe))
        finally:
            work.unlink(missing_ok=True)

    async def push(self, recipe: Recipe, *, registry: RegistryClient, name: str, token: str = "") -> None:
        """Push a made base under all its tags to the registry called `name`."""
        record = json.loads(self._marker(recipe).read_text())
        blobs = {digest: self._blobs / digest.removeprefix("sha256:") for digest in record["blobs"]}
        manifest = (self._blobs / record["manifest"].removeprefix("sha256:")).read_bytes()
        for tag in recipe.tags:
            await registry.push(
                ImageRef(registry=name, repository=recipe.repository, tag=tag),
                blobs=blobs,
                manifest=manifest,
                media_type="application/vnd.oci.image.manifest.v1+json",
                token=token,
            )

    # -- steps -------------------------------------------------------------------------------------------------------

    def _marker(self, recipe: Recipe) -> Path:
        return self._root / f"{recipe.repository.replace('/', '_')}.json"

    def _layer(self, recipe: Recipe, work: Path) -> tuple[dict[str, Any], str]:
        """The root file system as a gzip layer; its descriptor and the digest of the plain tar."""
        plain = hashlib.sha256()
        # gzip rather than zstd, because old engines cannot read zstd layers.
        with (
            tempfile.TemporaryFile() as complaints,
            _running(mmdebstrap_command(recipe), complaints) as process,
            work.open("wb") as raw,
            gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=6, mtime=0) as packed,
        ):
            assert process.stdout is not None
            _copy(process.stdout, packed, plain)
            if process.wait(timeout=MMDEBSTRAP_TIMEOUT_S) != 0:
                complaints.seek(0)
                raise TransientError(
                    f"making {recipe.name} failed: {complaints.read().decode(errors='replace').strip()[-400:]}"
                )
        packed_digest, size = _file_digest(work), work.stat().st_size
        shutil.move(work, self._blobs / packed_digest.removeprefix("sha256:"))
        descriptor = {
            "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
            "digest": packed_digest,
            "size": size,
        }
        return descriptor, f"sha256:{plain.hexdigest()}"

    def _keep(self, data: bytes) -> dict[str, Any]:
        digest = _digest(data)
        (self._blobs / digest.removeprefix("sha256:")).write_bytes(data)
        return {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest, "size": len(data)}


def mmdebstrap_command(recipe: Recipe) -> list[str]:
    command = [
        "mmdebstrap",
        "--mode=root",
        f"--variant={'extract' if recipe.bare else 'minbase'}",
        "--format=tar",
        '--aptopt=Acquire::Languages "none"',
        "--aptopt=Acquire::Retries 3",
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        "--dpkgopt=path-include=/usr/share/doc/*/copyright",
    ]
    if recipe.packages:
        command.append(f"--include={','.join(recipe.packages)}")
    if recipe.hook:
        command.append(f"--{'extract' if recipe.bare else 'customize'}-hook={recipe.hook}")
    return [*command, SUITE, "-"]


@contextmanager
def _running(command: list[str], complaints: IO[bytes]) -> Generator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, env=_environment())
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _environment() -> dict[str, str]:
    return os.environ | {"SOURCE_DATE_EPOCH": str(EPOCH), "DEBIAN_FRONTEND": "noninteractive"}


def _config(recipe: Recipe, diff_id: str) -> dict[str, Any]:
    config: dict[str, Any] = {"Env": [_PATH, *recipe.env], "Cmd": list(recipe.cmd)}
    if recipe.ports:
        config["ExposedPorts"] = {f"{port}/tcp": {} for port in recipe.ports}
    if recipe.stop_signal:
        config["StopSignal"] = recipe.stop_signal
    return {
        "architecture": host_architecture(),
        "os": "linux",
        "created": "2025-01-01T00:00:00Z",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        "history": [{"created": "2025-01-01T00:00:00Z", "created_by": f"Debian {SUITE}: {recipe.name}"}],
    }


def _manifest(config: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    return {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config,
        "layers": [layer],
    }


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _copy(source: IO[bytes], destination: gzip.GzipFile, hasher: Any) -> None:
    while chunk := source.read(1 << 20):
        hasher.update(chunk)
        destination.write(chunk)
