"""What all tiers share: the async backend, no clock in property tests, and the rule on skips.

Property tests may take as long as a busy machine needs for an example. What a killed run left running ends first.

Only what these three markers name may be absent from a machine; it is skipped by name and listed at the end. Any other
skip, and a test marked `root` without root, fails the run.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from pantala.testing.orphans import begin_run

MAY_BE_ABSENT = {
    "needs_kvm": "usable KVM",
    "needs_cgroup_v2": "cgroup v2 controllers",
    "needs_kernel_wireguard": "WireGuard in the kernel",
}
_forbidden_skips: list[str] = []

settings.register_profile("busy", parent=settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


def pytest_sessionstart(session: pytest.Session) -> None:
    begin_run()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def is_present(marker: str) -> bool:
    """Whether this machine has what a marker names."""
    if marker == "needs_cgroup_v2":
        path = Path("/sys/fs/cgroup/cgroup.controllers")
        return path.is_file() and {"cpu", "memory", "pids"} <= set(path.read_text().split())
    if marker == "needs_kernel_wireguard":
        return Path("/sys/module/wireguard").exists()
    return False  # KVM: only booting a guest tells, and no driver boots one yet


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, what in MAY_BE_ABSENT.items():
        if item.get_closest_marker(marker) and not is_present(marker):
            pytest.skip(f"absent: {what}")
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.fail("this test needs root; run it with sudo", pytrace=False)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:
        reason = str(report.longrepr)
        if not any(f"absent: {what}" in reason for what in MAY_BE_ABSENT.values()):
            _forbidden_skips.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _forbidden_skips:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in _forbidden_skips:
        terminalreporter.write_line(f"skipped without leave: {line}", red=True)
