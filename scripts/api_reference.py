"""Writes docs/reference/api.md from the table of endpoints: `python scripts/api_reference.py [--check]`."""

from __future__ import annotations

import sys
from pathlib import Path

from pantala.server.endpoint import Endpoint
from pantala.server.openapi import refusals
from pantala.server.routes import all_endpoints

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "api.md"

HEAD = """\
# HTTP API

Written by `scripts/api_reference.py` from the endpoints themselves; bodies are in the description that every server
answers at `/openapi.json` (here: schemas/openapi.json). What the original Machines API has keeps its names and codes,
so its clients work.

- **Tokens**: `Authorization: Bearer <token>`, or `FlyV1`. Somebody else's things answer 404.
- **Errors**: `{"error": sentence, "status": word}`; a sentence about a value begins with its field. Words that clients
  know: `insufficient_capacity`, `name_taken`; others say what they mean. Every answer has `fly-request-id`.
- **Repeating**: 502 and 503 are never sent. With an `Idempotency-Key` the same request gets the same answer for a day.
- **Limits**: one caller's action on one machine (or app) 50 times a second, bursts of 200; `GET` of a machine 250 and
  1000; deletions of apps 600 a minute. Then 429 with `Retry-After`. The operator changes them in the server's settings
  (`requests_per_s_max`, `requests_burst`, `machine_reads_per_s_max`, `machine_reads_burst`,
  `app_deletions_per_min_max`, `app_deletions_burst`).
- **Overload**: 64 requests are served at once, besides 1000 that wait for something (`wait`, `exec`, logs, builds), and
  of one host 16 at once with 32 in line for a second; what comes on top gets 429 with `Retry-After` before anything of
  it is done (`requests_at_once_max`, `waits_at_once_max`). The head of a request may take 10 s, then the connection is
  closed; a body 10 s, then 408 (an upload may pause for 30 s); an answer that is not read for 30 s is dropped. At most
  128 bodies are on their way at once, and 4096 connections open; then 429.
- **Durations** are Go's (`"1m30s"`) or nanoseconds in bodies; `timeout` in a query also takes seconds. `exec` counts
  whole seconds.
- **Leases**: while somebody holds one, changes need its nonce in `fly-machine-lease-nonce`, else 409.
- **Fields that are not known** in a machine's config are kept and given back. `cmd` of `exec` is split as a shell
  would, and no shell runs it. `updated_at` of metadata is read and not used: writes are ordered as they reach the host.
- **Bytes** of secret keys are base64 text; lists of numbers are read too. Types: `hs256`, `hs384`, `hs512`, `es256`,
  `nacl_auth`, `nacl_sign` sign and verify; `nacl_box`, `nacl_secretbox`, `xaes256gcm` encrypt and decrypt. Nobody can
  read a key or a secret back: `show_secrets` answers 403.
- **Pages**: `limit`, and `cursor` with the `next_cursor` of the page before.

"""


def page() -> str:
    lines = [HEAD]
    endpoints = all_endpoints()
    for tag in dict.fromkeys(endpoint.tag for endpoint in endpoints):
        lines += [f"## {tag}\n", "| Operation | What | Answers |", "| --- | --- | --- |"]
        lines += [_row(endpoint) for endpoint in endpoints if endpoint.tag == tag]
        lines.append("")
    return "\n".join(lines)


def _row(endpoint: Endpoint) -> str:
    query = ", ".join(f"`{param.name}`" for param in endpoint.query)
    what = endpoint.summary + (f"; {query}" if query else "")
    answers = f"501: {endpoint.later}" if endpoint.later else str(endpoint.status)
    special = [code for code in refusals(endpoint) if code in (408, 501)] if not endpoint.later else []
    return f"| `{endpoint.method} {endpoint.path}` | {what} | {', '.join([answers, *map(str, special)])} |"


def main(arguments: list[str]) -> int:
    if "--check" in arguments:
        return 0 if PAGE.is_file() and PAGE.read_text() == page() else 1
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
