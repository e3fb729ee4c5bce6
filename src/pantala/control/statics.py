"""Files of apps that a deploy puts into a bucket of the operator's store, from where edges serve them.

    begin ─► upload, file by file ─► finish            machines then name the folder, edges read it
      └────────────┴─► abandon                         clean, after the deploy: older pushes go

The credentials stay here: clients send files through the API, only for apps of orgs that the operator has named as
`writers` of a bucket, and only below the app's own folder there (`wire/statics.py`). A push never changes once it is
finished, so machines of an earlier version, and a deploy that is put back, find what they named.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections import OrderedDict
from collections.abc import AsyncIterator, Collection
from contextlib import suppress
from pathlib import Path
from typing import IO

import anyio
import msgspec
import structlog

from pantala.auth.grants import Action, Principal
from pantala.control.access import Access
from pantala.control.context import Context
from pantala.control.ports import Objects
from pantala.control.projection import Projection
from pantala.domain.media import content_type
from pantala.errors import (
    Conflict,
    Forbidden,
    InvalidRequest,
    NotFound,
    NotOffered,
    PantalaError,
    RateLimited,
    RequestTimeout,
)
from pantala.kit import ids
from pantala.kit.disk import room_for
from pantala.kit.tasks import first_error
from pantala.planner.statics import KEPT_PUSHES, PushPlan, plan_cleaning, plan_push
from pantala.store.records import AppRecord
from pantala.wire import statics as wire
from pantala.wire.statics import Manifest, PushStaticsRequest, StaticsCleaned, StaticsFinished, StaticsPush

log = structlog.get_logger()

UPLOADS_AT_ONCE_MAX = 16
UPLOAD_TIMEOUT_S = 600.0
STORE_CALLS_AT_ONCE = 16
DRAFTS_KEPT = 8
DRAFT_ENDS_MS = 24 * 3600 * 1000
FAREWELL_S = 20.0
MEMORY_BYTES_MAX = 1024 * 1024
"""Of a file on its way; the rest of a larger one is on disk."""
MANIFEST_BYTES_MAX = 4 * wire.LISTING_BYTES_MAX
_PUSH = re.compile(r"[0-9A-HJKMNP-TV-Z]{26}")
_DRAFT, _MANIFEST = ".draft.json", ".json"


class Statics:
    """`writers`: by bucket the orgs whose deploys may put files there."""

    def __init__(
        self,
        context: Context,
        access: Access,
        projection: Projection,
        objects: Objects | None,
        *,
        writers: dict[str, list[str]],
        folder: Path,
    ) -> None:
        self._context = context
        self._access = access
        self._projection = projection
        self._objects = objects
        self._writers = writers
        self._folder = folder
        self._uploading = 0
        self._drafts: OrderedDict[str, Manifest] = OrderedDict()

    # -- a push ------------------------------------------------------------------------------------------------------

    async def begin(self, principal: Principal, app_name: str, request: PushStaticsRequest) -> StaticsPush:
        app = await self._access.app(principal, app_name, Action.DEPLOY)
        _check(request, app.name)
        bucket = self._bucket(app, request.bucket)
        earlier = await self._manifests(bucket, app.name, request.url_prefix)
        plan = plan_push(request.files, earlier)
        if plan.same is not None:
            return _answer(app.name, bucket, plan.same, plan)
        push = ids.ulid(self._context.now_ms())
        draft = Manifest(
            url_prefix=request.url_prefix,
            files=request.files,
            kept=plan.kept,
            copies=plan.copies,
            kept_from=plan.kept_from,
        )
        await self._write(bucket, _base(app.name, push) + _DRAFT, draft)
        self._remember(bucket, app.name, push, draft)
        return _answer(app.name, bucket, push, plan)

    async def upload(
        self, principal: Principal, app_name: str, push: str, *, bucket: str, path: str, body: AsyncIterator[bytes]
    ) -> None:
        """Taken whole before the store sees it: what is not as it was announced is refused."""
        app = await self._access.app(principal, app_name, Action.DEPLOY)
        bucket = self._bucket(app, bucket)
        draft = await self._draft(bucket, app.name, push)
        expected = draft.files.get(path)
        if expected is None or path in draft.copies:
            raise InvalidRequest(f"{path!r} is none of the files that this push asked for", field="path")
        if self._uploading >= UPLOADS_AT_ONCE_MAX:
            raise RateLimited(f"{UPLOADS_AT_ONCE_MAX} files are on their way already", retry_after_s=1)
        self._uploading += 1
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with (
                room_for(f"the file {path}", self._folder),
                tempfile.SpooledTemporaryFile(max_size=MEMORY_BYTES_MAX, dir=str(self._folder)) as file,
            ):
                with anyio.fail_after(UPLOAD_TIMEOUT_S):
                    await _receive(body, file, path, expected)
                file.seek(0)
                key = f"{_base(app.name, push)}/{path}"
                await self._store.put(bucket, key, file, size=expected.size, content_type=content_type(path))
        except TimeoutError:
            raise RequestTimeout(f"{path} took longer than {UPLOAD_TIMEOUT_S:g} s to arrive") from None
        finally:
            self._uploading -= 1

    async def finish(self, principal: Principal, app_name: str, push: str, *, bucket: str) -> StaticsFinished:
        """Copies what earlier pushes have, looks whether all is there, and says so in the bucket."""
        app = await self._access.app(principal, app_name, Action.DEPLOY)
        bucket, base = self._bucket(app, bucket), _base(app.name, push)
        draft = await self._draft(bucket, app.name, push)
        there = await self._store.list_sizes(bucket, f"{base}/")
        copies = [(path, source) for path, source in (draft.copies | draft.kept_from).items()]
        missing = sorted(
            path
            for path, content in draft.files.items()
            if path not in draft.copies and there.get(f"{base}/{path}") != content.size
        )
        if missing:
            raise Conflict(f"{len(missing)} file(s) of this push have not been sent, such as {missing[0]}")

        async def copy(path: str, source: str) -> None:
            async with limiter:
                await self._store.copy(bucket, f"{_base(app.name, source)}/{path}", f"{base}/{path}")

        limiter = anyio.CapacityLimiter(STORE_CALLS_AT_ONCE)
        try:
            async with first_error(), anyio.create_task_group() as tasks:
                for path, source in copies:
                    tasks.start_soon(copy, path, source)
        except NotFound as error:
            raise Conflict("an earlier push was removed meanwhile", hint="deploy again") from error
        await self._write(bucket, base + _MANIFEST, msgspec.structs.replace(draft, copies={}, kept_from={}))
        await self._store.delete(bucket, [base + _DRAFT])
        self._drafts.pop(f"{bucket}/{base}", None)
        log.info("statics pushed", app=app.name, bucket=bucket, push=push, files=len(draft.files))
        return StaticsFinished(unchanged=len(draft.copies), kept=len(draft.kept_from))

    async def abandon(self, principal: Principal, app_name: str, push: str, *, bucket: str) -> None:
        """Of a deploy that failed. Raises Conflict for one that machines name."""
        app = await self._access.app(principal, app_name, Action.DEPLOY)
        bucket = self._bucket(app, bucket)
        if push in await self._used(app):
            raise Conflict(f"machines of {app.name} are served from this push")
        await self._remove(bucket, app.name, [_checked(push)])

    async def clean(self, principal: Principal, app_name: str) -> StaticsCleaned:
        """In all buckets of the app's org: keeps the newest pushes of each folder and those that machines name, removes
        the others and what was begun a day ago and never finished."""
        app = await self._access.app(principal, app_name, Action.DEPLOY)
        removed: list[str] = []
        used = await self._used(app)
        for bucket in self._open_to(app.org_slug):
            complete, drafts = await self._pushes(bucket, app.name)
            folders = {
                push: manifest.url_prefix for push, manifest in (await self._read(bucket, app.name, complete)).items()
            }
            gone = plan_cleaning(folders, used=used)
            gone += [push for push in drafts if ids.ulid_ms(push) < self._context.now_ms() - DRAFT_ENDS_MS]
            await self._remove(bucket, app.name, gone)
            removed += gone
        return StaticsCleaned(removed=removed)

    # -- an app that is destroyed ------------------------------------------------------------------------------------

    async def of_destroyed(self, app: AppRecord) -> dict[str, list[str]]:
        """By bucket the pushes that there are now: a later app of the same name makes others. A store that does not
        answer keeps no app from being destroyed."""
        found: dict[str, list[str]] = {}
        if self._objects is not None:
            for bucket in self._open_to(app.org_slug):
                with suppress(PantalaError), anyio.move_on_after(FAREWELL_S):
                    complete, drafts = await self._pushes(bucket, app.name)
                    if complete or drafts:
                        found[bucket] = complete + drafts
        return found

    async def forget(self, app_name: str, pushes: dict[str, list[str]]) -> None:
        for bucket, found in pushes.items():
            try:
                with anyio.fail_after(FAREWELL_S):
                    await self._remove(bucket, app_name, found)
            except (PantalaError, TimeoutError) as error:
                log.warning("files of a destroyed app stay", app=app_name, bucket=bucket, error=str(error))

    # -- who may what ------------------------------------------------------------------------------------------------

    @property
    def _store(self) -> Objects:
        if self._objects is None:
            raise self._no_store()
        return self._objects

    def _no_store(self) -> NotOffered:
        return NotOffered(
            "the operator of this platform has named no store for files (--buckets)",
            hint="an absolute guest_path is served from the machine's image",
        )

    def _open_to(self, org: str) -> list[str]:
        return sorted(bucket for bucket, orgs in self._writers.items() if org in orgs)

    def _bucket(self, app: AppRecord, named: str | None) -> str:
        if self._objects is None:
            raise self._no_store()
        mine = self._open_to(app.org_slug)
        if named and named not in mine:
            raise Forbidden(
                f"the bucket {named} is not open to deploys of the organization {app.org_slug}",
                hint="the operator names it among the writers of --buckets",
            )
        if named:
            return named
        if not mine:
            raise Forbidden(
                f"the operator has opened no bucket to deploys of the organization {app.org_slug}",
                hint="the writers of --buckets name them",
            )
        if len(mine) > 1:
            raise InvalidRequest(f"is needed, one of {', '.join(mine)}", field="tigris_bucket")
        return mine[0]

    async def _used(self, app: AppRecord) -> set[str]:
        """Pushes that machines name, also sleeping ones. Raises Conflict when one cannot be asked."""
        used: set[str] = set()
        for _, machine in await self._projection.machines_of(app, include_deleted=False):
            config = machine.config or machine.incomplete_config
            if config is None:
                raise Conflict(f"what the machine {machine.id} names is not known: its host does not answer")
            for item in config.statics or []:
                parts = item.guest_path.strip("/").split("/")
                if len(parts) == 3 and parts[:2] == [wire.ROOT, app.name]:
                    used.add(parts[2])
        return used

    # -- what is in the bucket ---------------------------------------------------------------------------------------

    async def _pushes(self, bucket: str, app: str) -> tuple[list[str], list[str]]:
        """Complete ones, and those that were begun."""
        root = f"{wire.ROOT}/{app}/"
        keys, folders = await self._store.list_names(bucket, root)
        names = {key.removeprefix(root) for key in keys}
        complete = {name.removesuffix(_MANIFEST) for name in names if not name.endswith(_DRAFT)}
        begun = {name.removesuffix(_DRAFT) for name in names if name.endswith(_DRAFT)}
        begun |= {folder.removeprefix(root).rstrip("/") for folder in folders}
        known = sorted(push for push in complete if _PUSH.fullmatch(push))
        return known, sorted(push for push in begun - complete if _PUSH.fullmatch(push))

    async def _manifests(self, bucket: str, app: str, url_prefix: str) -> dict[str, Manifest]:
        """The newest complete pushes of a folder."""
        complete, _ = await self._pushes(bucket, app)
        of_folder = await self._read(bucket, app, complete)
        newest = sorted((push for push, one in of_folder.items() if one.url_prefix == url_prefix), reverse=True)
        return {push: of_folder[push] for push in newest[:KEPT_PUSHES]}

    async def _read(self, bucket: str, app: str, pushes: Collection[str]) -> dict[str, Manifest]:
        found: dict[str, Manifest] = {}
        for push in pushes:
            with suppress(NotFound):  # removed meanwhile
                key = _base(app, push) + _MANIFEST
                text = await self._store.get(bucket, key, bytes_max=MANIFEST_BYTES_MAX)
                found[push] = _manifest(text, bucket, key)
        return found

    async def _draft(self, bucket: str, app: str, push: str) -> Manifest:
        base = _base(app, _checked(push))
        if kept := self._drafts.get(f"{bucket}/{base}"):
            return kept
        try:
            text = await self._store.get(bucket, base + _DRAFT, bytes_max=MANIFEST_BYTES_MAX)
        except NotFound:
            raise NotFound(f"no push {push} of {app} is under way in the bucket {bucket}") from None
        draft = _manifest(text, bucket, base + _DRAFT)
        self._remember(bucket, app, push, draft)
        return draft

    def _remember(self, bucket: str, app: str, push: str, draft: Manifest) -> None:
        self._drafts[f"{bucket}/{_base(app, push)}"] = draft
        if len(self._drafts) > DRAFTS_KEPT:
            self._drafts.popitem(last=False)

    async def _write(self, bucket: str, key: str, document: Manifest) -> None:
        text = msgspec.json.encode(document)
        await self._store.put(bucket, key, text, size=len(text), content_type="application/json")

    async def _remove(self, bucket: str, app: str, pushes: Collection[str]) -> None:
        """The manifest first: what is half removed is no push any more."""
        for push in pushes:
            base = _base(app, push)
            self._drafts.pop(f"{bucket}/{base}", None)
            await self._store.delete(bucket, [base + _MANIFEST])
            await self._store.delete(bucket, [*await self._store.list_sizes(bucket, f"{base}/"), base + _DRAFT])


def _base(app: str, push: str) -> str:
    return f"{wire.ROOT}/{app}/{push}"


def _checked(push: str) -> str:
    if not _PUSH.fullmatch(push):
        raise InvalidRequest(f"{push!r} is not the id of a push", field="push")
    return push


def _manifest(text: bytes, bucket: str, key: str) -> Manifest:
    try:
        return msgspec.json.decode(text, type=Manifest)
    except msgspec.MsgspecError as error:
        raise Conflict(
            f"{key} in the bucket {bucket} was changed by somebody else: {error}", hint="remove it"
        ) from error


def _answer(app: str, bucket: str, push: str, plan: PushPlan) -> StaticsPush:
    return StaticsPush(
        id=push,
        bucket=bucket,
        guest_path=f"/{_base(app, push)}",
        uploads=plan.uploads,
        complete=plan.same is not None,
    )


def _check(request: PushStaticsRequest, app: str) -> None:
    if not request.url_prefix.startswith("/"):
        raise InvalidRequest(f"{request.url_prefix!r} does not begin with /", field="url_prefix")
    if not request.files:
        raise InvalidRequest("the folder has no files", field="files")
    if len(request.files) > wire.FILES_MAX:
        raise InvalidRequest(f"{len(request.files)} files; at most {wire.FILES_MAX}", field="files")
    before = len(_base(app, "0" * 26)) + 1
    for path, content in request.files.items():
        misleading = any(part in ("", ".", "..") for part in path.split("/"))
        if misleading or any(ord(c) < 32 or 127 <= ord(c) < 160 for c in path):
            raise InvalidRequest(f"{path!r} is no path of a file below the folder", field="files")
        if before + len(path.encode()) > wire.KEY_BYTES_MAX:
            raise InvalidRequest(f"{path} is too long: a key has at most {wire.KEY_BYTES_MAX} bytes", field="files")
        if not 0 <= content.size <= wire.FILE_BYTES_MAX:
            limit = wire.FILE_BYTES_MAX // 1024**2
            raise InvalidRequest(f"{path} is larger than {limit} MiB", field="files")
        if not re.fullmatch(r"[0-9a-f]{64}", content.sha256):
            raise InvalidRequest(f"sha256 of {path} is not 64 hexadecimal digits", field="files")
    if sum(content.size for content in request.files.values()) > wire.PUSH_BYTES_MAX:
        raise InvalidRequest(f"larger than {wire.PUSH_BYTES_MAX // 1024**3} GiB together", field="files")


async def _receive(body: AsyncIterator[bytes], file: IO[bytes], path: str, expected: wire.FileContent) -> None:
    size, digest = 0, hashlib.sha256()
    async for chunk in body:
        size += len(chunk)
        if size > expected.size:
            break
        digest.update(chunk)
        file.write(chunk)
    if size != expected.size or digest.hexdigest() != expected.sha256:
        raise InvalidRequest(f"{path} has changed since it was announced", field="path", hint="deploy again")
