"""`pantala down` and `up` again on the same state: what was there is there, what ran runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from probe_rig import GREETING, asked, deploy_probe, image_of

from pantala.testing.box import BoxRig, running_box
from pantala.testing.poll import until_sync

pytestmark = pytest.mark.root

APP = "comeback"
INSTANCE = 8
"""Of a box beside the one that the other tests share."""


def kept(box: BoxRig) -> Any:
    return (
        [app["name"] for app in box.pantala_json("apps", "list")],
        box.pantala_json("releases", "-a", APP),
        box.pantala_json("secrets", "list", "-a", APP),
        {machine["id"]: machine["instance_id"] for machine in box.machines(APP)},
    )


def test_apps_releases_secrets_and_images_outlive_the_box(tmp_path: Path) -> None:
    with running_box(tmp_path / "box", idle_window_s=60.0, instance=INSTANCE) as box:
        source = deploy_probe(box, tmp_path, APP)
        box.pantala("secrets", "set", "KEPT=through-the-night", "-a", APP)
        before, image = kept(box), image_of(box, APP)
        stopped = box.machines(APP)[0]["id"]
        box.pantala("machine", "stop", stopped, "-a", APP)

        box.pantala("down", "--state", str(box.state), timeout_s=120)
        box.pantala("up", "--state", str(box.state), "--regions", "iad", "--idle-window", "60", "--org", "tests",
                    timeout_s=400)  # fmt: skip

        def states() -> dict[str, str]:
            return {machine["id"]: machine["state"] for machine in box.machines(APP)}

        wanted = dict.fromkeys(before[3], "started") | {stopped: "stopped"}
        until_sync(states, lambda seen: seen == wanted, within_s=60, every_s=0.5)
        assert kept(box) == before
        until_sync(
            lambda: box.at("curl", "-sS", "--max-time", "20", f"https://{APP}.apps.pantala.test/", check=False).stdout,
            lambda text: text == GREETING,
            within_s=30,
        )
        assert asked(box, APP, "/env?name=KEPT") == "through-the-night"
        box.pantala("deploy", "--image", image, cwd=source)  # the image is in the registry, and a release follows on
        assert asked(box, APP, "/") == GREETING
        assert len(box.pantala_json("releases", "-a", APP)) == len(before[1]) + 1
