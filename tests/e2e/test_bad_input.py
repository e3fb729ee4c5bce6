"""Bad input through the CLI: one clear message that names the field and the remedy, a failure, and nothing changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from probe_rig import FLY_TOML, api_of, deploy_probe, image_of, stranger_token

from pantala.testing.box import BoxRig, Done

pytestmark = pytest.mark.root

APP = "steadfast"
UNKNOWN = "00000000000000"
IMAGES: dict[str, str] = {}
"""What the app runs, known once it is deployed."""


@pytest.fixture(scope="module")
def project(box: BoxRig, tmp_path_factory: pytest.TempPathFactory) -> Generator[Path]:
    source = deploy_probe(box, tmp_path_factory.mktemp("steadfast"), APP)
    IMAGES[APP] = image_of(box, APP)
    yield source
    box.pantala("apps", "destroy", APP, "--yes")


@pytest.fixture
def unchanged(box: BoxRig, project: Path) -> Generator[None]:
    """Apps and machines, their versions, releases and secrets are after the test as before."""
    before = present(box)
    yield
    assert present(box) == before


def present(box: BoxRig) -> Any:
    with api_of(box) as api:
        apps = sorted(app["name"] for app in api.get("/v1/apps?org_slug=tests").json()["apps"])
        found = api.get(f"/v1/apps/{APP}/machines").json()
        machines = {m["id"]: (m["state"], m["config"]["image"], m["config"]["guest"]) for m in found}
        releases = [release["version"] for release in api.get(f"/v1/apps/{APP}/releases").json()["releases"]]
        return apps, machines, releases, api.get(f"/v1/apps/{APP}/secrets").json()["secrets"]


def refused(done: Done, *wanted: str) -> None:
    """Failed with one error that says all of `wanted`, and no trace of a program's insides."""
    assert done.code != 0, done.output
    assert len(re.findall(r"^Error: ", done.stderr, flags=re.MULTILINE)) == 1, done.stderr
    for text in wanted:
        assert text in done.stderr, done.stderr
    assert "Traceback" not in done.output
    assert done.stdout == ""


def edited(folder: Path, old: str, new: str) -> Path:
    text = FLY_TOML.format(app=APP)
    assert old in text
    path = folder / "fly.toml"
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.parametrize(
    ("edit", "wanted"),
    [
        (
            ("internal_port = 8080", "internal_port = 70000"),
            ("fly.toml:5: http_service.internal_port: 70000", "between 1 and 65535"),
        ),
        (
            ("internal_port = 8080", 'internal_port = "web"'),
            ("http_service.internal_port: must be a whole number, not 'web'",),
        ),
        (("force_https = true", "force_https = 1"), ("http_service.force_https: must be true or false",)),
        (("internal_port = 8080", "internal_port = = 8080"), ("fly.toml: row 5 column 19",)),
    ],
    ids=["port out of range", "wrong type", "wrong truth value", "no TOML"],
)
@pytest.mark.usefixtures("unchanged")
def test_a_wrong_fly_toml_names_line_and_field(
    box: BoxRig, project: Path, tmp_path: Path, edit: tuple[str, str], wanted: tuple[str, ...]
) -> None:
    path = edited(tmp_path, *edit)
    refused(box.pantala("deploy", "-c", str(path), cwd=project, check=False), *wanted)
    validated = box.pantala("config", "validate", "-c", str(path), cwd=project, check=False)
    assert validated.code != 0
    assert all(text in validated.stderr for text in wanted)


Command = Callable[[str], tuple[str, ...]]
REFUSALS: dict[str, tuple[Command, tuple[str, ...]]] = {
    "name taken": (lambda _: ("apps", "create", APP), ("already been taken", "choose another name")),
    "wrong name": (lambda _: ("apps", "create", "Not_A_Name"), ("app_name: 'Not_A_Name'", "lower-case")),
    "image not found": (
        lambda _: ("machine", "run", f"registry.pantala.test/{APP}:no-such-tag", "-a", APP),
        ("config.image: image not found", "check its name and tag"),
    ),
    "image of no registry": (
        lambda _: ("machine", "run", "no-such-image", "-a", APP),
        ("config.image:", "registry.pantala.test/"),
    ),
    "memory of no size": (
        lambda image: ("machine", "run", image, "-a", APP, "--vm-memory", "100"),
        ("config.guest.memory_mb:", "100MiB", "256 to 2048"),
    ),
    "port out of range": (
        lambda image: ("machine", "run", image, "-a", APP, "-p", "99999:8080/http"),
        ("ports[0].port: 99999", "1 to 65535"),
    ),
    "unknown region": (
        lambda image: ("machine", "run", image, "-a", APP, "-r", "xyz"),
        ("region: there is no region 'xyz'", "the nearest that exist are"),
    ),
    "region without a host": (
        lambda image: ("machine", "run", image, "-a", APP, "-r", "lhr"),
        ("no host can take this machine", "lhr", "ask for a region"),
    ),
    "unknown app": (lambda _: ("machine", "list", "-a", "no-such-app"), ("app not found: no-such-app",)),
    "stop of an unknown machine": (
        lambda _: ("machine", "stop", UNKNOWN, "-a", APP),
        (f"machine {UNKNOWN} not found", f"pantala machine list -a {APP}"),
    ),
    "destruction of an unknown machine": (
        lambda _: ("machine", "destroy", UNKNOWN, "-a", APP, "--yes"),
        (f"machine {UNKNOWN} not found", f"pantala machine list -a {APP}"),
    ),
    "status of an unknown machine": (
        lambda _: ("machine", "status", UNKNOWN, "-a", APP),
        (f"machine {UNKNOWN} not found", f"pantala machine list -a {APP}"),
    ),
    "missing --config": (
        lambda _: ("deploy", "-c", "/nowhere/fly.toml"),
        ("--config: there is no /nowhere/fly.toml", "give the path"),
    ),
    "secret without a value": (lambda _: ("secrets", "set", "LONELY", "-a", APP), ("NAME=VALUE",)),
}


@pytest.mark.usefixtures("project", "unchanged")
@pytest.mark.parametrize("what", REFUSALS)
def test_a_wrong_command_is_refused_with_a_remedy(box: BoxRig, what: str) -> None:
    command, wanted = REFUSALS[what]
    refused(box.pantala(*command(IMAGES[APP]), check=False), *wanted)


@pytest.mark.usefixtures("unchanged")
def test_a_guest_that_no_host_can_hold_leaves_the_app_as_it_was(box: BoxRig, project: Path, tmp_path: Path) -> None:
    path = tmp_path / "fly.toml"
    path.write_text(FLY_TOML.format(app=APP) + '\n[[vm]]\n  size = "performance-16x"\n  memory = "128gb"\n')
    done = box.pantala("deploy", "-c", str(path), "--image", IMAGES[APP], cwd=project, check=False)
    assert done.code != 0
    assert "could not reserve resource for machine: 131072 MiB of memory needed" in done.stderr
    assert done.stderr.count("could not reserve") == 1
    assert "nothing was changed" in done.stderr
    assert "the previous version still serves" in done.stderr


@pytest.mark.usefixtures("unchanged")
def test_a_wrong_token_and_another_orgs_app_are_refused(box: BoxRig, project: Path) -> None:
    commands = (("machine", "list", "-a", APP), ("secrets", "set", "A=b", "-a", APP), ("apps", "destroy", APP, "--yes"))
    for command in (*commands, ("apps", "list"), ("status", "-a", APP), ("deploy",)):
        refused(run_as(box, "nonsense", *command, cwd=project), "the token is not valid", "log in again")
    stranger = stranger_token(box)
    for command in commands:
        refused(run_as(box, stranger, *command, cwd=project), f"app not found: {APP}")
    refused(run_as(box, stranger, "status", cwd=project), f"the app {APP} belongs to somebody else")
    refused(run_as(box, stranger, "deploy", cwd=project), f"the app {APP} belongs to somebody else")
    refused(run_as(box, stranger, "apps", "create", "squatter", "-o", "tests", cwd=project), "organization not found")


def run_as(box: BoxRig, token: str, *command: str, cwd: Path) -> Done:
    kept = box.environment
    box.environment = kept | {"FLY_API_TOKEN": token}
    try:
        return box.pantala(*command, cwd=cwd, check=False)
    finally:
        box.environment = kept
