"""What a tenant may see: its own secret and nothing of the others, the host or the platform. Tried from inside."""

from __future__ import annotations

import base64
import errno
import os
import secrets
import stat
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from probe_rig import GREETING, admin_token, api_of, asked, deploy_probe, image_of, stranger_token

from pantala.testing.box import BoxRig

pytestmark = pytest.mark.root

APP = "keeper"
CHUNK = 16 << 20
DANGEROUS = {"sys_ptrace": 19, "sys_admin": 21, "sys_module": 16, "net_admin": 12, "mknod": 27}


@pytest.fixture(scope="module")
def keeper(box: BoxRig, tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    deploy_probe(box, tmp_path_factory.mktemp("keeper"), APP)
    yield APP
    box.pantala("apps", "destroy", APP, "--yes")


def test_a_secret_is_seen_by_its_app_and_nowhere_else(box: BoxRig, keeper: str) -> None:
    value = f"seen-{secrets.token_hex(16)}"
    told = box.pantala("secrets", "set", f"PROBE_SECRET={value}", "-a", keeper)
    assert asked(box, keeper, "/env?name=PROBE_SECRET") == value
    needles = [value.encode(), base64.b64encode(value.encode()).rstrip(b"=")[:-1]]
    shown = [told.output, box.pantala("logs", "-a", keeper, "--no-tail").output, box.logs(lines=10_000)]
    with api_of(box) as api:
        for path in ("", "/machines", "/secrets", "/releases", "/logs"):
            answer = api.get(f"/v1/apps/{keeper}{path}")
            assert answer.status_code == 200, (path, answer.text)
            shown.append(answer.text)
        for machine in api.get(f"/v1/apps/{keeper}/machines").json():
            for path in ("", "/events", "/metadata"):
                shown.append(api.get(f"/v1/apps/{keeper}/machines/{machine['id']}{path}").text)
    assert [text[:200] for text in shown if any(needle.decode() in text for needle in needles)] == []
    planted = box.work / "planted"
    planted.write_bytes(b"\0" + value.encode())
    assert found_in_files(box, needles) == [str(planted)]  # so the search finds what there is
    planted.unlink()
    assert [str(path) for path in process_files_of_the_host() if holds(path, needles)] == []
    machine_files = [path for path in process_files() if holds(path, needles)]
    assert machine_files, "the search finds the value where it must be: in the app's own environment"


def test_somebody_elses_app_does_not_exist_and_a_wrong_token_opens_nothing(box: BoxRig, keeper: str) -> None:
    machine_id = box.machines(keeper)[0]["id"]
    with api_of(box, stranger_token(box)) as stranger:
        assert stranger.get(f"/v1/apps/{keeper}").status_code == 403  # names are public
        for method, path in (
            ("GET", "/machines"),
            ("GET", f"/machines/{machine_id}"),
            ("POST", f"/machines/{machine_id}/stop"),
            ("DELETE", f"/machines/{machine_id}?force=true"),
            ("GET", "/secrets"),
            ("GET", "/logs"),
            ("GET", "/releases"),
            ("DELETE", ""),
        ):
            answer = stranger.request(method, f"/v1/apps/{keeper}{path}")
            assert answer.status_code == 404, (method, path, answer.text)
        assert stranger.post(f"/v1/apps/{keeper}/secrets", json={"values": {"A": "b"}}).status_code == 404
        assert stranger.get("/v1/apps?org_slug=tests").status_code == 404
    for wrong in ("nonsense", admin_token(box)[:-1] + "x"):
        with api_of(box, wrong) as nobody:
            for path in ("/v1/apps?org_slug=tests", f"/v1/apps/{keeper}", f"/v1/apps/{keeper}/machines"):
                assert nobody.get(path).status_code == 401
    assert {m["state"] for m in box.machines(keeper)} == {"started"}


def test_a_machine_is_confined_as_it_sees_itself(box: BoxRig, keeper: str) -> None:
    status = dict(
        line.split(":\t", 1) for line in asked(box, keeper, "/proc?name=status").splitlines() if ":\t" in line
    )
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    bounding = int(status["CapBnd"], 16)
    held = {name for name, bit in DANGEROUS.items() if bounding >> bit & 1}
    assert held == set()
    assert bounding == int(status["CapEff"], 16) == int(status["CapPrm"], 16)
    first, outside, count = (int(word) for word in asked(box, keeper, "/proc?name=uid_map").split())
    assert first == 0
    assert outside >= 65_536
    assert count <= 65_536
    assert (int(status["Tgid"])) < 100  # a pid namespace of its own
    mounts = asked(box, keeper, "/proc?name=mountinfo")
    assert str(box.state) not in " ".join(line.split(" - ")[0] for line in mounts.splitlines())


def test_a_machine_reaches_neither_metadata_nor_host_nor_other_machines(box: BoxRig, keeper: str) -> None:
    box.pantala("apps", "create", "neighbour")
    image = image_of(box, keeper)
    machine_id = box.pantala("machine", "run", image, "-a", "neighbour", "-p", "443:8080/http+tls").stdout.strip()
    assert asked(box, "neighbour", "/") == GREETING
    (other,) = addresses(box, "neighbour")
    assert other not in addresses(box, keeper)
    instance = int(os.environ["PANTALA_BOX_INSTANCE"])
    host, router = f"100.{96 + instance}.1.2", f"100.{96 + instance}.1.1"
    targets = [
        ("169.254.169.254", 80),
        ("169.254.170.2", 80),
        *((host, port) for port in (22, 443, 4222, 4280, 5000)),
        (router, 22),
        (router, 4280),
        (other, 8080),
    ]
    for target, port in targets:
        assert asked(box, keeper, f"/reach?host={target}&port={port}") not in {"open", "refused"}, (target, port)
    assert asked(box, keeper, "/reach?host=127.0.0.1&port=8080") == "open"
    box.pantala("machine", "destroy", machine_id, "-a", "neighbour", "--force")
    box.pantala("apps", "destroy", "neighbour", "--yes")


# -- where a value could lie -----------------------------------------------------------------------------------------


def found_in_files(box: BoxRig, needles: list[bytes]) -> list[str]:
    """State with its databases, run directory, settings, logs, images and the CLI's own folder."""
    run = Path(f"/run/pantala/box{os.environ['PANTALA_BOX_INSTANCE']}")
    assert run.is_dir()
    found: list[str] = []
    for root in (box.work, run):
        for folder, _, names in os.walk(root):
            found += [str(path) for name in names if holds_data(path := Path(folder, name), needles)]
    return found


def holds_data(path: Path, needles: list[bytes]) -> bool:
    """Reads the file's data and leaves its holes: the disks of machines are large and almost empty."""
    if not stat.S_ISREG(path.lstat().st_mode):
        return False
    overlap = max(map(len, needles)) - 1
    with path.open("rb", buffering=0) as file:
        at, end, kept = 0, os.fstat(file.fileno()).st_size, b""
        while at < end:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return False  # nothing but a hole is left
                raise
            hole = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            text = kept + os.pread(file.fileno(), min(hole - at, CHUNK), at)
            if any(needle in text for needle in needles):
                return True
            at += len(text) - len(kept)
            kept = text[-overlap:]
    return False


def process_files() -> Iterator[Path]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            yield from (entry / "environ", entry / "cmdline")


def process_files_of_the_host() -> Iterator[Path]:
    """Of processes in the pid namespace that the test itself is in."""
    own = Path("/proc/self/ns/pid").readlink()
    for path in process_files():
        try:
            namespace = (path.parent / "ns" / "pid").readlink()
        except OSError:
            continue
        if namespace == own:
            yield path


def holds(path: Path, needles: list[bytes]) -> bool:
    try:
        text = path.read_bytes()
    except OSError:
        return False  # the process has ended
    return any(needle in text for needle in needles)


def addresses(box: BoxRig, app: str) -> set[str]:
    """IPv4 addresses that a machine says it has; which machine answers is the proxy's choice."""
    table = asked(box, app, "/proc?name=net/fib_trie").splitlines()
    local = {table[at - 1].rpartition(" ")[2] for at, line in enumerate(table) if "/32 host LOCAL" in line}
    return {address for address in local if not address.startswith("127.")}
