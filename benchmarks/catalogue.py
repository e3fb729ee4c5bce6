"""How soon a change of one host is applied on others, beside bare core NATS; and catching up with a whole cluster.

A hub and two leaves of nats-server, one process per host, on loopback: the platform's share without distances.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import anyio

from benchmarks.figures import Figure, figure, percentile
from pantala.catalogue import Publisher, Replica, View
from pantala.catalogue.store import CatalogueStore
from pantala.kit import binaries, bus_nats
from pantala.kit.clock import SystemClock
from pantala.kit.rows import Row
from pantala.kit.sealing import Signer
from pantala.testing.bus import MemoryBus
from pantala.testing.ports import free_port

CHANGES = 500
EVERY_S = 0.02
READERS = ("n2", "n3")
OWNERS, ROWS_EACH = 300, 333
BARE = "bench.bare"


def measure() -> list[Figure]:
    applied, bare = _changes()
    figures = [
        figure(f"catalogue.applied_p{percent}", percentile(applied, percent), "ms", n=len(applied),
               baseline=percentile(bare, percent), meaning="put by one host, shown on others; beside core NATS")
        for percent in (50, 99)
    ]  # fmt: skip
    took_s = anyio.run(_catch_up)
    rows = OWNERS * ROWS_EACH
    return [
        *figures,
        figure("catalogue.catch_up", took_s, "s", n=1, meaning=f"an empty reader reads {rows} rows of {OWNERS} owners"),
    ]


# -- changes ---------------------------------------------------------------------------------------------------------


def _changes() -> tuple[list[float], list[float]]:
    """Milliseconds from `put` to each reader's view, and of as many bare messages of the same size."""
    with tempfile.TemporaryDirectory(prefix="pantala-bench-") as scratch, _three_servers(Path(scratch)) as urls:
        signer = Signer(b"b" * 32)
        with ExitStack() as children:
            readers = [
                children.enter_context(_reader(Path(scratch) / name, url, signer.verify_key))
                for name, url in zip(READERS, urls[1:], strict=True)
            ]
            sent = anyio.run(_write, Path(scratch) / "owner", urls[0], signer)
            seen = [json.loads(reader.communicate(timeout=60)[0]) for reader in readers]
    applied, bare = [], []
    for one in seen:
        for key, at in sent.items():
            (bare if key.startswith("bare") else applied).append((one[key] - at) / 1e6)
    return applied, bare


async def _write(folder: Path, url: str, signer: Signer) -> dict[str, int]:
    sent: dict[str, int] = {}
    async with bus_nats.connect(url, user="bench", password="bench") as bus, CatalogueStore.open(folder) as store:
        publisher = Publisher(store, View(control="control"), bus, signer, SystemClock(), owner="n1", epoch=1)
        await publisher.open()
        await publisher.replace_all([_machine("m0", "n1", 0)])
        async with anyio.create_task_group() as tasks:
            await tasks.start(publisher.run)
            await anyio.sleep(3)  # the readers are there and have caught up
            for number in range(1, CHANGES + 1):
                sent[str(number)] = time.monotonic_ns()
                await publisher.put([_machine("m0", "n1", number)])
                await anyio.sleep(EVERY_S)
                sent[f"bare{number}"] = time.monotonic_ns()
                await bus.publish(BARE, json.dumps({"number": number, "pad": "x" * 700}).encode())
                await anyio.sleep(EVERY_S)
            await bus.publish(BARE, b'{"number": 0}')
            tasks.cancel_scope.cancel()
    return sent


@contextmanager
def _reader(folder: Path, url: str, key: str) -> Generator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "benchmarks.catalogue", str(folder), url, key]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.wait()


async def read(folder: Path, url: str, key: str) -> None:
    """A reader process: prints when it saw what, once the writer says that it is done."""
    seen: dict[str, int] = {}
    done = anyio.Event()

    async def on_bare(subject: str, payload: bytes) -> None:
        del subject
        number = json.loads(payload)["number"]
        seen[f"bare{number}"] = time.monotonic_ns()
        if number == 0:
            done.set()

    async with bus_nats.connect(url, user="bench", password="bench") as bus, CatalogueStore.open(folder) as store:
        view = View(control="control")
        view.listen(
            lambda revision, rows: seen.update(
                {str((row.value or {})["ready_at_ms"]): time.monotonic_ns() for row in rows}
            )
        )
        replica = Replica(store, view, bus, SystemClock(), {"n1": key}.get)
        async with anyio.create_task_group() as tasks:
            await tasks.start(replica.run)
            await bus.serve(BARE, on_bare)
            with anyio.move_on_after(120):
                await done.wait()
            tasks.cancel_scope.cancel()
    sys.stdout.write(json.dumps(seen))


# -- a whole cluster -------------------------------------------------------------------------------------------------


async def _catch_up() -> float:
    """The first bound of the design: 300 hosts, 100,000 machines."""
    bus, clock, dice = MemoryBus(), SystemClock(), random.Random(1)
    signers = {f"node-{number}": Signer(dice.randbytes(32)) for number in range(OWNERS)}
    with tempfile.TemporaryDirectory(prefix="pantala-bench-") as scratch:
        async with CatalogueStore.open(Path(scratch) / "owners.db") as store:
            publishers: list[Publisher] = []
            for name, signer in signers.items():
                publisher = Publisher(store, View(control="control"), bus, signer, clock, owner=name, epoch=1)
                await publisher.replace_all([_machine(f"{name}-{row}", name, 1) for row in range(ROWS_EACH)])
                await bus.serve(f"pantala.cat.{name}.fetch", publisher.answer)
                publishers.append(publisher)
            async with CatalogueStore.open(Path(scratch) / "reader.db") as mine:
                view = View(control="control")
                keys = {name: signer.verify_key for name, signer in signers.items()}
                replica = Replica(mine, view, bus, clock, keys.get)
                begun = time.monotonic()
                for name in signers:
                    if not await replica.catch_up(name):
                        raise AssertionError(f"{name} could not be read")
                took_s = time.monotonic() - begun
                if len(view.all()) != OWNERS * ROWS_EACH:
                    raise AssertionError(f"{len(view.all())} rows are shown")
    return took_s


def _machine(machine: str, node: str, number: int) -> Row:
    value = {
        "id": machine, "app": "bench", "region": "iad", "node": node, "instance_id": "01JD0000000000000000000000",
        "generation": 1, "state": "started", "ip4": "172.19.0.2", "ip6": "fdaa:0:1:a7b:7d:f066:b83b:2",
        "services": ["0123456789abcdef"], "passing": [True], "group": "app", "ready_at_ms": number,
    }  # fmt: skip
    return Row("routes", f"m/{machine}", value)


# -- nats-server -----------------------------------------------------------------------------------------------------


@contextmanager
def _three_servers(folder: Path) -> Generator[list[str]]:
    """A hub and two leaves; their URLs."""
    hub, leaf_port = free_port(), free_port()
    user = 'authorization { user: "bench", password: "bench" }\n'
    texts = [f'listen: "127.0.0.1:{hub}"\n{user}leafnodes {{ listen: "127.0.0.1:{leaf_port}" }}\n']
    ports = [hub]
    for _ in READERS:
        ports.append(free_port())
        remote = f'leafnodes {{ remotes: [ {{ url: "nats-leaf://bench:bench@127.0.0.1:{leaf_port}" }} ] }}\n'
        texts.append(f'listen: "127.0.0.1:{ports[-1]}"\n{user}{remote}')
    children: list[subprocess.Popen[bytes]] = []
    try:
        for number, text in enumerate(texts):
            path = folder / f"nats-{number}.conf"
            path.write_text(text)
            children.append(
                subprocess.Popen([str(binaries.find("nats-server")), "-c", str(path)], stderr=subprocess.DEVNULL)
            )
        yield [f"nats://127.0.0.1:{port}" for port in ports]
    finally:
        for child in children:
            child.kill()
            child.wait()


if __name__ == "__main__":
    anyio.run(read, Path(sys.argv[1]), sys.argv[2], sys.argv[3])
