"""Deploys that do not end well: the version before serves on, and whoever deployed learns why."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from probe_rig import api_of, deploy_probe, steady_client

from pantala.testing.box import BoxRig
from pantala.testing.poll import until_sync

pytestmark = pytest.mark.root

REFUSED_WITHIN_S = 30


def test_an_app_whose_workers_die_at_import_is_refused_with_their_words(
    box: BoxRig, flask_source: Path, tmp_path: Path
) -> None:
    """Its server accepts connections all the while; who is sent there is not answered."""
    box.pantala("launch", "--now", "--yes", "--name", "no-database", cwd=flask_source)
    good = images(box, "no-database")
    source = flask_source / "app.py"
    source.write_text(source.read_text() + '\n\nraise SystemExit("no database")\n')
    begun = time.monotonic()
    done = box.pantala("deploy", cwd=flask_source, check=False)
    took_s = time.monotonic() - begun
    assert done.code != 0
    assert "the app accepts connections on port 8080 but does not answer HTTP" in done.stderr
    assert "the previous version still serves" in done.stderr
    assert "no database" in done.stderr.partition("last lines of its log")[2]
    assert took_s < REFUSED_WITHIN_S
    assert images(box, "no-database") == good
    with steady_client(box, tmp_path, "https://no-database.apps.pantala.test/") as client:
        client.await_more(20)
        assert client.answers().failures == []
    assert box.curl("https://no-database.apps.pantala.test/") == "Flask on Fly.io!"
    box.pantala("apps", "destroy", "no-database", "--yes")


# -- interrupted -------------------------------------------------------------------------------------------------------

SERVES = 'Server(("::", 8080), Handler).serve_forever()'
NEVER_SERVES = "__import__('time').sleep(3600)"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_a_deploy_that_ends_in_its_first_step_loses_no_request(
    box: BoxRig, tmp_path: Path, sent: signal.Signals
) -> None:
    name = f"ended-by-{sent.name.lower()}"
    source = deploy_probe(box, tmp_path, name)
    good = images(box, name)
    app = source / "app.py"
    serving = app.read_text()
    assert SERVES in serving
    app.write_text(serving.replace(SERVES, NEVER_SERVES))
    with steady_client(box, tmp_path, f"https://{name}.apps.pantala.test/") as client:
        with deploying(box, source) as process:
            until_sync(lambda: images(box, name), lambda now: now != good, within_s=60)
            assert releases(box, name)[0]["status"] == "running"
            process.send_signal(sent)
            _, said = process.communicate(timeout=30)
        client.await_more(20)
        if sent is signal.SIGINT:
            assert process.returncode == 130
            assert "its open step was put back; the previous version still serves" in said
            assert said.splitlines()[-1] == "Interrupted."
            assert images(box, name) == good
            until_sync(lambda: states(box, name), lambda now: now == {"started"}, within_s=30)
            assert releases(box, name)[0]["status"] == "interrupted"
        app.write_text(serving + "\n# another version\n")
        box.pantala("deploy", cwd=source)
        client.await_more(20)
        assert client.answers().failures == []
    assert [release["status"] for release in releases(box, name)] == ["complete", "interrupted", "complete"]
    assert len(set(images(box, name).values())) == 1
    assert set(images(box, name).values()).isdisjoint(good.values())
    box.pantala("apps", "destroy", name, "--yes")


@contextmanager
def deploying(box: BoxRig, source: Path) -> Generator[subprocess.Popen[str]]:
    """`pantala deploy` as a user runs it; ended in any case."""
    command = [sys.executable, "-m", "pantala.cli.main", "deploy"]
    process = subprocess.Popen(
        command, cwd=source, env=box.environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate(timeout=10)


def images(box: BoxRig, app: str) -> dict[str, str]:
    return {machine["id"]: machine["config"]["image"] for machine in box.machines(app)}


def states(box: BoxRig, app: str) -> set[str]:
    return {machine["state"] for machine in box.machines(app)}


def releases(box: BoxRig, app: str) -> list[dict[str, str]]:
    """Newest first."""
    with api_of(box) as api:
        return api.get(f"/v1/apps/{app}/releases").json()["releases"]
