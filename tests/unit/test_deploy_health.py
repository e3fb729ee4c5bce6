"""What counts as well in a deploy."""

from __future__ import annotations

import msgspec
import pytest

from pantala.deploys.health import is_asleep
from pantala.wire.machine import Machine


@pytest.mark.parametrize(
    ("state", "ready_ms", "asleep"),
    [("stopped", 100, True), ("stopped", 99, False), ("started", 100, False)],
)
def test_asleep_means_ready_since_the_update_and_stopped_now(state: str, ready_ms: int, asleep: bool) -> None:
    events = [{"id": "e", "type": "ready", "status": "started", "source": "flyd", "timestamp": ready_ms}]
    texts = ("name", "region", "instance_id", "version", "private_ip", "created_at", "updated_at")
    image = dict.fromkeys(("registry", "repository", "tag", "digest"), "")
    known = dict.fromkeys(texts, "") | {"id": "m", "state": state, "events": events, "checks": [], "image_ref": image}
    machine = msgspec.convert(known | {"host_status": "ok", "cordoned": False}, Machine)
    assert is_asleep(machine, since_ms=100) is asleep
