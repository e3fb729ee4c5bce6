"""Builds: an uploaded context becomes an image of the app, made by the `Builder`."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import anyio.to_thread
import msgspec
import structlog

from pantala.auth.grants import Action, Principal
from pantala.control import contexts
from pantala.control.access import Access
from pantala.control.context import Context
from pantala.control.images import Images
from pantala.control.ports import Builder
from pantala.errors import InvalidRequest, PantalaError, RateLimited
from pantala.images.bootstrap import recipe_for
from pantala.kit import ids
from pantala.kit.disk import check_reserve, room_for
from pantala.wire.api import BuildEvent, BuildOptions

log = structlog.get_logger()

AT_ONCE_MAX = 4
_MISSING_BASE = re.compile(r"docker\.io/library/([a-z0-9._-]+):([\w.-]+): not found")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


def with_base_hint(event: BuildEvent) -> BuildEvent:
    """A failed build whose base could not be had says what to do about it."""
    missing = _MISSING_BASE.search(event.text) if event.type == "failed" else None
    if missing is None:
        return event
    name, tag = missing[1], missing[2]
    try:
        hint = f"an operator can make it with `pantala images bootstrap {recipe_for(f'{name}:{tag}').name}`"
    except InvalidRequest as error:
        hint = error.message
    text = f"{event.text}\nNo registry with {name}:{tag} is in reach here; {hint}"
    return msgspec.structs.replace(event, text=text)


class Builds:
    def __init__(
        self,
        context: Context,
        access: Access,
        images: Images,
        builder: Builder,
        *,
        folder: Path,
        bounds: contexts.Bounds,
    ) -> None:
        self._context = context
        self._access = access
        self._images = images
        self._builder = builder
        self._folder = folder
        self._running = 0
        self.bounds = bounds

    async def build(
        self, principal: Principal, app_name: str, options: BuildOptions, upload: AsyncIterator[bytes]
    ) -> AsyncIterator[BuildEvent]:
        """Takes the upload (a tar.gz) to disk and unpacks it; then the events of the build, the last one says how it
        ended. Refusals are raised before the first event."""
        app = await self._access.app(principal, app_name, Action.DEPLOY)
        tag = options.tag or f"deployment-{ids.ulid(self._context.now_ms())}"
        if not _TAG.fullmatch(tag):
            raise InvalidRequest(f"{tag!r} is not an image tag", field="tag")
        dockerfile = Path(options.dockerfile)
        if dockerfile.is_absolute() or ".." in dockerfile.parts:
            raise InvalidRequest("must be a path inside the context", field="dockerfile")
        if self._running >= AT_ONCE_MAX:
            raise RateLimited(f"{AT_ONCE_MAX} builds are running already", retry_after_s=10)
        self._running += 1
        try:
            with room_for("the source of this build", self._folder.parent):
                work = Path(tempfile.mkdtemp(prefix="build-", dir=self._ensure_folder()))
        except BaseException:
            self._running -= 1
            raise
        try:
            with room_for("the source of this build", self._folder):
                context_dir = await self._receive(work, upload)
        except BaseException:
            await self._clean(work)
            raise
        events = self._events(app.name, options, self._images.name(app.name, tag), work, context_dir)
        # Once begun its clean-up runs in any case, even when the caller goes away before the first event.
        await anext(events)
        return events

    def _ensure_folder(self) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self._folder

    async def _receive(self, work: Path, upload: AsyncIterator[bytes]) -> Path:
        archive, size = work / "context.tar.gz", 0
        async with await anyio.open_file(archive, "wb") as file:
            async for chunk in upload:
                size += len(chunk)
                if size > self.bounds.upload_bytes:
                    raise InvalidRequest(
                        f"is larger than {self.bounds.upload_bytes} bytes",
                        field=contexts.FIELD,
                        hint="list what the build does not need in .dockerignore",
                    )
                await file.write(chunk)
                check_reserve(work)
        context_dir = work / "context"
        context_dir.mkdir()
        await anyio.to_thread.run_sync(contexts.unpack, archive, context_dir, self.bounds)
        archive.unlink()
        return context_dir

    async def _events(
        self, app: str, options: BuildOptions, image: str, work: Path, context_dir: Path
    ) -> AsyncGenerator[BuildEvent]:
        ended = False
        try:
            yield BuildEvent(type="step", text="context received")
            token = self._images.push_token(app)
            async for event in self._builder.build(
                app=app, context_dir=context_dir, options=options, image=image, push_token=token
            ):
                ended = event.type in ("done", "failed")
                yield with_base_hint(event)
            if not ended:
                yield BuildEvent(type="failed", text="the builder ended without a result")
        except PantalaError as error:
            log.warning("build failed", app=app, image=image, error=error.message)
            yield BuildEvent(type="failed", text=error.sentence())
        finally:
            await self._clean(work)

    async def _clean(self, work: Path) -> None:
        self._running -= 1
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(lambda: shutil.rmtree(work, ignore_errors=True))
