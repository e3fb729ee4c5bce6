"""Files that edges serve from a bucket: `[[statics]]` whose `guest_path` is a folder of the project are pushed before
any machine changes, and machines are told where they are. Over the API only; which files are needed is the server's
word (`planner/statics.py`).

As superfly/flyctl (`internal/command/deploy/statics`): a relative `guest_path` is the project's own folder; an
absolute one is in the image, or with `tigris_bucket` in a bucket that somebody else fills.
"""

from __future__ import annotations

import hashlib
import os
import stat
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import anyio
import anyio.to_thread
import msgspec

from pantala.client.api import ApiClient
from pantala.errors import InvalidRequest, PantalaError, RateLimited
from pantala.kit.tasks import first_error
from pantala.wire.machine import Machine, Static
from pantala.wire.statics import (
    FILE_BYTES_MAX,
    FILES_MAX,
    PUSH_BYTES_MAX,
    ROOT,
    FileContent,
    PushStaticsRequest,
    StaticsPush,
)

UPLOADS_AT_ONCE = 8
TRIES_MAX = 60
"""A busy server is asked again for about a minute."""
ABANDON_S = 15.0


class Folder(NamedTuple):
    """Where it is on this machine, and its files."""

    root: Path
    files: dict[str, FileContent]

    @property
    def size(self) -> int:
        return sum(content.size for content in self.files.values())


class Pushed(NamedTuple):
    """What machines' configs say instead of fly.toml's `[[statics]]`, and what was newly put into buckets for it."""

    statics: tuple[Static, ...]
    new: tuple[StaticsPush, ...] = ()


def is_pushed(item: Static) -> bool:
    return not item.guest_path.startswith("/")


async def read_folders(project: Path, statics: Sequence[Static]) -> dict[str, Folder]:
    """By `url_prefix` the folders that a deploy would push. Raises InvalidRequest, before anything is sent."""
    found: dict[str, Folder] = {}
    for index, item in enumerate(statics):
        if is_pushed(item):
            field = f"statics[{index}].guest_path"
            found[item.url_prefix] = await anyio.to_thread.run_sync(_read_folder, project, item.guest_path, field)
    return found


async def push_folders(
    client: ApiClient, app: str, statics: Sequence[Static], folders: dict[str, Folder], say: Callable[[str], None]
) -> Pushed:
    """All or nothing; also what is cancelled leaves nothing. Raises what the API raises."""
    told: list[Static] = []
    new: list[StaticsPush] = []
    try:
        for item in statics:
            folder = folders.get(item.url_prefix) if is_pushed(item) else None
            if folder is None:
                told.append(item)
                continue
            request = PushStaticsRequest(url_prefix=item.url_prefix, files=folder.files, bucket=item.tigris_bucket)
            push = await client.begin_statics(app, request)
            say(_told(item, folder, push))
            if not push.complete:
                new.append(push)
                await _upload(client, app, push, folder)
                await client.finish_statics(app, push)
            told.append(msgspec.structs.replace(item, guest_path=push.guest_path, tigris_bucket=push.bucket))
    except BaseException:
        await abandon(client, app, new)
        raise
    return Pushed(statics=tuple(told), new=tuple(new))


async def abandon(client: ApiClient, app: str, pushes: Sequence[StaticsPush]) -> None:
    """Of a deploy that failed. What machines name all the same stays; what cannot be removed now, a later deploy
    removes."""
    with anyio.CancelScope(shield=True), anyio.move_on_after(ABANDON_S):
        for push in pushes:
            with suppress(PantalaError):
                await client.abandon_statics(app, push)


async def clean(client: ApiClient, app: str, say: Callable[[str], None]) -> None:
    """After a deploy. It has succeeded, whatever becomes of this."""
    try:
        await client.clean_statics(app)
    except PantalaError as error:
        say(f"    old files were not removed from the bucket: {error.message}")


def served_from_buckets(machines: Sequence[Machine]) -> bool:
    """Whether an earlier deploy has pushed something."""
    named = [item for machine in machines if machine.config for item in machine.config.statics or []]
    return any(item.guest_path.startswith(f"/{ROOT}/") for item in named)


async def _upload(client: ApiClient, app: str, push: StaticsPush, folder: Folder) -> None:
    limiter = anyio.CapacityLimiter(UPLOADS_AT_ONCE)

    async def send(path: str) -> None:
        async with limiter:
            for left in range(TRIES_MAX, -1, -1):
                try:
                    return await client.upload_static(app, push, path, folder.root / path)
                except RateLimited as error:
                    if not left:
                        raise
                    await anyio.sleep(error.retry_after_s)
                except OSError as error:
                    raise InvalidRequest(f"{folder.root / path} cannot be read: {error.strerror}") from error

    async with first_error(), anyio.create_task_group() as tasks:
        for path in push.uploads:
            tasks.start_soon(send, path)


def _told(item: Static, folder: Folder, push: StaticsPush) -> str:
    size = sum(folder.files[path].size for path in push.uploads)
    what = f"{len(push.uploads)} to send, {size / 1024:.0f} KiB" if push.uploads else "all there already"
    return f"==> Files of {item.guest_path} for {item.url_prefix}: {len(folder.files)}, {what}; bucket {push.bucket}"


# -- the folder --------------------------------------------------------------------------------------------------------


def _read_folder(project: Path, guest_path: str, field: str) -> Folder:
    """No links: what they lead to may be anything on this machine, and would be public."""
    parts = [part for part in guest_path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise InvalidRequest(f"{guest_path!r} leads out of the project", field=field)
    if not parts:
        raise InvalidRequest(
            f"{guest_path!r} is the whole project, with all that is not for everybody",
            field=field,
            hint="put what is to be served into a folder of its own",
        )
    root = project
    for part in parts:
        root /= part
        if root.is_symlink():
            raise InvalidRequest(f"{root} is a symbolic link", field=field)
    if not root.is_dir():
        raise InvalidRequest(
            f"there is no folder {root}",
            field=field,
            hint="build it before the deploy; a folder of the image is named by its absolute path",
        )
    files = {path.relative_to(root).as_posix(): path for path in _walk(root, field)}
    if not files:
        raise InvalidRequest(f"the folder {root} is empty", field=field)
    contents = {name: _content(path, field) for name, path in sorted(files.items())}
    if sum(content.size for content in contents.values()) > PUSH_BYTES_MAX:
        raise InvalidRequest(f"{root} is larger than {PUSH_BYTES_MAX // 1024**3} GiB", field=field)
    return Folder(root, contents)


def _walk(root: Path, field: str) -> list[Path]:
    found: list[Path] = []

    def unreadable(error: OSError) -> None:
        raise InvalidRequest(f"{error.filename} cannot be read: {error.strerror}", field=field) from error

    for folder, folders, files in os.walk(root, onerror=unreadable):
        for name in folders + files:
            path = Path(folder) / name
            mode = path.lstat().st_mode
            if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
                raise InvalidRequest(f"the name {name!r} in {folder} is no text in UTF-8", field=field)
            if stat.S_ISREG(mode):
                found.append(path)
            elif not stat.S_ISDIR(mode):
                kind = "a symbolic link" if stat.S_ISLNK(mode) else "no file"
                raise InvalidRequest(f"{path} is {kind}; only files and folders are served", field=field)
        if len(found) > FILES_MAX:
            raise InvalidRequest(f"{root} has more than {FILES_MAX} files", field=field)
    return found


def _content(path: Path, field: str) -> FileContent:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > FILE_BYTES_MAX:
                raise InvalidRequest(f"{path} is larger than {FILE_BYTES_MAX // 1024**2} MiB", field=field)
            return FileContent(size=size, sha256=hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}", field=field) from error
