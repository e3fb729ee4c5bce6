"""Boxes of one machine share whether it forwards: each needs it for as long as it runs, in whatever order they end."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.root]

# In a network namespace of its own the setting is its own too; so is /run in a mount namespace.
ALONE = ["unshare", "--net", "--mount", "--propagation", "private"]
STORY = """
import subprocess
from pathlib import Path

subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)

from pantala.box import forwarding


def uplink(change, instance):
    kind = ["type", "veth", "peer", "name", f"router{instance}"] if change == "add" else []
    command = ["ip", "link", change, f"pnt{instance}-uplink", *kind]
    subprocess.run(command, check=change == "add", stderr=subprocess.DEVNULL)


def begin(instance):
    uplink("add", instance)
    forwarding.hold()


def end(instance):
    uplink("del", instance)
    forwarding.release()


def seen():
    return forwarding.SETTING.read_text().strip()


forwarding.SETTING.write_text("0")
told = []
for step, instance in [(begin, ""), (begin, 9), (end, ""), (end, ""), (begin, 3), (end, 9), (end, 3), (end, 3)]:
    step(instance)
    told.append(seen())
forwarding.SETTING.write_text("1")
begin(2)
end(2)
told.append(seen())
print(*told, *Path("/run/pantala").iterdir())
"""


def test_the_first_box_to_end_leaves_the_others_their_way_out() -> None:
    done = subprocess.run(
        [*ALONE, sys.executable, "-c", STORY], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    assert done.stdout.split() == ["1", "1", "1", "1", "1", "1", "0", "0", "1"]
