"""Units for a host's processes, from the same list that `pantala host run` starts. Pure but for the last functions.

pantala.target               all of them
pantala.slice                their control groups; machines have `pantala-machines.slice` below it
pantala-<name>.service       one process; KillMode=process, so that machines outlive the agent. A reload of the proxy's
                             replaces its process without losing a request (`replacing.py`)
pantala-<name>-renew.path    tells a process when certificates or users of the bus were renewed
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pantala.errors import InternalError
from pantala.host.replacing import SERVES_WITHIN_S
from pantala.host.supervisor import Process

UNITS = Path("/etc/systemd/system")
MACHINES_CGROUP = "pantala.slice/pantala-machines.slice"
TARGET = "pantala.target"
WITHIN_S = 60
REPLACED_WITHIN_S = int(SERVES_WITHIN_S) + 30
STOPPED_WITHIN_S = 120
"""For requests and WebSockets that are under way; connections that last longer are cut."""


def is_running() -> bool:
    """Whether systemd is this machine's init."""
    return Path("/run/systemd/system").is_dir()


def units(processes: Sequence[Process], *, before_builds: list[str]) -> dict[str, str]:
    """File name to text. `before_builds`: the command that makes the builder's namespace."""
    files = {
        TARGET: (
            "[Unit]\nDescription=Pantala host\nWants=network-online.target\nAfter=network-online.target\n\n"
            "[Install]\nWantedBy=multi-user.target\n"
        ),
        "pantala.slice": "[Unit]\nDescription=Pantala\n\n[Slice]\nCPUAccounting=yes\nMemoryAccounting=yes\n"
        "TasksAccounting=yes\n",
        "pantala-machines.slice": "[Unit]\nDescription=Machines of Pantala\n\n[Slice]\nCPUAccounting=yes\n"
        "MemoryAccounting=yes\nTasksAccounting=yes\n",
    }
    for process in processes:
        files |= _service(process, before=before_builds if process.netns else [])
    return files


def _service(process: Process, *, before: list[str]) -> dict[str, str]:
    name = unit_name(process)
    after = " ".join(["network-online.target", *(f"pantala-{other}.service" for other in process.after)])
    command = process.command
    if process.netns:
        command = ["/usr/bin/nsenter", f"--net=/run/netns/{process.netns}", "--", *command]
    lines = [
        "[Unit]",
        f"Description=Pantala {process.name}",
        f"PartOf={TARGET}",
        f"After={after}",
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        *([f"ExecStartPre={_words(before)}"] if before else []),
        f"ExecStart={_words(command)}",
        *_life(process, command),
        "Restart=always",
        "RestartSec=1",
        "Slice=pantala.slice",
        "WorkingDirectory=/",
        "LimitNOFILE=1048576",
        *(f"Environment={_quoted(f'{key}={value}')}" for key, value in sorted(process.env.items())),
        "",
        "[Install]",
        f"WantedBy={TARGET}",
        "",
    ]
    files = {name: "\n".join(lines)}
    if process.reload_on:
        base = name.removesuffix(".service")
        changed = "\n".join(f"PathChanged={path}" for path in process.reload_on)
        files[f"{base}-renew.path"] = (
            f"[Unit]\nDescription=Renewed files of Pantala {process.name}\nPartOf={TARGET}\n\n"
            f"[Path]\n{changed}\n\n[Install]\nWantedBy={TARGET}\n"
        )
        files[f"{base}-renew.service"] = (
            f"[Unit]\nDescription=Pantala {process.name} reads its files again\n\n"
            f"[Service]\nType=oneshot\nExecStart=/bin/systemctl try-reload-or-restart {name}\n"
        )
    return files


def _life(process: Process, command: list[str]) -> list[str]:
    """How systemd knows that it serves, and how it is reloaded and ended."""
    if not process.replace:
        return ["Type=exec", "ExecReload=/bin/kill -HUP $MAINPID", "KillMode=process"]
    new = [sys.executable, "-m", "pantala.host.replacing", process.replace, *command, "--replace"]
    return [
        "Type=notify",
        "NotifyAccess=all",  # the new process, started by the reload, says that it is the main one now
        f"ExecReload={_words(new)}",
        "KillMode=mixed",  # what it replaced and still drains ends with it; no machine lives in this control group
        f"TimeoutStartSec={REPLACED_WITHIN_S}",
        f"TimeoutStopSec={STOPPED_WITHIN_S}",
    ]


def unit_name(process: Process) -> str:
    return f"pantala-{process.name}.service"


def _words(command: Sequence[str]) -> str:
    return " ".join(_word(word) for word in command)


def _word(text: str) -> str:
    """In a command `$` would begin a variable."""
    return _quoted(text).replace("$", "$$")


def _quoted(text: str) -> str:
    """As systemd reads it; `%` would begin a specifier."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


def install(files: dict[str, str]) -> None:
    """Write, enable and start them."""
    write(files)
    wanted = [name for name, text in files.items() if "[Install]" in text]
    _systemctl("enable", "--quiet", *wanted)
    _systemctl("restart", TARGET)


def write(files: dict[str, str]) -> None:
    """What runs goes on; what is done to it next is done by these."""
    for name, text in files.items():
        (UNITS / name).write_text(text)
    _systemctl("daemon-reload")


def reload(name: str) -> None:
    """Returns once the process has taken it; of the proxy: once its new process serves. Raises InternalError."""
    _systemctl("reload", f"pantala-{name}.service", within_s=REPLACED_WITHIN_S + WITHIN_S)


def remove() -> None:
    """Stop and take away every unit of ours; repeats safely."""
    names = sorted(path.name for path in UNITS.glob("pantala*") if path.is_file())
    if not names:
        return
    _systemctl("disable", "--now", "--quiet", *(name for name in names if not name.endswith(".slice")))
    for name in names:
        (UNITS / name).unlink()
    _systemctl("daemon-reload")


def _systemctl(*arguments: str, within_s: float = WITHIN_S) -> None:
    command = ["systemctl", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=within_s, check=False)
    if done.returncode != 0:
        raise InternalError(f"`{' '.join(command)}` failed: {done.stderr.strip()[-300:]}")
