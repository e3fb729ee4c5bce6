"""Puts the Rust programs into the wheel: hatchling calls this for `uv tool install .`, `uv build` and `pip install .`.

An editable install (`uv sync`) takes them from the checkout's `target/` instead and compiles nothing. Why not wheels of
their own: docs/contributing/decisions/0001-build-hook.md.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROGRAMS = ("pantala-proxy", "pantala-init", "pantala-relay")
RUST_NEEDED = "Rust 1.91 or newer (https://rustup.rs)"


class RustPrograms(BuildHookInterface):
    """The programs as scripts of the wheel, beside the `pantala` command."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or version == "editable":
            return
        programs = build(Path(self.root))
        build_data["shared_scripts"] = {str(path): name for name, path in programs.items()}
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform_tag()}"


def build(root: Path) -> dict[str, Path]:
    """Program name to file. CARGO_TARGET_DIR is honoured, so a checkout that has been built is not built again."""
    cargo = shutil.which("cargo")
    if cargo is None:
        raise SystemExit(
            f"Pantala's proxy, init and relay are built by cargo, which is not on the PATH; install {RUST_NEEDED}."
        )
    packages = [word for name in PROGRAMS for word in ("--package", name)]
    done = subprocess.run(
        [cargo, "build", "--release", "--locked", "--message-format", "json-render-diagnostics", *packages],
        cwd=root,  # .cargo/config.toml, which makes them static, is found from here
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"cargo could not build {', '.join(PROGRAMS)} (see above). They need {RUST_NEEDED}.")
    messages = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {
        message["target"]["name"]: Path(message["executable"])
        for message in messages
        if message.get("executable") and message["target"]["name"] in PROGRAMS
    }


def platform_tag() -> str:
    """The programs are static, so the machine's architecture is all that they ask for."""
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")
