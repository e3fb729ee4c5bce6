"""`/v1/apps/{app}/statics`: files of an app go into a bucket of the operator's store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from pantala.errors import InvalidRequest
from pantala.server.endpoint import BYTES, Call, Endpoint, text
from pantala.wire.statics import (
    LISTING_BYTES_MAX,
    PushStaticsRequest,
    StaticsCleaned,
    StaticsFinished,
    StaticsPush,
)


async def begin(call: Call) -> Any:
    return await call.control.statics.begin(call.principal, call.app, call.body)


async def upload(call: Call) -> Any:
    path = call.query("path")
    if path is None:
        raise InvalidRequest("is required: which of the files", field="path")
    await call.control.statics.upload(
        call.principal, call.app, call.path("push"), bucket=_bucket(call), path=path, body=_chunks(call)
    )
    return {"ok": True}


async def _chunks(call: Call) -> AsyncIterator[bytes]:
    async for chunk in call.request.stream():
        yield chunk


async def finish(call: Call) -> Any:
    return await call.control.statics.finish(call.principal, call.app, call.path("push"), bucket=_bucket(call))


async def abandon(call: Call) -> None:
    await call.control.statics.abandon(call.principal, call.app, call.path("push"), bucket=_bucket(call))


async def clean(call: Call) -> Any:
    return await call.control.statics.clean(call.principal, call.app)


def _bucket(call: Call) -> str:
    bucket = call.query("bucket")
    if bucket is None:
        raise InvalidRequest("is required: the one that the push was begun in", field="bucket")
    return bucket


_ALL = "/v1/apps/{app}/statics"
_ONE = "/v1/apps/{app}/statics/{push}"
_IN_BUCKET = text("bucket", "the one that the push was begun in", required=True)
ENDPOINTS = [
    Endpoint(
        method="POST",
        path=_ALL,
        run=begin,
        body=PushStaticsRequest,
        answer=StaticsPush,
        body_bytes_max=LISTING_BYTES_MAX,
        codes=(501,),
        tag="Statics",
        summary="Begin to put a folder's files into a bucket; says which ones are needed",
    ),
    Endpoint(
        method="POST",
        path=f"{_ALL}/clean",
        run=clean,
        answer=StaticsCleaned,
        codes=(409, 501),
        tag="Statics",
        summary="Remove old pushes that no machine names",
    ),
    Endpoint(
        method="PUT",
        path=f"{_ONE}/files",
        run=upload,
        upload=True,
        upload_type=BYTES,
        query=(_IN_BUCKET, text("path", "below the folder", required=True)),
        codes=(408, 501, 507),
        tag="Statics",
        summary="Send one of the files",
    ),
    Endpoint(
        method="POST",
        path=f"{_ONE}/finish",
        run=finish,
        answer=StaticsFinished,
        query=(_IN_BUCKET,),
        codes=(409, 501),
        tag="Statics",
        summary="Copy what earlier pushes have; then machines may name the folder",
    ),
    Endpoint(
        method="DELETE",
        path=_ONE,
        run=abandon,
        query=(_IN_BUCKET,),
        codes=(409, 501),
        tag="Statics",
        summary="Remove a push that no machine names",
    ),
]
