"""The OpenAPI 3.1 description, from the table of endpoints: `python -m pantala.server.openapi [--check] [FILE]`."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from pantala.server.endpoint import BYTES, Endpoint, Param
from pantala.server.routes import all_endpoints
from pantala.wire.api import ErrorBody

DEFAULT_FILE = Path("schemas/openapi.json")
REF = "#/components/schemas/{name}"


def document() -> dict[str, Any]:
    endpoints = all_endpoints()
    types = [kind for endpoint in endpoints for kind in (endpoint.body, endpoint.answer) if kind is not None]
    schemas, components = msgspec.json.schema_components([*types, ErrorBody], ref_template=REF)
    schema_of = {repr(kind): schema for kind, schema in zip([*types, ErrorBody], schemas, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        operation = _operation(endpoint, schema_of)
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Pantala",
            "version": version("pantala"),
            "description": "The Machines API and what surrounds it. Errors are `{error, status}`.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": dict(sorted(components.items())),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}],
    }


def _operation(endpoint: Endpoint, schema_of: dict[str, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": _operation_id(endpoint),
        "summary": endpoint.summary,
        "tags": [endpoint.tag],
        "parameters": [
            *(
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                for name in re.findall(r"{(\w+)}", endpoint.path)
            ),
            *(_parameter(param) for param in endpoint.query),
        ],
        "responses": {} if endpoint.later else {str(endpoint.status): _success(endpoint, schema_of)},
    }
    if "{machine}" in endpoint.path and endpoint.method != "GET":
        operation["parameters"].append(_NONCE)
    operation["responses"] |= {str(code): _failure(code, endpoint, schema_of) for code in refusals(endpoint)}
    if endpoint.later:
        operation["description"] = f"Not offered yet: {endpoint.later}."
        operation["x-not-offered"] = True
    elif endpoint.upload:
        content = {endpoint.upload_type: {"schema": {"type": "string", "format": "binary"}}}
        operation["requestBody"] = {"required": True, "content": content}
    elif endpoint.body is not None:
        operation["requestBody"] = {
            "required": not endpoint.optional_body,
            "content": {"application/json": {"schema": schema_of[repr(endpoint.body)]}},
        }
    if endpoint.public:
        operation["security"] = []
    return operation


_NONCE: dict[str, Any] = {
    "name": "fly-machine-lease-nonce",
    "in": "header",
    "description": "Needed while somebody holds a lease on the machine: the nonce of that lease",
    "schema": {"type": "string"},
}
_REFUSALS = {
    400: "A value is wrong; `error` begins with its field",
    401: "No valid token",
    403: "The token does not allow it",
    404: "There is no such thing, or it is somebody else's",
    408: "What was waited for did not come in time",
    409: "In conflict with what is there: a lease, another request",
    412: "Not in this state or version any more",
    422: "No room (`insufficient_capacity`), or a name that is taken (`name_taken`)",
    429: "Too many requests; come back after `Retry-After` seconds",
    500: "A failure of ours, or a host that does not answer; again may help",
    501: "Not offered by this version",
    507: "No room on a disk of the platform",
}


def refusals(endpoint: Endpoint) -> list[int]:
    """Every code with which it may refuse."""
    codes = {400, 429, 500, *endpoint.codes}
    if endpoint.body is not None or endpoint.upload:
        codes.add(408)  # it did not come in time
    if not endpoint.public:
        codes.add(401)
    if "{" in endpoint.path or endpoint.query or endpoint.body is not None:
        codes |= {403, 404}
    if endpoint.method != "GET":
        codes |= {409, 412, 422, 507}
    if endpoint.later:
        codes = {401, 403, 404, 429, 501}
    return sorted(codes)


def _parameter(param: Param) -> dict[str, Any]:
    document: dict[str, Any] = {"name": param.name, "in": "query", "schema": param.schema}
    if param.required:
        document["required"] = True
    if param.repeats:
        document |= {"style": "form", "explode": True}
    if param.summary:
        document["description"] = param.summary
    return document


def _success(endpoint: Endpoint, schema_of: dict[str, Any]) -> dict[str, Any]:
    if endpoint.status == 204:
        return {"description": "Done"}
    if endpoint.answer is None:
        ok = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
        return {"description": "Done", "content": {"application/json": {"schema": ok}}}
    schema = {"schema": schema_of[repr(endpoint.answer)]}
    kinds = [*(["application/json"] if not endpoint.upload else []), *([NDJSON] if _lines(endpoint) else [])]
    content: dict[str, Any] = dict.fromkeys(kinds, schema)
    if endpoint.bytes_too:
        content[BYTES] = {"schema": {"type": "string", "format": "binary"}}
    return {"description": "OK", "content": content}


NDJSON = "application/x-ndjson"


def _lines(endpoint: Endpoint) -> bool:
    return endpoint.upload or endpoint.streams


def _failure(code: int, endpoint: Endpoint, schema_of: dict[str, Any]) -> dict[str, Any]:
    description = endpoint.later if code == 501 and endpoint.later else _REFUSALS[code]
    document: dict[str, Any] = {
        "description": description,
        "content": {"application/json": {"schema": schema_of[repr(ErrorBody)]}},
    }
    if code == 429:
        document["headers"] = {"Retry-After": {"required": True, "schema": {"type": "integer", "minimum": 1}}}
    return document


def _operation_id(endpoint: Endpoint) -> str:
    words = re.findall(r"\w+", endpoint.path.removeprefix("/v1"))
    return "_".join([endpoint.method.lower(), *words])


def main(arguments: list[str]) -> int:
    target = Path(next((a for a in arguments if not a.startswith("-")), DEFAULT_FILE))
    text = json.dumps(document(), indent=2) + "\n"
    if "--check" not in arguments:
        target.write_text(text)
        return 0
    if target.is_file() and target.read_text() == text:
        return 0
    sys.stderr.write(f"{target} is not current; run `python -m pantala.server.openapi`\n")
    return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
