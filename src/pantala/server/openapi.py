"""The OpenAPI 3.1 description, from the table of endpoints: `python -m pantala.server.openapi [--check] [FILE]`."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from pantala.server.endpoint import Endpoint
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
            *({"name": name, "in": "query", "schema": {"type": "string"}} for name in endpoint.query),
        ],
        "responses": {str(endpoint.status): _success(endpoint, schema_of), "default": _failure(schema_of)},
    }
    if endpoint.upload:
        content = {"application/gzip": {"schema": {"type": "string", "format": "binary"}}}
        operation["requestBody"] = {"required": True, "content": content}
    elif endpoint.body is not None:
        operation["requestBody"] = {
            "required": not endpoint.optional_body,
            "content": {"application/json": {"schema": schema_of[repr(endpoint.body)]}},
        }
    if endpoint.public:
        operation["security"] = []
    return operation


def _success(endpoint: Endpoint, schema_of: dict[str, Any]) -> dict[str, Any]:
    if endpoint.status == 204:
        return {"description": "Done"}
    if endpoint.answer is None:
        ok = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
        return {"description": "Done", "content": {"application/json": {"schema": ok}}}
    kind = "application/x-ndjson" if endpoint.upload else "application/json"
    return {"description": "OK", "content": {kind: {"schema": schema_of[repr(endpoint.answer)]}}}


def _failure(schema_of: dict[str, Any]) -> dict[str, Any]:
    return {"description": "Refused", "content": {"application/json": {"schema": schema_of[repr(ErrorBody)]}}}


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
