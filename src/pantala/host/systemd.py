"""Units for a host's processes, from the same list that `pantala host run` starts. Pure but for the last functions.

pantala.target               all of them
pantala.slice                their control groups; machines have `pantala-machines.slice` below it
pantala-<name>.service       one process; KillMode=process, so that machines outlive the agent
pantala-<name>-renew.path    tells a process when certificates or users of the bus were renewed
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from pantala.errors import InternalError
from pantala.host.supervisor import Process

UNITS = Path("/etc/systemd/system")
MACHINES_CGROUP = "pantala.slice/pantala-machines.slice"
TARGET = "pantala.target"
WITHIN_S = 60


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
        "Type=exec",
        *([f"ExecStartPre={_words(before)}"] if before else []),
        f"ExecStart={_words(command)}",
        "ExecReload=/bin/kill -HUP $MAINPID",
        "KillMode=process",
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
    for name, text in files.items():
        (UNITS / name).write_text(text)
    wanted = [name for name, text in files.items() if "[Install]" in text]
    _systemctl("daemon-reload")
    _systemctl("enable", "--quiet", *wanted)
    _systemctl("restart", TARGET)


def remove() -> None:
    """Stop and take away every unit of ours; repeats safely."""
    names = sorted(path.name for path in UNITS.glob("pantala*") if path.is_file())
    if not names:
        return
    _systemctl("disable", "--now", "--quiet", *(name for name in names if not name.endswith(".slice")))
    for name in names:
        (UNITS / name).unlink()
    _systemctl("daemon-reload")


def _systemctl(*arguments: str) -> None:
    command = ["systemctl", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S, check=False)
    if done.returncode != 0:
        raise InternalError(f"`{' '.join(command)}` failed: {done.stderr.strip()[-300:]}")
