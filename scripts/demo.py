"""`make demo`: the main job of the platform, told in steps, on this machine and from nothing.

Starts a box of three regions with real distances between them, launches the Flask example, goes with it through what a
first hour holds, then takes it around the world. A step that does not hold ends the demo with its name and a non-zero
exit code. Ends with a table of measured times and nothing left behind; with
KEEP=1 the box stays.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache"
PANTALA = ROOT / ".venv" / "bin" / "pantala"
APP = "hello-pantala"
HOST = f"{APP}.apps.pantala.test"
IDLE_WINDOW_S = 4
REFUSED_WITHIN_S = 30
REGIONS = ("iad", "lhr", "nrt")
AGENT_DOWN_S = 10
CUT_FOR_S = 4
LOAD_PER_REGION = 36
"""Requests a second from each region while a version is deployed: above 100 together."""


class StepFailed(Exception):
    """What did not hold."""


class Demo:
    def __init__(self, work: Path) -> None:
        self._work = work
        self._app_dir = work / "flask"
        self._state = work / "state"
        self._begun = time.monotonic()
        self.figures: list[tuple[str, str]] = []

    def run(self) -> None:
        self._step("Start a box: hosts in iad, lhr and nrt, with the distances of the real ones", self.start_box)
        self._step("pantala launch in a copy of examples/flask", self.launch)
        self._step("An HTTPS answer with a verified certificate, from a client namespace", self.first_answer)
        self._step("Set a secret; the app sees it", self.secret)
        self._step(f"Leave the machines idle for {IDLE_WINDOW_S} s: they stop", self.sleep)
        self._step("A request wakes one and is answered", self.wake)
        self._step("Deploy a second version", self.second_version)
        self._step("Deploy one that exits at start: refused, the old one serves", self.broken_version)
        self._step("What was released", self.releases)
        self._step("Scale it to three regions: one command", self.scale)
        self._step("Each client is answered in its own region", self.near)
        self._step(f"Keep the agent of lhr down for {AGENT_DOWN_S} s: its machine serves on", self.agent_down)
        self._step("Cut the host of lhr off, and bring it back", self.cut)
        self._step("Deploy in three regions under load", self.deploy_under_load)

    # -- steps -------------------------------------------------------------------------------------------------------

    def start_box(self) -> None:
        took = self._timed(
            lambda: self._pantala(
                "up",
                "--state",
                str(self._state),
                "--regions",
                ",".join(REGIONS),
                "--distances",
                "--idle-window",
                str(IDLE_WINDOW_S),
                "--org",
                "demo",
            )
        )
        self._note("box started", took)

    def launch(self) -> None:
        shutil.copytree(ROOT / "examples" / "flask", self._app_dir)
        took = self._timed(lambda: self._pantala("launch", "--now", "--yes", "--name", APP, cwd=self._app_dir))
        self._note("launch: directory to running app", took)
        for name in ("Dockerfile", "fly.toml"):
            self._hold((self._app_dir / name).is_file(), f"launch wrote {name}")

    def first_answer(self) -> None:
        seconds, body = self._get("/")
        self._hold(body == "Flask on Fly.io!", f"https://{HOST}/ answered {body!r}")
        self._note("HTTPS request, machine running", seconds)
        code = self._at("curl", "-s", "-o", "/dev/null", "-w", "%{http_code} %{redirect_url}", f"http://{HOST}/")
        self._hold(code == f"301 https://{HOST}/", f"plain HTTP is sent to HTTPS ({code})")

    def secret(self) -> None:
        took = self._timed(lambda: self._pantala("secrets", "set", "GREETING=good morning", cwd=self._app_dir))
        self._note("secret set, machines restarted one by one", took)
        _, body = self._get("/greeting")
        self._hold(body == "good morning", f"https://{HOST}/greeting answered {body!r}")

    def sleep(self) -> None:
        begun = time.monotonic()
        while states := {m["state"] for m in self._machines()} - {"stopped"}:
            if time.monotonic() - begun > IDLE_WINDOW_S + 30:
                raise StepFailed(f"machines are still {', '.join(sorted(states))}")
            time.sleep(0.2)
        took = time.monotonic() - begun
        self._hold(True, f"all machines stopped after {took:.1f} s")
        self._note("idle until all machines were stopped", took)
        left = app_processes()
        self._hold(not left, f"no process of the app is left ({len(left)} found)")

    def wake(self) -> None:
        seconds, body = self._get("/")
        self._hold(body == "Flask on Fly.io!", f"the sleeping app answered {body!r}")
        self._note("HTTPS request that woke a machine", seconds)
        awake = [m for m in self._machines() if m["state"] == "started"]
        self._hold(len(awake) == 1, f"one machine is awake ({len(awake)})")

    def second_version(self) -> None:
        self._edit('"Flask on Fly.io!"', '"Second version"')
        took = self._timed(lambda: self._pantala("deploy", cwd=self._app_dir))
        self._note("deploy, dependencies unchanged", took)
        _, body = self._get("/")
        self._hold(body == "Second version", f"the new version answered {body!r}")

    def broken_version(self) -> None:
        whole, broken = "app = Flask(__name__)", 'raise RuntimeError("the database is not configured")'
        self._edit(whole, broken)
        begun = time.monotonic()
        done = self._pantala("deploy", cwd=self._app_dir, fails=True)
        took = time.monotonic() - begun
        self._hold("exited at start" in done, "the refusal names the reason")
        self._hold("the database is not configured" in done, "the refusal shows the last log lines")
        self._hold(took <= REFUSED_WITHIN_S, f"refused after {took:.1f} s")
        self._note("broken version refused", took)
        _, body = self._get("/")
        self._hold(body == "Second version", f"the old version still answers ({body!r})")
        self._edit(broken, whole)

    def releases(self) -> None:
        self._pantala("releases", cwd=self._app_dir)
        self._pantala("status", cwd=self._app_dir)

    # -- three regions -----------------------------------------------------------------------------------------------

    def scale(self) -> None:
        self._edit_toml('auto_stop_machines = "stop"', 'auto_stop_machines = "off"')
        self._pantala("deploy", "--image", self._machines()[0]["config"]["image"], cwd=self._app_dir)
        command = ("scale", "count", "3", "--region", ",".join(REGIONS), "--yes")
        took = self._timed(lambda: self._pantala(*command, cwd=self._app_dir))
        self._note("scaled to three regions", took)
        places = sorted(machine["region"] for machine in self._machines())
        self._hold(places == sorted(REGIONS), f"a machine in each region ({', '.join(places)})")

    def near(self) -> None:
        for region in REGIONS:
            seconds, served_in = self._soonest(region)
            self._hold(served_in == region, f"a client in {region} is answered in {served_in} after {_shown(seconds)}")
            far, other = self._soonest(region, "-H", "fly-prefer-region: iad")
            if region != "iad":
                self._hold(other == "iad", f"asked for in iad it would have taken {_shown(far)}")
                self._note(f"a client in {region}: answered there", seconds)
                self._note(f"a client in {region}: answered in iad", far)

    def _soonest(self, region: str, *flags: str) -> tuple[float, str]:
        """Of four requests: connections between hosts, one for each core, are made by the first."""
        return min(self._get("/region", *flags, at=region) for _ in range(4))

    def agent_down(self) -> None:
        before = {machine["id"]: machine["instance_id"] for machine in self._machines()}
        self._box("stop", "agent-lhr-1", "--kill")
        begun, answers = time.monotonic(), 0
        while time.monotonic() - begun < AGENT_DOWN_S:
            _, served_in = self._get("/region", at="lhr")
            self._hold(served_in == "lhr", "", quiet=True)
            answers += 1
        self._hold(answers > 0, f"{answers} requests in {AGENT_DOWN_S} s, each answered in lhr")
        self._box("start", "agent-lhr-1")
        now = {machine["id"]: machine["instance_id"] for machine in self._machines()}
        self._hold(now == before, "the agent adopted its machine: the same one, never restarted")

    def cut(self) -> None:
        self._box("cut", "lhr-1")
        begun = time.monotonic()
        _, served_in = self._get("/region", at="lhr")
        took = time.monotonic() - begun
        self._hold(
            served_in != "lhr", f"a client in lhr is answered in {served_in}, the first time after {_shown(took)}"
        )
        self._note("host cut off: until the next region answered", took)
        time.sleep(CUT_FOR_S)
        self._box("heal")
        begun = time.monotonic()
        while self._get("/region", at="lhr")[1] != "lhr":
            self._hold(time.monotonic() - begun < 20, "lhr answers its own clients again", quiet=True)
        self._note("healed: until lhr answered its own clients", time.monotonic() - begun)

    def deploy_under_load(self) -> None:
        self._edit("Second version", "Third version")
        loads = {region: self._load(region) for region in REGIONS}
        for load in loads.values():
            self._tell(load, f"start {LOAD_PER_REGION}")
        try:
            took = self._timed(lambda: self._pantala("deploy", cwd=self._app_dir))
        finally:
            reports = {region: self._stopped(load) for region, load in loads.items()}
        sent = sum(report["sent"] for report in reports.values())
        failed = {region: report["details"] for region, report in reports.items() if report["failures"]}
        self._hold(
            not failed, f"{sent} requests from three regions during the deploy, none failed {failed or ''}".strip()
        )
        self._hold(sent / max(took, 1) >= 90, f"{sent / took:.0f} requests a second")
        self._note("deploy in three regions under load", took)
        for region in REGIONS:
            _, body = self._get("/", at=region)
            self._hold(body == "Third version", f"{region} serves the new version")

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _step(self, title: str, run: Callable[[], None]) -> None:
        sys.stdout.write(f"\n--- {title}   [{time.monotonic() - self._begun:.0f} s]\n")
        sys.stdout.flush()
        run()

    def _hold(self, held: bool, what: str, *, quiet: bool = False) -> None:
        if not held:
            raise StepFailed(what)
        if not quiet:
            sys.stdout.write(f"    ok: {what}\n")

    def _note(self, what: str, seconds: float) -> None:
        self.figures.append((what, _shown(seconds)))

    def _timed(self, run: Callable[[], object]) -> float:
        begun = time.monotonic()
        run()
        return time.monotonic() - begun

    def _edit(self, old: str, new: str) -> None:
        path = self._app_dir / "app.py"
        path.write_text(path.read_text().replace(old, new))

    def _edit_toml(self, old: str, new: str) -> None:
        path = self._app_dir / "fly.toml"
        text = path.read_text()
        self._hold(old in text, f"fly.toml says {old}", quiet=True)
        path.write_text(text.replace(old, new))

    def _box(self, *arguments: str) -> None:
        self._pantala("box", *arguments, "--state", str(self._state))

    def _load(self, region: str) -> subprocess.Popen[str]:
        """A client in a region that repeats nothing; it obeys `start` and `stop`."""
        client = [sys.executable, "-m", "pantala.testing.load", f"https://{HOST}/"]
        command = [PANTALA, "box", "at", region, "--state", str(self._state), "--", *client]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def _tell(self, load: subprocess.Popen[str], line: str) -> None:
        assert load.stdin is not None
        load.stdin.write(line + "\n")
        load.stdin.flush()

    def _stopped(self, load: subprocess.Popen[str]) -> dict[str, Any]:
        assert load.stdout is not None
        try:
            self._tell(load, "stop")
            report: dict[str, Any] = json.loads(load.stdout.readline() or "{}")
            if not report:
                raise StepFailed("a load client ended before its time")
            return report
        finally:
            load.kill()
            load.wait()

    def _machines(self) -> list[dict[str, Any]]:
        done = subprocess.run(
            [PANTALA, "machine", "list", "--json", "-a", APP], capture_output=True, text=True, timeout=30, check=False
        )
        if done.returncode != 0:
            raise StepFailed(f"pantala machine list: {done.stderr.strip()}")
        return json.loads(done.stdout)

    def _pantala(self, *arguments: str, cwd: Path | None = None, fails: bool = False) -> str:
        """Run the CLI, showing what it says; its output when it was meant to fail."""
        command = " ".join(arguments)
        sys.stdout.write(f"    $ pantala {command}\n")
        sys.stdout.flush()
        process = subprocess.Popen(
            [PANTALA, *arguments], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        said: list[str] = []
        for line in process.stdout:
            said.append(line)
            sys.stdout.write(f"    {line}")
            sys.stdout.flush()
        code = process.wait(timeout=900)
        if (code != 0) != fails:
            raise StepFailed(f"`pantala {command}` exited with {code}")
        return "".join(said)

    def _at(self, *command: str, region: str = "iad") -> str:
        done = subprocess.run(
            [PANTALA, "box", "at", region, "--state", str(self._state), "--", *command],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise StepFailed(f"`{' '.join(command)}` exited with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def _get(self, path: str, *flags: str, at: str = "iad") -> tuple[float, str]:
        """Seconds curl says the request took, and the body. The certificate is verified: there is no -k."""
        curl = ("curl", "-sS", "--fail", "--max-time", "30", "-w", "\n%{time_total}", *flags, f"https://{HOST}{path}")
        text = self._at(*curl, region=at)
        body, _, seconds = text.rpartition("\n")
        return float(seconds), body


def _shown(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def app_processes() -> list[str]:
    """Command lines of gunicorn processes that live in a machine's control group."""
    found: list[str] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                groups = (entry / "cgroup").read_text()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if "gunicorn" in command and "/pantala" in groups:
                found.append(command)
    return found


def main() -> int:
    CACHE.mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="demo-", dir=CACHE))
    os.environ["PANTALA_CACHE_DIR"] = str(CACHE)
    os.environ["PANTALA_CONFIG_DIR"] = str(work / "config")
    demo, failed, keep = Demo(work), None, os.environ.get("KEEP", "") not in ("", "0")
    try:
        demo.run()
    except (StepFailed, subprocess.TimeoutExpired) as error:
        failed = str(error)
    except KeyboardInterrupt:
        failed = "interrupted"
    if failed is not None:
        sys.stdout.write(f"\nFAILED: {failed}\n")
        show_logs(work)
    if keep and failed is None:
        sys.stdout.write(
            f"\nThe box stays. Try, in this shell:\n"
            f"    export PANTALA_CONFIG_DIR={work / 'config'} PANTALA_CACHE_DIR={CACHE} PATH={PANTALA.parent}:$PATH\n"
            f"    pantala box at lhr -- curl https://{HOST}/region\n"
            f"    pantala box distances; pantala box cut nrt; pantala box heal; pantala host list\n"
            f"    curl --cacert {work}/state/control/ca/ca.pem --resolve {HOST}:443:{edge_of(work)} https://{HOST}/\n"
            f"    pantala status -a {APP}; pantala logs -a {APP}; pantala machine list -a {APP}\n"
            f"    pantala down --purge\n"
        )
    else:
        code = subprocess.run([PANTALA, "down", "--purge", "--state", work / "state"], check=False).returncode
        shutil.rmtree(work, ignore_errors=True)
        if code != 0 and failed is None:
            failed = "the box left something behind"
    width = max((len(what) for what, _ in demo.figures), default=0)
    sys.stdout.write("\nMeasured in this run (once each):\n")
    for what, figure in demo.figures:
        sys.stdout.write(f"    {what.ljust(width)}   {figure:>9}\n")
    return 1 if failed is not None else 0


def edge_of(work: Path) -> str:
    return json.loads((work / "config" / "config.json").read_text())["edge"]


def show_logs(work: Path) -> None:
    """The end of each process's log, for whoever looks into the failure."""
    for path in sorted((work / "state" / "logs").glob("*.log")):
        lines = path.read_text(errors="replace").splitlines()[-12:]
        if lines:
            sys.stdout.write(f"--- {path.name}\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
