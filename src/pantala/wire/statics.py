"""Files of an app on their way into a bucket: what a deploy asks for, and what is written down in the bucket itself.

A pushed folder is `fly-statics/<app>/<id>/…`, its manifest `fly-statics/<app>/<id>.json`; until it is whole
`fly-statics/<app>/<id>.draft.json` says what is to come. Ids are ULIDs, so a later one is a newer push.
"""

from __future__ import annotations

import msgspec

ROOT = "fly-statics"
FILES_MAX = 20_000
FILE_BYTES_MAX = 256 * 1024 * 1024
PUSH_BYTES_MAX = 4 * 1024 * 1024 * 1024
LISTING_BYTES_MAX = 8 * 1024 * 1024
KEY_BYTES_MAX = 1_024
"""Of S3. What it leaves for a path in the folder follows from the app's name."""


class FileContent(msgspec.Struct, frozen=True, kw_only=True):
    """What a file holds: `sha256` in hexadecimal."""

    size: int
    sha256: str


class PushStaticsRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A folder of the project, file by file (paths below it, with `/`). `bucket` None: the one that the operator has
    opened to deploys of the app's org."""

    url_prefix: str
    files: dict[str, FileContent]
    bucket: str | None = None


class StaticsPush(msgspec.Struct, frozen=True, kw_only=True):
    """`guest_path` is what the machines' `statics` name. `uploads`: the files to send; then the push is finished.
    `complete`: all of it is there since an earlier deploy, nothing is left to do."""

    id: str
    bucket: str
    guest_path: str
    uploads: list[str] = []
    complete: bool = False


class StaticsFinished(msgspec.Struct, frozen=True, kw_only=True):
    """How many files were taken over from earlier pushes: unchanged ones, and older ones for pages that are open."""

    unchanged: int
    kept: int


class StaticsCleaned(msgspec.Struct, frozen=True, kw_only=True):
    """Ids of the pushes that are gone."""

    removed: list[str]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A push. `files`: the project's own; `kept`: of earlier pushes, beside them. As a draft `copies` and `kept_from`
    say which push has each file that is not uploaded."""

    url_prefix: str
    files: dict[str, FileContent]
    kept: dict[str, FileContent] = {}
    copies: dict[str, str] = {}
    kept_from: dict[str, str] = {}
