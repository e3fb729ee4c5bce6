"""The examples of machines that live for one request or one job; `make soak` has full counts, and web with workers."""

from __future__ import annotations

from pathlib import Path

import pytest
from figures import tell
from jobs_rig import machine_per_job, machine_per_request, nothing_is_left, told

from pantala.testing.box import BoxRig

pytestmark = pytest.mark.root


def test_a_machine_for_each_request(box: BoxRig, tmp_path: Path) -> None:
    machine_per_request(box, tmp_path, app="one-each", requests=12)


def test_a_machine_for_each_job(box: BoxRig) -> None:
    tell(told(machine_per_job(box, app="jobs", jobs=16)))
    nothing_is_left(box)
