"""500 requests by 500 machines, 1,000 jobs by 1,000 machines, and nothing is left of them; 1,000 tasks of a queue."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest
from figures import tell
from jobs_rig import machine_per_job, machine_per_request, nothing_is_left, told, web_and_workers
from soak_instance import INSTANCE

from pantala.testing.box import BoxRig, running_box

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Generator[BoxRig]:
    with running_box(tmp_path_factory.mktemp("short"), instance=INSTANCE) as rig:
        yield rig


def test_five_hundred_requests_by_as_many_machines(box: BoxRig, tmp_path: Path) -> None:
    rate = machine_per_request(box, tmp_path, app="one-each", requests=50, rounds=10)
    tell(f"500 requests, each by a machine of its own, 4 at once: {rate:.1f} a second")
    nothing_is_left(box)


def test_a_thousand_jobs_by_as_many_machines(box: BoxRig) -> None:
    tell(told(machine_per_job(box, app="jobs", jobs=1000)))
    nothing_is_left(box)


def test_web_and_workers_of_one_image_share_a_broker(box: BoxRig, tmp_path: Path) -> None:
    web_and_workers(box, tmp_path, tasks=1000)
