"""What the platform adds when a request wakes a sleeping machine: one that is stopped, one that is suspended.

Sixteen machines sleep; each is woken by a request of its own, a moment after the last, then asked again awake, and then
the same program is started bare, so that a noisy neighbour disturbs all alike. Then they are put to sleep again. Times
run from the end of the TLS handshake to the first byte. A stopped machine's share is asleep minus bare: nothing of our
own road is subtracted. A suspended machine starts nothing, so its share is asleep minus awake.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import msgspec

from benchmarks.apps import BODY, bare_busybox, deploy_busybox
from benchmarks.client import Client, client_of
from benchmarks.figures import Figure, figure, percentile
from benchmarks.machines import Machines
from pantala.testing.box import BoxRig

APP = "bench-wake"
HOST = f"{APP}.apps.pantala.test"
MACHINES = 16
ROUNDS = 32
SLEEPS_S = {"stop": 2.0, "suspend": 0.5}
"""A stopped machine is prepared for its next start, sixteen of them here; wakes in real life come later than this."""
BETWEEN_S = 0.06
"""One request wakes one machine; what is written of the one before is over by then."""


class _Samples(msgspec.Struct):
    asleep: list[float] = []
    awake: list[float] = []
    bare: list[float] = []


def measure(box: BoxRig) -> list[Figure]:
    folder = deploy_busybox(box, APP)
    machines = Machines(box, APP)
    ids = machines.like(machines.list()[0], MACHINES)
    figures: list[Figure] = []
    with client_of(box) as client:
        for verb, state in (("stop", "stopped"), ("suspend", "suspended")):
            samples = _Samples()
            for machine in ids:
                machines.wait(machine, "started")
                client.first_byte_ms(HOST, machine, BODY)
            for _ in range(ROUNDS):
                with ThreadPoolExecutor(MACHINES) as pool:
                    list(pool.map(partial(machines.put_to_sleep, verb=verb, state=state), ids))
                time.sleep(SLEEPS_S[verb])
                for machine in ids:
                    _wake(client, machine, samples)
                    with bare_busybox(folder) as took_s:
                        samples.bare.append(took_s * 1000)
                    time.sleep(BETWEEN_S)
            figures += _figures(state, samples)
    return figures


def _wake(client: Client, machine: str, samples: _Samples) -> None:
    samples.asleep.append(client.first_byte_ms(HOST, machine, BODY))
    time.sleep(BETWEEN_S)  # what is written of the wake is no part of a request to a machine that is awake
    samples.awake.append(client.first_byte_ms(HOST, machine, BODY))


def _figures(state: str, samples: _Samples) -> list[Figure]:
    beside, what = (samples.bare, "a bare spawn") if state == "stopped" else (samples.awake, "the same machine awake")
    share = [asleep - other for asleep, other in zip(samples.asleep, beside, strict=True)]
    number = len(share)
    figures: list[Figure] = []
    for percent in (50, 99):
        baseline = percentile(beside, percent)
        figures += [
            figure(f"wake_{state}_share_p{percent}_ms", percentile(share, percent), "ms", n=number, baseline=baseline,
                   meaning=f"platform's share of waking a {state} machine, beside {what}"),
            figure(f"wake_{state}_first_byte_p{percent}_ms", percentile(samples.asleep, percent), "ms", n=number,
                   baseline=percentile(samples.awake, percent),
                   meaning=f"first byte from a {state} machine, beside the same machine awake"),
        ]  # fmt: skip
    return figures
