"""A client of OCI registries: resolve, pull, push. Every byte is checked against its digest before it counts.

Registries are reached at the URL that `endpoints` gives for their name (mirrors, plain HTTP inside a box), otherwise
over HTTPS at the name itself. The HTTP library is loaded with the first request: every agent has a client, and most of
them pull nothing for a long time.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import msgspec

from pantala.errors import InvalidRequest, NotFound, TransientError, UserError
from pantala.images.reference import DOCKER_HUB, parse, pinned, unparse
from pantala.kit.disk import check_reserve
from pantala.wire.machine import ImageRef

if TYPE_CHECKING:
    import httpx2

INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
MANIFEST_BYTES_MAX = 4 * 1024 * 1024
LAYER_BYTES_MAX = 8 * 1024**3
RESERVE_EVERY_BYTES = 8 * 1024**2
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')


Digest = Annotated[str, msgspec.Meta(pattern=r"\Asha256:[0-9a-f]{64}\Z")]
"""A digest names a folder of the store: what a registry sends is none until it looks like one."""


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    media_type: str
    digest: Digest
    size: int


class _Platform(msgspec.Struct, frozen=True):
    os: str = ""
    architecture: str = ""


class _IndexEntry(msgspec.Struct, frozen=True):
    digest: Digest
    platform: _Platform | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One platform's manifest. `digest` is what the reference resolved to (an index keeps its own digest)."""

    digest: str
    config: Descriptor
    layers: list[Descriptor]


def host_architecture() -> str:
    return ARCHITECTURES.get(platform.machine(), platform.machine())


class RegistryClient:
    """`endpoints`: registry name to base URL. One client may be shared by many tasks."""

    def __init__(self, *, endpoints: dict[str, str] | None = None, timeout_s: float = 30.0) -> None:
        self._endpoints = endpoints or {}
        self._timeout_s = timeout_s

    @cached_property
    def _http(self) -> httpx2.AsyncClient:
        import httpx2

        return httpx2.AsyncClient(timeout=self._timeout_s, follow_redirects=True)

    async def aclose(self) -> None:
        if "_http" in self.__dict__:
            await self._http.aclose()

    async def resolve(self, image: str, *, token: str = "") -> ImageRef:
        """The reference with the digest that its tag has now. Raises InvalidRequest, NotFound, TransientError."""
        reference = parse(image)
        headers, _ = await self._manifest(reference, reference.digest or reference.tag, token)
        return pinned(reference, headers["digest"])

    async def manifest(self, image: ImageRef, *, token: str = "") -> Manifest:
        """The manifest for this host's platform. Raises NotFound, InvalidRequest (no such platform, unreadable)."""
        headers, document = await self._manifest(image, image.digest or image.tag, token)
        digest = headers["digest"]
        if headers["type"] in INDEX_TYPES or "manifests" in document:
            entry = _for_this_host(image, document)
            headers, document = await self._manifest(image, entry, token)
        try:
            return Manifest(
                digest=digest,
                config=msgspec.convert(document["config"], Descriptor),
                layers=msgspec.convert(document["layers"], list[Descriptor]),
            )
        except (KeyError, msgspec.ValidationError) as error:
            raise InvalidRequest(f"{unparse(image)} has no readable manifest", field="config.image") from error

    async def blob(self, image: ImageRef, descriptor: Descriptor, destination: Path, *, token: str = "") -> None:
        """Fetch one blob into a file; size and digest are checked. Raises InvalidRequest, NotFound, TransientError;
        OSError when the disk is full."""
        if descriptor.size > LAYER_BYTES_MAX:
            raise InvalidRequest(f"a layer of {descriptor.size} bytes is above the limit", field="config.image")
        hasher, written = hashlib.sha256(), 0
        check_reserve(destination.parent)
        async with self._get(image, f"blobs/{descriptor.digest}", token) as response:
            with destination.open("wb") as file:
                async for chunk in response.aiter_raw(1 << 20):
                    written += len(chunk)
                    if written > descriptor.size:
                        break
                    hasher.update(chunk)
                    file.write(chunk)
                    if written % RESERVE_EVERY_BYTES < len(chunk):
                        check_reserve(destination.parent)
        if written != descriptor.size or f"sha256:{hasher.hexdigest()}" != descriptor.digest:
            raise InvalidRequest(
                f"{unparse(image)}: what the registry sent for {descriptor.digest} is not that blob",
                field="config.image",
            )

    async def push(
        self, image: ImageRef, *, blobs: dict[str, Path], manifest: bytes, media_type: str, token: str = ""
    ) -> str:
        """Upload blobs that are not there yet, then the manifest; its digest."""
        import httpx2

        headers = {"Authorization": f"Bearer {token}"} if token else {}
        base = f"{self._base(image)}/v2/{image.repository}"
        for digest, path in blobs.items():
            if (await self._send("HEAD", f"{base}/blobs/{digest}", headers=headers)).status_code == 200:
                continue
            begun = await self._send("POST", f"{base}/blobs/uploads/", headers=headers)
            _raise_for(begun, image)
            location = str(httpx2.URL(base).join(begun.headers["location"]).copy_merge_params({"digest": digest}))
            done = await self._send(
                "PUT", location, headers=headers | {"Content-Type": "application/octet-stream"}, content=_chunks(path)
            )
            _raise_for(done, image)
        answer = await self._send(
            "PUT", f"{base}/manifests/{image.tag}", headers=headers | {"Content-Type": media_type}, content=manifest
        )
        _raise_for(answer, image)
        return f"sha256:{hashlib.sha256(manifest).hexdigest()}"

    # -- requests ----------------------------------------------------------------------------------------------------

    def _base(self, image: ImageRef) -> str:
        if endpoint := self._endpoints.get(image.registry):
            return endpoint.rstrip("/")
        return f"https://{'registry-1.docker.io' if image.registry == DOCKER_HUB else image.registry}"

    async def _manifest(self, image: ImageRef, reference: str, token: str) -> tuple[dict[str, str], dict[str, Any]]:
        accept = ", ".join(MANIFEST_TYPES + INDEX_TYPES)
        async with self._get(image, f"manifests/{reference}", token, accept=accept) as response:
            body = bytearray()
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > MANIFEST_BYTES_MAX:
                    raise InvalidRequest(f"{unparse(image)}: its manifest is too large", field="config.image")
            digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
            media_type = response.headers.get("content-type", "").partition(";")[0]
        if reference.startswith("sha256:") and digest != reference:
            raise InvalidRequest(f"{unparse(image)}: the registry sent another manifest", field="config.image")
        try:
            document = json.loads(body)
        except ValueError as error:
            raise InvalidRequest(f"{unparse(image)}: its manifest is not JSON", field="config.image") from error
        if not isinstance(document, dict):
            raise InvalidRequest(f"{unparse(image)}: its manifest is not an object", field="config.image")
        found = cast("dict[str, Any]", document)
        return {"digest": digest, "type": str(found.get("mediaType") or media_type)}, found

    @asynccontextmanager
    async def _get(
        self, image: ImageRef, path: str, token: str, *, accept: str = "*/*"
    ) -> AsyncGenerator[httpx2.Response]:
        """GET under the repository; an anonymous token is fetched once when the registry asks for one."""
        import httpx2

        url = f"{self._base(image)}/v2/{image.repository}/{path}"
        for attempt in range(2):
            headers = {"Accept": accept} | ({"Authorization": f"Bearer {token}"} if token else {})
            try:
                async with self._http.stream("GET", url, headers=headers) as response:
                    if response.status_code == 401 and attempt == 0 and not token:
                        token = await self._anonymous(response.headers.get("www-authenticate", ""))
                        continue
                    _raise_for(response, image)
                    yield response
                    return
            except httpx2.HTTPError as error:
                raise TransientError(f"the registry {image.registry} does not answer: {error}") from error

    async def _anonymous(self, challenge: str) -> str:
        import httpx2

        parts = dict(_CHALLENGE.findall(challenge))
        realm = parts.pop("realm", "")
        if not realm.startswith(("http://", "https://")):
            return ""
        answer = await self._send("GET", str(httpx2.URL(realm, params=parts)), headers={})
        if answer.status_code != 200:
            return ""
        document = answer.json()
        return str(document.get("token") or document.get("access_token") or "")

    async def _send(self, method: str, url: str, *, headers: dict[str, str], content: Any = None) -> httpx2.Response:
        import httpx2

        try:
            return await self._http.request(method, url, headers=headers, content=content)
        except httpx2.HTTPError as error:
            raise TransientError(f"{httpx2.URL(url).host} does not answer: {error}") from error


async def _chunks(path: Path) -> AsyncGenerator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            yield chunk


def _for_this_host(image: ImageRef, index: dict[str, Any]) -> str:
    """The digest of this host's manifest in an index."""
    try:
        entries = msgspec.convert(index.get("manifests", []), list[_IndexEntry])
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{unparse(image)} has no readable index: {error}", field="config.image") from error
    offered: list[str] = []
    for entry in entries:
        wanted = entry.platform or _Platform()
        if wanted.os == "linux" and wanted.architecture == host_architecture():
            return entry.digest
        offered.append(f"{wanted.os}/{wanted.architecture}")
    raise InvalidRequest(
        f"{unparse(image)} is made for {', '.join(offered) or 'no platform'}, this host needs linux/"
        f"{host_architecture()}",
        field="config.image",
    )


def _raise_for(response: httpx2.Response, image: ImageRef) -> None:
    code = response.status_code
    if code < 300:
        return
    name = unparse(image)
    if code in (401, 403):
        raise NotFound(f"image {name} does not exist, or this token may not read it")
    if code == 404:
        raise NotFound(f"image {name} does not exist", hint="check its name and tag, or deploy again")
    if code >= 500 or code == 429:
        raise TransientError(f"the registry answered {code} for {name}")
    raise UserError(f"the registry refused {name} with {code}")
