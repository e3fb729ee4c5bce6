"""`/v1/apps/{app}/certificates`. A wildcard is written `%2A.example.com` in a path."""

from __future__ import annotations

from typing import Any

from pantala.control.hostnames import LIMIT, LIMIT_MAX
from pantala.server.endpoint import Call, Endpoint, text, whole
from pantala.wire.certificates import AddAcmeRequest, AddCustomRequest, CertificateDetail, CertificateList


async def list_certificates(call: Call) -> Any:
    return await call.control.hostnames.list_names(
        call.principal,
        call.app,
        containing=call.query("filter") or "",
        cursor=call.query("cursor") or "",
        limit=call.number("limit", default=LIMIT),
    )


async def add_acme(call: Call) -> Any:
    return await call.control.hostnames.add_acme(call.principal, call.app, call.body.hostname)


async def add_custom(call: Call) -> Any:
    return await call.control.hostnames.add_custom(call.principal, call.app, call.body)


async def show(call: Call) -> Any:
    return await call.control.hostnames.show(call.principal, call.app, call.path("hostname"))


async def check(call: Call) -> Any:
    return await call.control.hostnames.check(call.principal, call.app, call.path("hostname"))


async def delete(call: Call) -> None:
    await call.control.hostnames.delete(call.principal, call.app, call.path("hostname"))


async def delete_acme(call: Call) -> Any:
    return await call.control.hostnames.delete_acme(call.principal, call.app, call.path("hostname"))


async def delete_custom(call: Call) -> Any:
    return await call.control.hostnames.delete_custom(call.principal, call.app, call.path("hostname"))


_ALL = "/v1/apps/{app}/certificates"
_ONE = f"{_ALL}/{{hostname}}"
ENDPOINTS = [
    Endpoint(
        method="GET",
        path=_ALL,
        run=list_certificates,
        answer=CertificateList,
        query=(
            text("filter", "Names that contain this"),
            text("cursor", "`next_cursor` of the page before"),
            whole("limit", low=1, high=LIMIT_MAX, default=LIMIT),
        ),
        tag="Certificates",
        summary="The app's own host names, in pages",
    ),
    Endpoint(
        method="POST",
        path=f"{_ALL}/acme",
        run=add_acme,
        body=AddAcmeRequest,
        answer=CertificateDetail,
        status=201,
        tag="Certificates",
        summary="Add a host name and have a certificate issued for it",
    ),
    Endpoint(
        method="POST",
        path=f"{_ALL}/custom",
        run=add_custom,
        body=AddCustomRequest,
        answer=CertificateDetail,
        status=201,
        tag="Certificates",
        summary="Add a host name with a certificate of one's own",
    ),
    Endpoint(
        method="GET",
        path=_ONE,
        run=show,
        answer=CertificateDetail,
        tag="Certificates",
        summary="One host name and its certificates",
    ),
    Endpoint(
        method="POST",
        path=f"{_ONE}/check",
        run=check,
        answer=CertificateDetail,
        tag="Certificates",
        summary="Look at public DNS now and say what is missing",
    ),
    Endpoint(
        method="DELETE",
        path=_ONE,
        run=delete,
        status=204,
        tag="Certificates",
        summary="Remove a host name with its certificates",
    ),
    Endpoint(
        method="DELETE",
        path=f"{_ONE}/acme",
        run=delete_acme,
        answer=CertificateDetail,
        tag="Certificates",
        summary="Remove the issued certificate and have none issued any more",
    ),
    Endpoint(
        method="DELETE",
        path=f"{_ONE}/custom",
        run=delete_custom,
        answer=CertificateDetail,
        tag="Certificates",
        summary="Remove the certificate that was brought along",
    ),
]
