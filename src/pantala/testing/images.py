"""Makes images, good and bad, byte by byte: layers as tar archives, configs, manifests, indexes, and a registry that
serves whatever it is given, also what no registry would take (`Shelf`)."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pantala.images.platforms import host_architecture
from pantala.testing.ports import free_port
from pantala.testing.rootfs import BUSYBOX

OCI = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
DOCKER_SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1+prettyjws"

OTHER_ARCHITECTURE = "arm64" if host_architecture() == "amd64" else "amd64"

Entry = tuple[tarfile.TarInfo, bytes]


def entry(name: str, kind: bytes = tarfile.REGTYPE, content: bytes | str = b"", **more: Any) -> Entry:
    """An entry of a layer; `more` are attributes of its header."""
    info = tarfile.TarInfo(name)
    info.type, info.mode = kind, 0o755 if kind == tarfile.DIRTYPE else 0o644
    data = content.encode() if isinstance(content, str) else content
    info.size = len(data)
    for key, value in more.items():
        setattr(info, key, value)
    return info, data


def text(name: str, content: str = "hello\n", **more: Any) -> Entry:
    return entry(name, tarfile.REGTYPE, content, **more)


def folder(name: str, **more: Any) -> Entry:
    return entry(name, tarfile.DIRTYPE, **more)


def link(name: str, target: str, **more: Any) -> Entry:
    return entry(name, tarfile.SYMTYPE, linkname=target, **more)


def hard_link(name: str, target: str, **more: Any) -> Entry:
    return entry(name, tarfile.LNKTYPE, linkname=target, **more)


def program(name: str, content: bytes | str, **more: Any) -> Entry:
    return entry(name, tarfile.REGTYPE, content, **({"mode": 0o755} | more))


def tar(*entries: Entry, format: int = tarfile.PAX_FORMAT, errors: str = "surrogateescape") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format, errors=errors) as archive:
        for info, data in entries:
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def busybox() -> bytes:
    return BUSYBOX.read_bytes()


def base(*more: Entry) -> bytes:
    """A layer with a shell, its tools and two users."""
    applets = subprocess.run([str(BUSYBOX), "--list"], capture_output=True, text=True, check=True).stdout.split()
    return tar(
        folder("bin"),
        program("bin/busybox", busybox()),
        *(link(f"bin/{applet}", "busybox") for applet in applets if applet != "busybox"),
        folder("etc"),
        text("etc/passwd", "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:App:/srv:/bin/sh\n"),
        text("etc/group", "root:x:0:\napp:x:1000:\nextra:x:1500:app\n"),
        folder("tmp", mode=0o1777),
        folder("root", mode=0o700),
        folder("srv", uid=1000, gid=1000),
        *more,
    )


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def packed(content: bytes) -> bytes:
    return gzip.compress(content, 1, mtime=0)


@dataclass(kw_only=True)
class Layer:
    """`plain` is the tar whose digest the config names; `blob` what is sent, gzip of it if not given."""

    plain: bytes
    blob: bytes = b""
    media_type: str = f"{OCI_LAYER}+gzip"
    more: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        self.blob = self.blob or packed(self.plain)

    def descriptor(self) -> dict[str, Any]:
        made = {"mediaType": self.media_type, "digest": digest_of(self.blob), "size": len(self.blob)}
        return made | self.more


@dataclass(kw_only=True)
class Made:
    """A whole image: what a registry has of it. `manifest` is the document that its tag leads to."""

    manifest: bytes
    media_type: str
    blobs: dict[str, bytes]
    manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict[str, tuple[str, bytes]])

    @property
    def digest(self) -> str:
        return digest_of(self.manifest)


def image(
    *layers: Layer | bytes,
    run: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    document: dict[str, Any] | None = None,
    media_type: str = OCI,
    config_type: str = OCI_CONFIG,
    config_blob: bytes | None = None,
) -> Made:
    """`run` is the `config` of the image config; `config` and `document` are added to config and manifest."""
    whole = [one if isinstance(one, Layer) else Layer(plain=one) for one in layers]
    said: dict[str, Any] = {
        "os": "linux",
        "architecture": host_architecture(),
        "config": run or {},
        "rootfs": {"type": "layers", "diff_ids": [digest_of(one.plain) for one in whole]},
    }
    blob = config_blob if config_blob is not None else json.dumps(said | (config or {})).encode()
    manifest: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": {"mediaType": config_type, "digest": digest_of(blob), "size": len(blob)},
        "layers": [one.descriptor() for one in whole],
    }
    return Made(
        manifest=json.dumps(manifest | (document or {})).encode(),
        media_type=media_type,
        blobs={digest_of(blob): blob} | {digest_of(one.blob): one.blob for one in whole},
    )


def index(*entries: tuple[Made, dict[str, str] | None], media_type: str = OCI_INDEX) -> Made:
    """Of images with the platform that the index gives each; None gives none."""
    manifests: dict[str, tuple[str, bytes]] = {}
    blobs: dict[str, bytes] = {}
    listed: list[dict[str, Any]] = []
    for made, platform in entries:
        manifests |= made.manifests | {made.digest: (made.media_type, made.manifest)}
        blobs |= made.blobs
        one: dict[str, Any] = {"mediaType": made.media_type, "digest": made.digest, "size": len(made.manifest)}
        listed.append(one | ({"platform": platform} if platform else {}))
    document = {"schemaVersion": 2, "mediaType": media_type, "manifests": listed}
    return Made(manifest=json.dumps(document).encode(), media_type=media_type, blobs=blobs, manifests=manifests)


class Shelf:
    """A registry for one repository, `app`, that serves what is put there; `asked` are the paths of all requests."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: list[str] = []
        self._pages: dict[str, tuple[str, bytes]] = {}

    def put(self, tag: str, made: Made) -> None:
        self._pages[f"/v2/app/manifests/{tag}"] = (made.media_type, made.manifest)
        for digest, page in made.manifests.items():
            self._pages[f"/v2/app/manifests/{digest}"] = page
        for digest, blob in made.blobs.items():
            self.put_blob(digest, blob)

    def put_blob(self, digest: str, content: bytes) -> None:
        self._pages[f"/v2/app/blobs/{digest}"] = ("application/octet-stream", content)

    def page(self, path: str) -> tuple[str, bytes] | None:
        self.asked.append(path)
        return self._pages.get(path)


@contextmanager
def shelf() -> Generator[Shelf]:
    port = free_port()
    made = Shelf(f"http://127.0.0.1:{port}")

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = made.page(self.path)
            self.send_response(200 if page else 404)
            kind, body = page or ("text/plain", b"")
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Answers)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
