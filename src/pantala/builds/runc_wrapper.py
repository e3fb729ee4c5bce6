"""The `runc` that BuildKit calls: hands the operator's certificate authorities and package indexes to RUN steps.

They are mounted below the step's own /dev and named by environment variables, so nothing of them is in the image. Reads
`PANTALA_BUILD_CA` (a bundle) and `PANTALA_BUILD_ENV` (a JSON object) from buildkitd's environment. Only the standard
library is imported, because it runs once a step.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

CA_INSIDE = "/dev/.pantala-ca.crt"
CA_VARIABLES = (
    "SSL_CERT_FILE",
    "PIP_CERT",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "NODE_EXTRA_CA_CERTS",
    "GIT_SSL_CAINFO",
    "CARGO_HTTP_CAINFO",
)


def amend(spec: dict[str, Any], *, ca: str, env: dict[str, str]) -> None:
    """Add the mount and the variables to an OCI runtime spec; what the Dockerfile set itself stays."""
    process: dict[str, Any] = spec.setdefault("process", {})
    variables: list[str] = process.setdefault("env", [])
    present = {entry.partition("=")[0] for entry in variables}
    wanted = dict(env)
    if ca:
        options = ["bind", "ro", "nosuid", "nodev"]
        spec.setdefault("mounts", []).append(
            {"destination": CA_INSIDE, "type": "bind", "source": ca, "options": options}
        )
        wanted |= dict.fromkeys(CA_VARIABLES, CA_INSIDE)
    variables += [f"{name}={value}" for name, value in sorted(wanted.items()) if name not in present]


def bundle_of(arguments: list[str]) -> Path | None:
    """The bundle directory of `run` and `create`; None for other commands."""
    if not {"run", "create"} & set(arguments):
        return None
    for index, argument in enumerate(arguments):
        if argument in ("--bundle", "-b"):
            return Path(arguments[index + 1])
        if argument.startswith("--bundle="):
            return Path(argument.removeprefix("--bundle="))
    return Path.cwd()


def main(arguments: list[str]) -> None:
    if bundle := bundle_of(arguments):
        path = bundle / "config.json"
        spec = json.loads(path.read_text())
        amend(
            spec,
            ca=os.environ.get("PANTALA_BUILD_CA", ""),
            env=json.loads(os.environ.get("PANTALA_BUILD_ENV", "{}")),
        )
        path.write_text(json.dumps(spec))
    runc = os.environ.get("PANTALA_RUNC", "/usr/sbin/runc")
    os.execv(runc, [runc, *arguments])  # noqa: S606 - there is no shell to start it with


if __name__ == "__main__":
    main(sys.argv[1:])
