"""What counts as well in a deploy."""

from __future__ import annotations

import msgspec
import pytest

from pantala.deploys.health import is_asleep
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
    texts = ("name", "region", "instance_id", "version", "private_ip", "created_at", "updated_at")
    image = dict.fromkeys(("registry", "repository", "tag", "digest"), "")
    known = dict.fromkeys(texts, "") | {"id": "m", "state": state, "events": events, "checks": [], "image_ref": image}
    served = {"services": [{"internal_port": 80, "ports": [{"port": 80, "handlers": ["http"]}]}]}
    machine = msgspec.convert(known | {"host_status": "ok", "cordoned": False, "config": served}, Machine)
    assert is_asleep(machine, since_ms=100) is asleep
