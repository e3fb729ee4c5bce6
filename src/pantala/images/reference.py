"""Image references: `registry/repository:tag@digest`, normalised as container tools do."""

from __future__ import annotations

import re

import msgspec

from pantala.errors import InvalidRequest
from pantala.wire.machine import ImageRef

DOCKER_HUB = "docker.io"

_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*")
_REGISTRY = re.compile(r"[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?(?::\d{1,5})?")
_TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def parse(text: str, *, field: str = "config.image") -> ImageRef:
    """The parts of a reference; tag `latest` when neither tag nor digest is given. Raises InvalidRequest."""
    rest, _, digest = text.strip().partition("@")
    if digest and not _DIGEST.fullmatch(digest):
        raise InvalidRequest(f"{digest!r} is not a digest such as sha256:<64 hex digits>", field=field)
    first, slash, remainder = rest.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        registry, path = first, remainder
    else:
        registry, path = DOCKER_HUB, rest
    repository, colon, tag = path.partition(":")
    if registry == DOCKER_HUB and "/" not in repository:
        repository = f"library/{repository}"
    if not _REPOSITORY.fullmatch(repository) or not _REGISTRY.fullmatch(registry):
        raise InvalidRequest(f"{text!r} is not an image reference such as nginx:1.25 or registry/app:tag", field=field)
    if colon and not _TAG.fullmatch(tag):
        raise InvalidRequest(f"{tag!r} is not an image tag", field=field)
    return ImageRef(
        registry=registry, repository=repository, tag=tag or ("" if digest else "latest"), digest=digest, labels={}
    )


def unparse(image: ImageRef) -> str:
    tag = f":{image.tag}" if image.tag else ""
    digest = f"@{image.digest}" if image.digest else ""
    return f"{image.registry}/{image.repository}{tag}{digest}"


def pinned(image: ImageRef, digest: str) -> ImageRef:
    return msgspec.structs.replace(image, digest=digest)
