"""Debian's docker-registry on loopback, and images that tests push to it."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import anyio

from pantala.images.platforms import host_architecture
from pantala.images.reference import parse
from pantala.images.registry import RegistryClient
from pantala.testing.poll import until
from pantala.testing.ports import free_port

NAME = "registry.test"
OCI = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"


class Registry:
    """Answers for the name `registry.test`."""

    def __init__(self, folder: Path, port: int) -> None:
        self.storage = folder / "storage"
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        self.client = RegistryClient(endpoints={NAME: f"http://127.0.0.1:{port}"})

    def blob_file(self, digest: str) -> Path:
        value = digest.removeprefix("sha256:")
        return self.storage / "docker/registry/v2/blobs/sha256" / value[:2] / value / "data"

    async def push(
        self, reference: str, layers: list[bytes], *, architecture: str | None = None, media_type: str = OCI
    ) -> str:
        blobs: dict[str, Path] = {}

        def keep(content: bytes, kind: str) -> dict[str, object]:
            digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
            blobs[digest] = self.scratch / digest
            blobs[digest].write_bytes(content)
            return {"mediaType": kind, "digest": digest, "size": len(content)}

        config = {
            "os": "linux",
            "architecture": architecture or host_architecture(),
            "config": {"Cmd": ["/app"], "Env": ["A=b"], "ExposedPorts": {"8080/tcp": {}}, "Labels": None},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": keep(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"),
            "layers": [keep(content, "application/vnd.oci.image.layer.v1.tar+gzip") for content in layers],
        }
        return await self.client.push(
            parse(reference), blobs=blobs, manifest=json.dumps(manifest).encode(), media_type=media_type
        )

    async def push_index(self, reference: str, entries: list[tuple[str, str]]) -> str:
        manifests = [
            {"mediaType": OCI, "digest": digest, "size": 1, "platform": {"os": "linux", "architecture": architecture}}
            for architecture, digest in entries
        ]
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}
        return await self.client.push(
            parse(reference), blobs={}, manifest=json.dumps(index).encode(), media_type=OCI_INDEX
        )


def _serve(folder: Path, port: int) -> subprocess.Popen[bytes]:
    config = {
        "version": "0.1",
        "storage": {"filesystem": {"rootdirectory": str(folder / "storage")}},
        "http": {"addr": f"127.0.0.1:{port}"},
        "log": {"accesslog": {"disabled": True}, "level": "error"},
    }
    (folder / "config.yml").write_text(json.dumps(config))  # JSON is YAML
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            ["docker-registry", "serve", str(folder / "config.yml")], stdout=log, stderr=subprocess.STDOUT
        )


@asynccontextmanager
async def running_registry(parent: Path) -> AsyncGenerator[Registry]:
    folder, port = parent / "registry", free_port()
    folder.mkdir()
    process = _serve(folder, port)
    made = Registry(folder, port)
    try:
        await _answers(port)
        yield made
    finally:
        await made.client.aclose()
        process.kill()
        process.wait()


@contextmanager
def registry_process(folder: Path) -> Generator[str]:
    """For many tests, each with a client of its own: the registry's URL."""
    port = free_port()
    folder.mkdir()
    process = _serve(folder, port)
    try:
        anyio.run(_answers, port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


async def _answers(port: int) -> None:
    async def answers() -> bool:
        try:
            stream = await anyio.connect_tcp("127.0.0.1", port)
        except OSError:
            return False
        await stream.aclose()
        return True

    await until(answers, bool, within_s=30)


def layer(**files: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content.encode()))
    return gzip.compress(out.getvalue(), mtime=0)
