"""Writing a fly.toml that a person would have written: the keys in their usual order, a header that says where from."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

ORDER = (
    "app primary_region kill_signal kill_timeout swap_size_mb console_command experimental build deploy env processes "
    "mounts http_service services checks files host_dedication_id machine_config container machine_checks restart vm "
    "statics metrics"
).split()


def new_document(
    *,
    app: str,
    region: str,
    port: int | None,
    auto_stop: str = "stop",
    memory: str = "1gb",
    dockerfile: str | None = None,
) -> dict[str, Any]:
    """What `launch` writes for an app whose service listens on `port` (none: no service)."""
    document: dict[str, Any] = {"app": app, "primary_region": region, "build": {}}
    if dockerfile:
        document["build"] = {"dockerfile": dockerfile}
    if port:
        document["http_service"] = {
            "internal_port": port,
            "force_https": True,
            "auto_stop_machines": auto_stop,
            "auto_start_machines": True,
            "min_machines_running": 0,
            "processes": ["app"],
        }
    document["vm"] = [{"memory": memory, "cpu_kind": "shared", "cpus": 1}]
    return document


def render(document: dict[str, Any], *, at: datetime) -> str:
    """TOML text. Tables are indented by two, as the original's client writes them."""
    name = document.get("app", "")
    lines = [f"# fly.toml app configuration file generated for {name} on {at.isoformat(timespec='seconds')}", "#"]
    lines += ["# What each key means: docs/guides/fly-toml.md, or `pantala config validate` to check it.", ""]
    keys = sorted(document, key=lambda key: (ORDER.index(key) if key in ORDER else len(ORDER), key))
    scalars = [key for key in keys if not _is_table(document[key])]
    lines += [f"{key} = {_value(document[key])}" for key in scalars]
    for key in keys:
        if key not in scalars:
            lines += _table(key, document[key], depth=0)
    return "\n".join(lines) + "\n"


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _table(path: str, value: Any, *, depth: int) -> list[str]:
    if isinstance(value, list):
        return [line for item in value for line in _one(f"[[{path}]]", path, item, depth=depth)]
    return _one(f"[{path}]", path, value, depth=depth)


def _one(header: str, path: str, table: dict[str, Any], *, depth: int) -> list[str]:
    indent = "  " * depth
    lines = ["", f"{indent}{header}"]
    lines += [f"{indent}  {_key(key)} = {_value(value)}" for key, value in table.items() if not _is_table(value)]
    for key, value in table.items():
        if _is_table(value):
            lines += _table(f"{path}.{_key(key)}", value, depth=depth + 1)
    return lines


def _key(key: str) -> str:
    return key if key.replace("-", "").replace("_", "").isalnum() and key.isascii() else json.dumps(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(_value(item) for item in value)}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)
