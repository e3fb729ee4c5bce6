"""A client of OCI registries: resolve, pull, push. Every byte is checked against its digest before it counts.

Registries are reached at the URL that `endpoints` gives for their name (mirrors, plain HTTP inside a box), otherwise
over HTTPS at the name itself. The HTTP library is loaded with the first request: every agent has a client, and most of
them pull nothing for a long time.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import msgspec

from pantala.domain.runtime import ImageLimits
from pantala.errors import InvalidRequest, NotFound, TransientError, UserError
from pantala.images.platforms import Platform, needed, rank
from pantala.images.reference import DOCKER_HUB, parse, pinned, unparse
from pantala.kit.disk import check_reserve
from pantala.wire.machine import ImageRef

if TYPE_CHECKING:
    import httpx2

FIELD = "config.image"
INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
SCHEMA_1_TYPES = (
    "application/vnd.docker.distribution.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
)
RESERVE_EVERY_BYTES = 8 * 1024**2
MANIFESTS_ASKED_MAX = 16
"""Of one reference: an index may name further ones."""

_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')

Digest = Annotated[str, msgspec.Meta(pattern=r"\Asha256:[0-9a-f]{64}\Z")]
"""A digest names a folder of the store: what a registry sends is none until it looks like one."""


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """`urls`: where else a foreign layer would be; not asked, since whoever makes an image could have any address
    asked."""

    media_type: str
    digest: Digest
    size: Annotated[int, msgspec.Meta(ge=0)]
    urls: list[str] | None = None


class _IndexEntry(msgspec.Struct, frozen=True):
    digest: Digest
    platform: Platform | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One platform's manifest. `digest` is what the reference resolved to (an index keeps its own digest)."""

    digest: str
    config: Descriptor
    layers: list[Descriptor]


class RegistryClient:
    """`endpoints`: registry name to base URL. One client may be shared by many tasks."""

    def __init__(
        self, *, endpoints: dict[str, str] | None = None, timeout_s: float = 30.0, limits: ImageLimits | None = None
    ) -> None:
        self._endpoints = endpoints or {}
        self._limits = limits or ImageLimits()
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
        digest, asked, offered = headers["digest"], 1, list[str]()
        waiting: list[str] = []
        while _is_index(headers, document):
            chosen, others = _for_this_host(image, document)
            waiting = chosen + waiting
            offered += others
            if not waiting:
                said = ", ".join(dict.fromkeys(offered)) or "no platform"
                raise InvalidRequest(f"{unparse(image)} is made for {said}, this host needs {needed()}", field=FIELD)
            if (asked := asked + 1) > MANIFESTS_ASKED_MAX:
                raise InvalidRequest(f"{unparse(image)}: its index leads to too many others", field=FIELD)
            headers, document = await self._manifest(image, waiting.pop(0), token)
        return _read_manifest(image, digest, headers["type"], document)

    async def blob(self, image: ImageRef, descriptor: Descriptor, destination: Path, *, token: str = "") -> None:
        """Fetch one blob into a file; size and digest are checked. Raises InvalidRequest, NotFound, TransientError;
        OSError when the disk is full."""
        if descriptor.size > self._limits.layer_bytes:
            raise InvalidRequest(
                f"{unparse(image)}: its layer {descriptor.digest} has {descriptor.size} bytes, "
                f"at most {self._limits.layer_bytes} are taken",
                field=FIELD,
            )
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
        if written != descriptor.size:
            sent = f"more than {descriptor.size}" if written > descriptor.size else f"{written}"
            raise InvalidRequest(
                f"{unparse(image)}: what the registry sent for {descriptor.digest} is not that blob: "
                f"it has {sent} bytes, the manifest says {descriptor.size}",
                field=FIELD,
            )
        if (found := f"sha256:{hasher.hexdigest()}") != descriptor.digest:
            raise InvalidRequest(
                f"{unparse(image)}: what the registry sent for {descriptor.digest} is not that blob: "
                f"its digest is {found}",
                field=FIELD,
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
        accept, bytes_max = ", ".join(MANIFEST_TYPES + INDEX_TYPES), self._limits.manifest_bytes
        async with self._get(image, f"manifests/{reference}", token, accept=accept) as response:
            body = bytearray()
            async for chunk in response.aiter_raw(1 << 16):
                body += chunk
                if len(body) > bytes_max:
                    raise InvalidRequest(
                        f"{unparse(image)}: its manifest is too large, at most {bytes_max} bytes are taken", field=FIELD
                    )
            digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
            media_type = response.headers.get("content-type", "").partition(";")[0]
        if reference.startswith("sha256:") and digest != reference:
            raise InvalidRequest(
                f"{unparse(image)}: for the manifest {reference} the registry sent another manifest, {digest}",
                field=FIELD,
            )
        try:
            document = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{unparse(image)}: its manifest is not JSON", field=FIELD) from error
        if not isinstance(document, dict):
            raise InvalidRequest(f"{unparse(image)}: its manifest is not an object", field=FIELD)
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
            # Whatever is sent is compared with its digest as it comes; nobody inflates it on the way.
            headers = {"Accept": accept, "Accept-Encoding": "identity"} | (
                {"Authorization": f"Bearer {token}"} if token else {}
            )
            try:
                async with self._http.stream("GET", url, headers=headers) as response:
                    if response.status_code == 401 and attempt == 0 and not token:
                        token = await self._anonymous(response.headers.get("www-authenticate", ""))
                        continue
                    _raise_for(response, image, path)
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


def _is_index(headers: dict[str, str], document: dict[str, Any]) -> bool:
    return headers["type"] in INDEX_TYPES or "manifests" in document


def _for_this_host(image: ImageRef, index: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Of an index: digests to look at, the best first, and the platforms of the others. An entry that names none (an
    index in an index, an image on its own) has to be looked at."""
    try:
        entries = msgspec.convert(index.get("manifests") or [], list[_IndexEntry])
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{unparse(image)} has no readable index: {error}", field=FIELD) from error
    chosen: list[tuple[int, str]] = []
    unnamed: list[str] = []
    offered: list[str] = []
    for entry in entries:
        wanted = entry.platform
        if wanted is None or not wanted.architecture:
            unnamed.append(entry.digest)
        elif (suits := rank(wanted)) is not None:
            chosen.append((suits, entry.digest))
        elif wanted.architecture != "unknown":  # what signs or describes the others
            offered.append(str(wanted))
    chosen.sort(key=lambda one: one[0])
    return [digest for _, digest in chosen[:1]] or unnamed, offered


def _read_manifest(image: ImageRef, digest: str, media_type: str, document: dict[str, Any]) -> Manifest:
    if media_type in SCHEMA_1_TYPES or document.get("schemaVersion") == 1:
        raise InvalidRequest(
            f"{unparse(image)} is an image of Docker's schema 1, which is not read any more",
            field=FIELD,
            hint="pull and push it once with a current tool, which makes it schema 2 or OCI",
        )
    try:
        return Manifest(
            digest=digest,
            config=msgspec.convert(document["config"], Descriptor),
            layers=msgspec.convert(document["layers"], list[Descriptor]),
        )
    except KeyError as error:
        raise InvalidRequest(f"{unparse(image)} has no readable manifest: {error} is missing", field=FIELD) from error
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{unparse(image)} has no readable manifest: {error}", field=FIELD) from error


def _raise_for(response: httpx2.Response, image: ImageRef, path: str = "") -> None:
    code = response.status_code
    if code < 300:
        return
    name = unparse(image)
    if code in (401, 403):
        raise NotFound(f"image {name} does not exist, or this token may not read it")
    if code == 404 and path.startswith("blobs/"):
        digest = path.removeprefix("blobs/")
        raise NotFound(f"image {name} is not whole: the registry does not have its blob {digest}", hint="push it again")
    if code == 404:
        raise NotFound(f"image {name} does not exist", hint="check its name and tag, or deploy again")
    if code >= 500 or code == 429:
        raise TransientError(f"the registry answered {code} for {name}")
    raise UserError(f"the registry refused {name} with {code}")
