"""Writes `schemas/*.json` from the wire types: `python -m pantala.wire.schemas [--check] [DIR]`.

The Rust mirror in `crates/pantala-wire` is tested against these files, and CI fails when they are not current.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from pantala.wire import api, catalogue, feed, guest, hosts, machine, node

DOCUMENTS: dict[str, tuple[Any, ...]] = {
    "guest": (guest.GuestRequest, guest.GuestReply, guest.ExitRecord),
    "feed": (
        feed.AgentFrame,
        feed.ProxyFrame,
        feed.ProxySettings,
        feed.AppRow,
        feed.OrgRow,
        feed.HostRow,
        feed.AddressRow,
        feed.AcmeRow,
        feed.TextRow,
        feed.ServiceRow,
        feed.MachineRow,
        feed.NodeRow,
        feed.MemberRow,
        feed.CertRow,
        feed.TicketRow,
    ),
    "node": (node.NodeRequest, node.NodeReply, *(t for t in node.RESULTS.values() if t is not None)),
    "catalogue": (
        catalogue.CatalogueFrame,
        catalogue.Beat,
        catalogue.Signed,
        catalogue.Fetch,
        catalogue.HeldRows,
        catalogue.Holdings,
        catalogue.EdgeKeyRow,
        catalogue.SshRow,
        catalogue.PolicyRow,
    ),
    "hosts": (
        hosts.JoinRequest,
        hosts.Joined,
        hosts.HostToken,
        hosts.HostView,
        hosts.SignedCall,
        hosts.CallBody,
        hosts.Renewed,
        hosts.Epoch,
    ),
    "machine": (machine.MachineConfig, machine.Machine, api.LaunchMachineRequest),
}


def render(name: str) -> str:
    """One JSON Schema file: every named type of a document under `$defs`."""
    _, components = msgspec.json.schema_components(DOCUMENTS[name], ref_template="#/$defs/{name}")
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"pantala/{name}.json",
        "$defs": dict(sorted(components.items())),
    }
    return json.dumps(document, indent=2) + "\n"


def main(arguments: list[str]) -> int:
    check = "--check" in arguments
    folder = Path(next((a for a in arguments if not a.startswith("-")), "schemas"))
    stale: list[str] = []
    for name in DOCUMENTS:
        path, text = folder / f"{name}.json", render(name)
        if check and (not path.is_file() or path.read_text() != text):
            stale.append(str(path))
        elif not check:
            path.write_text(text)
    if stale:
        sys.stderr.write(f"not current: {', '.join(stale)}; run `make schemas`\n")
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
