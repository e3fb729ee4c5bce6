"""What counts as well in a deploy."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pantala.deploys.health import is_asleep, not_taken
from pantala.wire.machine import Machine


@pytest.mark.parametrize(
    ("state", "ready_ms", "answer_ms", "asleep"),
    [
        ("stopped", 100, 101, True),
        ("stopped", 99, 101, False),
        ("stopped", 100, 99, False),
        ("started", 100, 101, False),
    ],
)
def test_asleep_means_ready_and_answered_since_the_update_and_stopped_now(
    state: str, ready_ms: int, answer_ms: int, asleep: bool
) -> None:
    times = {"answer": answer_ms, "ready": ready_ms}
    events = [{"id": "e", "type": t, "status": "s", "source": "flyd", "timestamp": ms} for t, ms in times.items()]
    assert is_asleep(machine(state, events), since_ms=100) is asleep


@pytest.mark.parametrize(
    ("at_ms", "version", "found"),
    [(100, "v2", "no room for the image"), (99, "v2", None), (100, "v3", None)],
    ids=["this update", "an earlier one", "another version"],
)
def test_a_version_whose_image_did_not_come_is_told_with_its_reason(
    at_ms: int, version: str, found: str | None
) -> None:
    event = {"id": "e", "type": "update", "status": "failed", "source": "flyd", "timestamp": at_ms}
    told = event | {"request": {"reason": "version v2 did not come: no room for the image"}}
    assert not_taken(machine("started", [told]), version, since_ms=100) == found


def machine(state: str, events: list[dict[str, Any]]) -> Machine:
    texts = ("name", "region", "instance_id", "version", "private_ip", "created_at", "updated_at")
    image = dict.fromkeys(("registry", "repository", "tag", "digest"), "")
    known = dict.fromkeys(texts, "") | {"id": "m", "state": state, "events": events, "checks": [], "image_ref": image}
    served = {"services": [{"internal_port": 80, "ports": [{"port": 80, "handlers": ["http"]}]}]}
    return msgspec.convert(known | {"host_status": "ok", "cordoned": False, "config": served}, Machine)
