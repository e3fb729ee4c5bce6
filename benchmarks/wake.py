"""What the platform adds to the start of a process when a request wakes a stopped machine.

Three samples a round, interleaved so that a noisy neighbour disturbs all alike: the first byte from a sleeping app, the
first byte from the same app awake, and the first byte from the same program started bare on this machine. Client times
run from the end of the TLS handshake. The share is asleep minus bare; nothing of our own road is subtracted.
"""

from __future__ import annotations

import time

from benchmarks.apps import BODY, bare_busybox, deploy_busybox
from benchmarks.figures import Figure, figure, percentile
from pantala.testing.box import BoxRig

ROUNDS = 30
SETTLED_AFTER_S = 0.7
"""A stopped machine is prepared for its next start; wakes in real life come later than this."""


def measure(box: BoxRig) -> list[Figure]:
    folder = deploy_busybox(box, "bench-wake")
    url = "https://bench-wake.apps.pantala.test/index.html"
    machine = box.machines("bench-wake")[0]["id"]
    asleep: list[float] = []
    awake: list[float] = []
    bare: list[float] = []
    _first_byte_ms(box, url)
    for _ in range(ROUNDS):
        box.pantala("machine", "stop", machine, "-a", "bench-wake")
        _await_stopped(box)
        time.sleep(SETTLED_AFTER_S)
        asleep.append(_first_byte_ms(box, url))
        awake.append(_first_byte_ms(box, url))
        with bare_busybox(folder) as took_s:
            bare.append(took_s * 1000)
    share = [with_platform - alone for with_platform, alone in zip(asleep, bare, strict=True)]
    figures: list[Figure] = []
    for percent in (50, 99):
        baseline = percentile(bare, percent)
        figures += [
            figure(f"wake.share.p{percent}", percentile(share, percent), "ms", n=ROUNDS, baseline=baseline,
                   meaning="platform's share of waking a stopped machine, beside a bare spawn"),
            figure(f"wake.first_byte.p{percent}", percentile(asleep, percent), "ms", n=ROUNDS, baseline=baseline,
                   meaning="first byte from a sleeping app, beside a bare spawn"),
            figure(f"wake.awake.p{percent}", percentile(awake, percent), "ms", n=ROUNDS,
                   meaning="first byte from the same app awake"),
        ]  # fmt: skip
    return figures


def _first_byte_ms(box: BoxRig, url: str) -> float:
    said = box.at("curl", "-sS", "--fail", "--max-time", "40", "-w", "\n%{time_appconnect} %{time_starttransfer}", url)
    body, _, times = said.stdout.rpartition("\n")
    if body.strip() != BODY:
        raise AssertionError(f"{url} answered {body[:200]!r}")
    connected, first_byte = (float(word) for word in times.split())
    return (first_byte - connected) * 1000


def _await_stopped(box: BoxRig) -> None:
    deadline = time.monotonic() + 20
    while (state := box.machines("bench-wake")[0]["state"]) != "stopped":
        if time.monotonic() > deadline:
            raise TimeoutError(f"the machine is {state}, not stopped, 20 s after `machine stop`")
        time.sleep(0.1)
