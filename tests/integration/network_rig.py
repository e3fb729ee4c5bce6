"""The network of a box without its daemons: namespaces, BIRDs, relay, and stand-ins for the proxies of its edges.

`NetworkRig` drives a child process (this file, run as a program), because the names of a box follow from a variable
that is read at import. An edge's stand-in answers on the edge address with its node's name, and leaves as the proxy
does: `/healthz` says so first, then it accepts no more.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shutil
import signal
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio

from pantala.testing.poll import until_sync

INSTANCE = os.environ.get("PANTALA_NETWORK_TESTS_INSTANCE", "7")
"""Not the developer's own box, nor that of another test."""
EDGE = f"100.{96 + int(INSTANCE)}.255.1"


class NetworkRig:
    def __init__(self, work: Path) -> None:
        environment = os.environ | {"PANTALA_BOX_INSTANCE": INSTANCE}
        self._child = subprocess.Popen(
            [sys.executable, __file__, str(work)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Raises AssertionError with the child's words."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps([method, arguments, options]) + "\n")
        self._child.stdin.flush()
        answer = json.loads(self._child.stdout.readline() or '{"error": "the child is gone"}')
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def run(self, netns: str, *command: str, check: bool = True, timeout_s: float = 60) -> str:
        inside = ["nsenter", f"--net=/run/netns/pnt{INSTANCE}-{netns}", "--"]
        done = subprocess.run([*inside, *command], capture_output=True, text=True, timeout=timeout_s, check=False)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def settle(self, regions: list[str]) -> None:
        """Until every region is served by its own edge."""
        for region in regions:
            own = f"{region}-1"
            until_sync(lambda region=region: self.answered_by(region), lambda node, own=own: node == own, within_s=15)

    def answered_by(self, region: str, *, port: int = 80) -> str:
        """The node that answers a client of the region; empty when none does."""
        url = f"http://{EDGE}:{port}/"
        return self.run(f"at-{region}", "curl", "-s", "--max-time", "2", url, check=False).strip()

    def close(self) -> None:
        """Repeats safely."""
        if self._child.returncode is not None:
            return
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.close()
        self._child.wait(timeout=60)
        self._child.stdout.close()


@contextmanager
def network_rig(work: Path, **options: Any) -> Generator[NetworkRig]:
    """A box's network, up; gone again afterwards."""
    rig = NetworkRig(work)
    try:
        rig.call("up", **options)
        yield rig
    finally:
        rig.close()


class _Child:
    """What `call` calls, inside of the child."""

    def __init__(self, work: Path) -> None:
        from pantala.box import network, relay, routing
        from pantala.box.layout import RUN_NAME, Box, new_box

        self._network, self._relay, self._routing, self._new_box = network, relay, routing, new_box
        self._work, self._run_dir = work, Path("/run") / RUN_NAME
        self._box: Box | None = None
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        network.lower_network(None)  # what a killed run left

    @property
    def box(self) -> Any:
        assert self._box is not None, "call `up` first"
        return self._box

    def up(self, *, regions: list[str], serving: bool = True, **options: Any) -> None:
        state = self._work / "state"
        box = self._new_box(
            state=state, run=self._run_dir, cache=self._work, regions=regions, idle_window_s=60, tuning={}, **options
        )
        for folder in (box.state_dir, box.run_dir, box.logs_dir()):
            folder.mkdir(parents=True, exist_ok=True)
        self._box = box
        self._box = self._network.raise_network(box)
        for process in self._relay.plan_relay(box):
            self._start(process)
        if serving:
            for host in box.edges():
                self.start_edge(host.node)
            for process in self._routing.plan_routing(box):
                self._start(process)

    def start_edge(self, node: str) -> None:
        host = next(host for host in self.box.all_hosts() if host.node == node)
        serve = [sys.executable, __file__, "edge", node, EDGE, host.link.address, str(self.box.lame_duck_ms)]
        self._spawn(f"edge-{node}", host.link.netns, serve)

    def restart_edge(self, node: str) -> None:
        """The stand-in and its announcer anew, whichever of them has ended."""
        for name in (f"announcer-{node}", f"edge-{node}"):
            self.kill(name, int(signal.SIGKILL))
        self.start_edge(node)
        host = next(host for host in self.box.all_hosts() if host.node == node)
        self._start(self._routing.plan_edge(self.box, host)[1])

    def add_link(self, node: str, region: str) -> None:
        self._box, host = self._network.add_link(self.box, node, region=region)
        self.start_edge(node)
        for process in self._routing.plan_edge(self.box, host):
            self._start(process)

    def remove_link(self, node: str) -> None:
        for name in (f"announcer-{node}", f"bird-{node}", f"edge-{node}"):
            self.kill(name, int(signal.SIGKILL))
        self._box = self._network.remove_link(self.box, node)

    def kill(self, name: str, number: int) -> None:
        process = self._started[name]
        process.send_signal(number)
        if number == signal.SIGKILL:
            process.wait()

    def kill_host(self, node: str) -> None:
        """Everything that runs on it, at once."""
        for name in (f"bird-{node}", f"announcer-{node}", f"edge-{node}"):
            self.kill(name, int(signal.SIGKILL))

    def cut(self, name: str) -> None:
        self._network.cut(self.box, name)

    def heal(self, *names: str) -> None:
        self._network.heal_cuts(self.box, names)

    def loss(self, share: float) -> None:
        self._network.set_loss(self.box, share)

    def stats(self) -> dict[str, Any]:
        return self._relay.ask(self.box, "stats")

    def birdc(self, name: str, words: str) -> str:
        from pantala.box.announcer import Bird

        return Bird(str(self._routing.socket_of(self.box, name))).tell(words)

    def close(self) -> None:
        for process in self._started.values():
            process.kill()
            process.wait()
        self._network.lower_network(self._box)
        if self._box is not None:
            shutil.rmtree(self._run_dir)

    def _start(self, process: Any) -> None:
        from pantala.host.supervisor import is_ready

        self._spawn(process.name, process.netns, process.command)
        deadline = time.monotonic() + 10
        while not anyio.run(is_ready, process.ready):
            assert time.monotonic() < deadline, f"{process.name} is not ready"
            time.sleep(0.01)

    def _spawn(self, name: str, netns: str, command: list[str]) -> None:
        with (self.box.logs_dir() / f"{name}.log").open("ab") as log:
            full = ["nsenter", f"--net=/run/netns/{netns}", "--", *command]
            self._started[name] = subprocess.Popen(full, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


class _Quiet(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def server_bind(self) -> None:
        """Without asking a resolver for its own name, as the parent does."""
        socketserver.TCPServer.server_bind(self)


def edge(node: str, address: str, own: str, lame_duck_ms: int) -> None:
    """The stand-in for a proxy. Connections stay open while it leaves, as the proxy's do."""
    leaving = threading.Event()
    # Awaited by the main thread alone: a handler would run only once that thread wakes, and another may get the signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    class Answer(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            health = self.path == "/healthz"
            body = f"{node}\n".encode() * (20 if self.path == "/slow" else 1)
            self.send_response(503 if health and leaving.is_set() else 200)
            self.send_header("Content-Length", str(len(body)))
            if leaving.is_set():
                self.send_header("Connection", "close")
            self.end_headers()
            if self.path == "/slow":
                for at in range(0, len(body), 6):
                    self.wfile.write(body[at : at + 6])
                    time.sleep(0.1)
            else:
                self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    public, admin = _Quiet((address, 80), Answer), _Quiet((own, 9180), Answer)
    for server in (public, admin):
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    signal.sigwait({signal.SIGTERM})
    leaving.set()
    time.sleep(lame_duck_ms / 1000)
    public.shutdown()
    public.socket.close()
    time.sleep(3)


def main() -> None:
    if sys.argv[1] == "edge":
        edge(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]))
        return
    child = _Child(Path(sys.argv[1]))
    try:
        for line in sys.stdin:
            method, arguments, options = json.loads(line)
            try:
                answer = {"result": getattr(child, method)(*arguments, **options)}
            except Exception as error:  # noqa: BLE001 - told to the test
                answer = {"error": f"{method}: {error!r}"}
            print(json.dumps(answer), flush=True)
    finally:
        with contextlib.suppress(KeyboardInterrupt):
            child.close()


if __name__ == "__main__":
    main()
