"""One box for the whole tier; tests use apps of their own in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from pathlib import Path

import pytest
from figures import FIGURES

from pantala.testing.box import BoxRig, running_box

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

os.environ.setdefault("PANTALA_BOX_INSTANCE", "9")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FIGURES:
        terminalreporter.section("measured on the way")
        for line in FIGURES:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def box(tmp_path_factory: pytest.TempPathFactory) -> Generator[BoxRig]:
    with running_box(tmp_path_factory.mktemp("box")) as rig:
        yield rig


@pytest.fixture
def flask_source(tmp_path: Path) -> Path:
    """A copy of the Flask example, to be launched and changed."""
    return Path(shutil.copytree(EXAMPLES / "flask", tmp_path / "flask"))
