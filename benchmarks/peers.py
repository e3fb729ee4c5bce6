"""The proxies that ours is measured beside, each as its documentation would set it up for the same job: one core, TLS
with a certificate of the same kind, HTTP/1.1 and HTTP/2 to clients, kept connections to one app, the client's address
in a header, no access log.

Debian's HAProxy, nginx and Caddy and a Traefik from its Go module, which `scripts/install --bench` brings. One that is
not there is named by `missing`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from pantala.kit import binaries
from pantala.testing.authority import Authority
from pantala.wire.feed import AppRow, DNSSettings, FeedRow, HostRow, Listener, MachineRow, ProxySettings, ServiceRow
from pantala.wire.machine import Concurrency, HTTPOptions, Port

NAME = "bench.test"
APP_ADDRESS, APP_PORT = "127.0.5.1", 28482
HTTP, HTTPS = 28480, 28443
PROXY_CORE, CLIENT_CORE = 0, 1
CONNECTIONS_MAX = 19_800


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """A running proxy."""

    name: str
    address: str
    pid: int


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What a configuration is written from."""

    address: str
    folder: Path
    chain_pem: str
    key_pem: str

    def file(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path


def missing() -> list[str]:
    return [name for name in ("haproxy", "nginx", "caddy", "traefik", "h2load") if find(name) is None]


def find(name: str) -> str | None:
    """On the PATH (where Debian puts daemons too), or in the checkout's cache."""
    built = Path(__file__).resolve().parents[1] / ".cache" / "bin" / name
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or (
        str(built) if built.exists() else None
    )


@contextmanager
def running(name: str, index: int, work: Path, authority: Authority) -> Generator[Peer]:
    with running_as(name, SETUPS[name], index, work, authority) as peer:
        yield peer


@contextmanager
def running_as(
    name: str, command_of: Callable[[Setup], list[str]], index: int, work: Path, authority: Authority
) -> Generator[Peer]:
    folder = work / name
    folder.mkdir(mode=0o755)
    issued = authority.issue(NAME)
    setup = Setup(address=f"127.0.4.{index}", folder=folder, chain_pem=issued.chain_pem, key_pem=issued.key_pem)
    with started(command_of(setup), core=PROXY_CORE, log=folder / "log") as pid:
        yield Peer(name=name, address=setup.address, pid=pid)


@contextmanager
def app(work: Path) -> Generator[int]:
    """The app behind all of them: nginx again, with 1 KiB at /, 1 MiB at /large, and uploads taken at /take."""
    folder = work / "app"
    folder.mkdir(mode=0o755)
    (folder / "large").write_bytes(os.urandom(1 << 20))
    (folder / "index").write_bytes(b"k" * 1024)
    text = f"""daemon off; pid {folder}/pid; error_log {folder}/error.log; user root; worker_processes 1;
events {{ worker_connections {CONNECTIONS_MAX}; }}
http {{
  access_log off; keepalive_requests 100000000; keepalive_timeout 300s; client_max_body_size 10m; sendfile on;
  server {{
    listen {APP_ADDRESS}:{APP_PORT} backlog=4096;
    location = / {{ root {folder}; try_files /index =404; }}
    location = /large {{ root {folder}; }}
    location = /take {{ client_body_buffer_size 2m; proxy_pass http://{APP_ADDRESS}:{APP_PORT}/;
      proxy_method GET; proxy_pass_request_body off; proxy_set_header Content-Length ""; }}
  }}
}}
"""
    path = folder / "nginx.conf"
    path.write_text(text)
    with started([find("nginx") or "nginx", "-c", str(path)], core=CLIENT_CORE, log=folder / "log") as pid:
        yield pid


@contextmanager
def started(command: list[str], *, core: int, log: Path) -> Generator[int]:
    environment = os.environ | {"GOMAXPROCS": "1", "HOME": str(log.parent)}
    with log.open("wb") as out:
        process = subprocess.Popen(["taskset", "-c", str(core), *command], stdout=out, stderr=out, env=environment)
    try:
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# -- configurations ----------------------------------------------------------------------------------------------


def _haproxy(setup: Setup) -> list[str]:
    bundle = setup.file("bundle.pem", setup.chain_pem + setup.key_pem)
    path = setup.file(
        "haproxy.cfg",
        f"""global
  nbthread 1
  maxconn {CONNECTIONS_MAX // 2}
  ssl-default-bind-options ssl-min-ver TLSv1.2
defaults
  mode http
  option forwardfor
  timeout connect 5s
  timeout client 300s
  timeout server 300s
  timeout http-keep-alive 300s
frontend edge
  bind {setup.address}:{HTTP}
  bind {setup.address}:{HTTPS} ssl crt {bundle} alpn h2,http/1.1
  use_backend app if {{ hdr(host),field(1,:) -i {NAME} }}
backend app
  http-reuse always
  server one {APP_ADDRESS}:{APP_PORT}
""",
    )
    return [find("haproxy") or "haproxy", "-db", "-f", str(path)]


def _nginx(setup: Setup) -> list[str]:
    chain, key = setup.file("chain.pem", setup.chain_pem), setup.file("key.pem", setup.key_pem)
    path = setup.file(
        "nginx.conf",
        f"""daemon off; pid {setup.folder}/pid; error_log {setup.folder}/error.log; user root; worker_processes 1;
events {{ worker_connections {CONNECTIONS_MAX}; }}
http {{
  access_log off; keepalive_requests 100000000; keepalive_timeout 300s; client_max_body_size 0;
  upstream app {{ server {APP_ADDRESS}:{APP_PORT}; keepalive 256; keepalive_requests 100000000; }}
  server {{
    listen {setup.address}:{HTTP} backlog=4096;
    listen {setup.address}:{HTTPS} ssl http2 backlog=4096;
    server_name {NAME};
    ssl_certificate {chain}; ssl_certificate_key {key};
    location / {{
      proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $host;
      proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for; proxy_set_header X-Forwarded-Proto $scheme;
      proxy_request_buffering off; proxy_buffering on;
    }}
  }}
}}
""",
    )
    return [find("nginx") or "nginx", "-c", str(path)]


def _caddy(setup: Setup) -> list[str]:
    chain, key = setup.file("chain.pem", setup.chain_pem), setup.file("key.pem", setup.key_pem)
    path = setup.file(
        "Caddyfile",
        f"""{{
  admin off
  auto_https off
  servers {{
    protocols h1 h2
  }}
}}
http://{NAME}:{HTTP} {{
  bind {setup.address}
  reverse_proxy {APP_ADDRESS}:{APP_PORT}
}}
https://{NAME}:{HTTPS} {{
  bind {setup.address}
  tls {chain} {key}
  reverse_proxy {APP_ADDRESS}:{APP_PORT}
}}
""",
    )
    return [find("caddy") or "caddy", "run", "--adapter", "caddyfile", "--config", str(path)]


def _traefik(setup: Setup) -> list[str]:
    chain, key = setup.file("chain.pem", setup.chain_pem), setup.file("key.pem", setup.key_pem)
    router = {"rule": f"Host(`{NAME}`)", "service": "app"}
    dynamic = {
        "http": {
            "routers": {"plain": router | {"entryPoints": ["web"]},
                        "tls": router | {"entryPoints": ["websecure"], "tls": {}}},
            "services": {"app": {"loadBalancer": {"servers": [{"url": f"http://{APP_ADDRESS}:{APP_PORT}"}]}}},
        },
        "tls": {"certificates": [{"certFile": str(chain), "keyFile": str(key)}]},
    }  # fmt: skip
    static = {
        "entryPoints": {"web": {"address": f"{setup.address}:{HTTP}"},
                        "websecure": {"address": f"{setup.address}:{HTTPS}"}},
        "providers": {"file": {"filename": str(setup.file("dynamic.json", json.dumps(dynamic)))}},
        "global": {"checkNewVersion": False, "sendAnonymousUsage": False},
        "log": {"level": "ERROR"},
    }  # fmt: skip
    # YAML reads JSON; Traefik goes by the name of the file.
    (setup.folder / "dynamic.json").rename(setup.folder / "dynamic.yaml")
    static["providers"] = {"file": {"filename": str(setup.folder / "dynamic.yaml")}}
    path = setup.file("static.yaml", json.dumps(static))
    return [find("traefik") or "traefik", f"--configFile={path}"]


def pantala(setup: Setup, **changes: Any) -> list[str]:
    """`changes`: fields of `ProxySettings`."""
    settings = ProxySettings(
        node="n1",
        region="iad",
        state_dir=str(setup.folder),
        agent_socket=str(setup.folder / "nobody.sock"),
        listeners=[
            Listener(address=setup.address, port=HTTP, tls=False),
            Listener(address=setup.address, port=HTTPS, tls=True),
        ],
        dns=DNSSettings(listen=[], public_listen=[], public_names={}, forward=[]),
        # One client and one app make all the load.
        connections_per_app_max=100_000,
        handshakes_per_range_per_s_max=0,
        handshakes_per_name_per_s_max=0,
    )
    settings = msgspec.structs.replace(settings, **changes)
    rows = [*routes("bench", NAME), certificate_row(setup)]
    setup.file("settings.json", msgspec.json.encode(settings).decode())
    setup.file("snapshot-0.json", msgspec.json.encode({"revision": 1, "rows": rows}).decode())
    return [str(binaries.find("pantala-proxy")), "--settings", str(setup.folder / "settings.json")]


def certificate_row(setup: Setup) -> FeedRow:
    value = {"names": [NAME], "chain_pem": setup.chain_pem, "key_pem": setup.key_pem, "not_after_ms": 1 << 60}
    return FeedRow(stream="certs", key=f"cert/{NAME}", value=value)


def routes(app_name: str, host: str, *, address: str = APP_ADDRESS, node: str = "n1") -> list[FeedRow]:
    """Rows of an app with one machine at the address; `n1` is the proxy's own host."""
    limits = Concurrency(type="requests", soft_limit=100_000, hard_limit=100_000)
    ports = [
        Port(port=HTTP, handlers=["http"]),
        Port(port=HTTPS, handlers=["tls", "http"], http_options=HTTPOptions()),
    ]
    service = ServiceRow(app=app_name, protocol="tcp", internal_port=APP_PORT, ports=ports, concurrency=limits)
    machine = MachineRow(
        id=f"m-{app_name}", app=app_name, region="iad", node=node, instance_id="01A", generation=1, state="started",
        ip4=address, ip6="fdaa::2", services=["d1"], passing=[True],
    )  # fmt: skip
    rows: list[tuple[str, msgspec.Struct]] = [
        (f"app/{app_name}", AppRow(app=app_name, org="personal", network=1)),
        (f"host/{host}", HostRow(app=app_name)),
        (f"svc/{app_name}/d1", service),
        (f"m/m-{app_name}", machine),
    ]
    return [FeedRow(stream="routes", key=key, value=msgspec.to_builtins(value)) for key, value in rows]


SETUPS: dict[str, Callable[[Setup], list[str]]] = {
    "pantala": pantala,
    "haproxy": _haproxy,
    "nginx": _nginx,
    "caddy": _caddy,
    "traefik": _traefik,
}
