"""The corpus: for each image how it is made, and what has to come of it. Run by `test_image_corpus.py`.

`says`: the machine's output, and `code` its exit code; `fails`: the app cannot be started, with this reason; `refused`:
the pull is refused with this text (regular expressions). `lies`: served by a registry that takes anything.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pantala.images.platforms import host_architecture
from pantala.testing import images as i
from pantala.testing.images import Layer, Made, entry, folder, hard_link, link, program, text

CAPABILITY = b"\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00".decode()
"""cap_net_bind_service=ep"""
ATTRIBUTES = {
    "SCHILY.xattr.user.note": "kept",
    "SCHILY.xattr.security.capability": CAPABILITY,
    "SCHILY.xattr.trusted.overlay.redirect": "/etc",
}
HERE, OTHER = host_architecture(), i.OTHER_ARCHITECTURE
BASE = i.base()
EMPTY = i.tar()
NOTE = i.tar(text("note", "here\n"))


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    make: Callable[[], Made]
    says: Sequence[str] = ()
    code: int = 0
    fails: str = ""
    refused: str = ""
    lies: bool = False


CASES: list[Case] = []


def case(name: str, make: Callable[[], Made], **expected: Any) -> None:
    CASES.append(Case(name=name, make=make, **expected))


def sh(*layers: Layer | bytes, script: str, **run: Any) -> Made:
    """Over the base, with a script as its command."""
    return i.image(BASE, *layers, run={"Cmd": ["/bin/sh", "-c", script]} | run)


def shows(name: str, *layers: Layer | bytes, script: str, says: Sequence[str], **run: Any) -> None:
    case(name, lambda: sh(*layers, script=script, **run), says=says)


def refused(name: str, *layers: Layer | bytes, by: str, lies: bool = False) -> None:
    case(name, lambda: i.image(*layers, run={"Cmd": ["/x"]}), refused=by, lies=lies)


def _of_another_processor() -> bytes:
    return _elf(183 if HERE == "amd64" else 62, "")


def _dynamic() -> bytes:
    return _elf(62 if HERE == "amd64" else 183, "/lib/ld-musl-none.so.1\0")


def _elf(machine: int, loader: str) -> bytes:
    """A program with one segment, which names a loader."""
    head = bytearray(0x78)
    head[:7] = b"\x7fELF\x02\x01\x01"
    for at, size, value in (
        (16, 2, 2), (18, 2, machine), (20, 4, 1), (24, 8, 0x400078), (32, 8, 64), (52, 2, 64), (54, 2, 56), (56, 2, 1),
        (64, 4, 3 if loader else 1), (68, 4, 5), (72, 8, 0x78), (96, 8, len(loader)), (104, 8, len(loader)),
    ):  # fmt: skip
        head[at : at + size] = value.to_bytes(size, "little")
    return bytes(head) + loader.encode()


# -- what an image is made of ------------------------------------------------------------------------------------------

STATIC = i.tar(program("busybox", i.busybox()))
DISTROLESS = i.tar(
    folder("etc"),
    text("etc/passwd", "root:x:0:0::/root:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/home/nonroot:/sbin/nologin\n"),
    text("etc/group", "root:x:0:\nnonroot:x:65532:\n"),
    folder("home"),
    folder("home/nonroot", mode=0o700, uid=65532, gid=65532),
)
case(
    "scratch with a static program",
    lambda: i.image(STATIC, run={"Entrypoint": ["/busybox", "echo"], "Cmd": ["one file"]}),
    says=["one file"],
)
case(
    "distroless: no shell, nonroot",
    lambda: i.image(
        DISTROLESS, STATIC, run={"User": "nonroot", "WorkingDir": "/home/nonroot", "Entrypoint": ["/busybox", "id"]}
    ),
    says=["uid=65532(nonroot) gid=65532(nonroot)"],
)
case(
    "distroless: a shell form without a shell",
    lambda: i.image(DISTROLESS, STATIC, run={"Entrypoint": ["/bin/sh", "-c", "/busybox"]}),
    fails='the command "/bin/sh" was not found: there is no file /bin/sh',
)
shows("busybox", script="echo $0; echo hello from $(busybox whoami)", says=["/bin/sh", "hello from root"])
for _to in ("usr/bin", "/usr/bin"):
    case(
        f"bin is a link to {_to}, with more in a later layer",
        lambda to=_to: i.image(
            i.tar(folder("usr"), folder("usr/bin"), program("usr/bin/busybox", i.busybox()), link("bin", to)),
            i.tar(folder("usr"), folder("usr/bin"), link("usr/bin/sh", "/bin/busybox")),
            run={"Cmd": ["/bin/sh", "-c", "busybox readlink /bin; busybox ls /bin"]},
        ),
        says=[_to, "busybox", "sh"],
    )
case("no layers", lambda: i.image(run={"Cmd": ["/x"]}), refused="has no layers", lies=True)
shows("an empty layer", EMPTY, script="echo works", says=["works"])
shows("the same layer three times", NOTE, EMPTY, NOTE, EMPTY, NOTE, script="cat /note", says=["here"])
shows(
    "what comes again covers what came between",
    NOTE,
    i.tar(text("note", "between\n")),
    NOTE,
    script="cat /note",
    says=["here"],
)
case(
    "many layers",
    lambda: sh(*(i.tar(text(f"n/{n}", str(n))) for n in range(12)), script="ls /n | busybox wc -l"),
    says=["12"],
)
case(
    "too many layers",
    lambda: i.image(*[EMPTY] * 128, run={"Cmd": ["/x"]}),
    refused="has 128 layers, at most 127 are taken",
    lies=True,
)

# -- users -------------------------------------------------------------------------------------------------------------

IDS = "echo $(id -u):$(id -g):$(id -G)"
for user, ids in {
    "app": "1000:1000:1000 1500",
    "app:extra": "1000:1500:1500",
    "1000": "1000:1000:1000 1500",
    "1234:5678": "1234:5678:5678",
    "0:0": "0:0:0",
    "65534": "65534:0:0",
}.items():
    shows(f"user {user}", script=IDS, User=user, says=[ids])
case("a user that is not there", lambda: sh(script="id", User="nobody"), fails='there is no user "nobody"')
case("a group that is not there", lambda: sh(script="id", User="app:staff"), fails='there is no group "staff"')
case("a user beyond the machine's", lambda: sh(script="id", User="100000"), fails="the id 100000 is outside of 0 to")
shows(
    "passwd of a later layer",
    i.tar(text("etc/passwd", "late:x:77:78::/:/bin/sh\n"), text("etc/group", "late:x:78:\n")),
    script=IDS,
    User="late",
    says=["77:78:78"],
)
case(
    "passwd is a pipe",
    lambda: sh(i.tar(entry("etc/passwd", tarfile.FIFOTYPE)), script="id", User="app"),
    fails='there is no user "app"',
)
case(
    "passwd is a link to what never ends",
    lambda: sh(i.tar(link("etc/passwd", "/dev/zero")), script="id", User="app"),
    fails='there is no user "app"',
)

# -- how it runs -------------------------------------------------------------------------------------------------------

shows(
    "a working directory that is not there",
    script="pwd; stat -c %u .",
    WorkingDir="/a/b",
    User="app",
    says=["/a/b", "1000"],
)
shows(
    "a working directory through a link", i.tar(link("here", "srv")), script="pwd -P", WorkingDir="/here", says=["/srv"]
)
case(
    "a working directory that is a file",
    lambda: sh(script="pwd", WorkingDir="/etc/passwd"),
    fails="/etc/passwd is a file",
)
case("a relative working directory", lambda: sh(script="pwd", WorkingDir="srv"), fails="srv is not an absolute path")
case(
    "entrypoint and command",
    lambda: i.image(BASE, run={"Entrypoint": ["echo", "-n"], "Cmd": ["a", "b c"]}),
    says=["a b c"],
)
case("command alone, found in PATH", lambda: i.image(BASE, run={"Cmd": ["echo", "by path"]}), says=["by path"])
case("no command at all", lambda: i.image(BASE), fails="the image has no command")
case(
    "a command that is not there", lambda: i.image(BASE, run={"Cmd": ["serve"]}), fails='"serve" was not found in PATH'
)
case(
    "a command that is a link to nothing",
    lambda: i.image(BASE, i.tar(link("app", "/opt/app")), run={"Cmd": ["/app"]}),
    fails="/app is a link to /opt/app, which is not there",
)
case(
    "a command without the x permission",
    lambda: i.image(BASE, i.tar(text("app", "#!/bin/sh\n")), run={"Cmd": ["/app"]}),
    fails='"/app" is not executable: /app lacks the x permission',
)
case("a command that is a directory", lambda: i.image(BASE, run={"Cmd": ["/etc"]}), fails='"/etc" is a directory')
case(
    "a program of another processor",
    lambda: i.image(BASE, i.tar(program("app", _of_another_processor())), run={"Cmd": ["/app"]}),
    fails=f"/app cannot run: it is built for {OTHER}.*, this host is {HERE}",
)
case(
    "a script whose interpreter is missing",
    lambda: i.image(BASE, i.tar(program("app", "#!/usr/bin/python3 -u\n")), run={"Cmd": ["/app"]}),
    fails="the interpreter of its #! line, /usr/bin/python3, is not in the image",
)
case(
    "a script with Windows line ends",
    lambda: i.image(BASE, i.tar(program("app", "#!/bin/sh\r\necho\r\n")), run={"Cmd": ["/app"]}),
    fails='names "/bin/sh" and ends with a carriage return',
)
case(
    "a program whose loader is missing",
    lambda: i.image(BASE, i.tar(program("app", _dynamic())), run={"Cmd": ["/app"]}),
    fails="its dynamic loader /lib/ld-musl-none.so.1 is not in the image",
)
case(
    "a script without a first line",
    lambda: i.image(BASE, i.tar(program("app", "echo hello\n")), run={"Cmd": ["/app"]}),
    fails="neither a program of this processor nor a script",
)
case(
    "an empty program",
    lambda: i.image(BASE, i.tar(program("app", "")), run={"Cmd": ["/app"]}),
    fails="/app cannot run: the file is empty",
)
case(
    "a program for root only",
    lambda: i.image(BASE, i.tar(program("app", "#!/bin/sh\n", mode=0o700)), run={"Cmd": ["/app"], "User": "app"}),
    fails="permission denied for the user of the machine",
)
shows(
    "environment",
    script='echo "$A|$B|$C|$EMPTY|$PATH"',
    Env=["A=b=c=d", "B=grüße 🌍", "C= spaces ", "EMPTY=", "BARE", "PATH=/bin"],
    says=["b=c=d|grüße 🌍| spaces ||/bin"],
)
case(
    "a NUL in the environment",
    lambda: sh(script="env", Env=["A=b\0c"]),
    refused="Env of its config holds a NUL character",
)
shows(
    "ports, volumes, health, labels",
    script="echo runs",
    ExposedPorts={"8080/tcp": {}, "53/udp": {}, "9000-9010/tcp": {}, "x": {}},
    Volumes={"/data": {}},
    StopSignal="SIGRTMIN+3",
    Healthcheck={"Test": ["CMD", "true"], "Interval": 1},
    Labels={"a": "b"},
    OnBuild=["RUN x"],
    says=["runs"],
)
shows("nulls for everything", script="echo runs", Env=None, User=None, Entrypoint=None, Labels=None, says=["runs"])

# -- layers over layers ------------------------------------------------------------------------------------------------

TREE = i.tar(
    folder("d"),
    text("d/one", "1\n"),
    text("d/two", "2\n"),
    folder("d/sub"),
    text("d/sub/three", "3\n"),
    text("top", "top\n"),
)
shows("whiteout of a file", TREE, i.tar(text("d/.wh.one", "")), script="ls /d", says=["sub", "two"])
shows(
    "whiteout of a directory",
    TREE,
    i.tar(text(".wh.d", "")),
    script="ls -d /d 2>/dev/null; ls /top",
    says=["/top"],
)
shows(
    "whiteout of nothing", i.tar(text("srv/.wh.none", ""), text(".wh.none", "")), script="ls /srv; echo ok", says=["ok"]
)
shows(
    "an opaque directory",
    TREE,
    i.tar(folder("d"), text("d/.wh..wh..opq", ""), text("d/new", "")),
    script="ls /d",
    says=["new"],
)
shows(
    "an opaque directory, said last",
    TREE,
    i.tar(folder("d"), text("d/new", ""), text("d/.wh..wh..opq", "")),
    script="ls /d",
    says=["new"],
)
shows(
    "removed and made again in one layer",
    TREE,
    i.tar(text(".wh.d", ""), folder("d"), text("d/new", "")),
    script="ls /d",
    says=["new"],
)
shows(
    "made again and removed in one layer",
    TREE,
    i.tar(folder("d"), text("d/new", ""), text(".wh.d", ""), text("top", "mine\n"), text(".wh.top", "")),
    script="ls /d; cat /top",
    says=["new", "mine"],
)
shows(
    "removed, then only files below it",
    TREE,
    i.tar(text(".wh.d", ""), text("d/new", "")),
    script="ls /d",
    says=["new"],
)
case(
    "everything below removed",
    lambda: i.image(TREE, i.tar(text(".wh..wh..opq", "")), STATIC, run={"Cmd": ["/busybox", "ls", "/"]}),
    says=["busybox", "dev", "etc", "proc", "sys"],
)
shows(
    "notes of aufs",
    i.tar(folder(".wh..wh.plnk"), text(".wh..wh.plnk/1.2", "x"), text(".wh..wh.aufs", "")),
    script="ls -a / | busybox grep -c wh || true",
    says=["0"],
)
shows("a file becomes a directory", TREE, i.tar(folder("top"), text("top/in", "")), script="ls /top", says=["in"])
shows("a directory becomes a file", TREE, i.tar(text("d", "file\n")), script="cat /d", says=["file"])
shows("a directory becomes a link", TREE, i.tar(link("d", "srv")), script="readlink /d", says=["srv"])
shows(
    "hard links in a layer",
    i.tar(text("a", "x\n"), hard_link("b", "a"), hard_link("c", "/a")),
    script="stat -c %h /a; cat /c",
    says=["3", "x"],
)
shows("a hard link to itself", i.tar(text("a", "x\n"), hard_link("a", "a")), script="cat /a", says=["x"])
refused(
    "a hard link across layers",
    TREE,
    i.tar(hard_link("b", "top")),
    by="'b' leads to 'top', which is not there in its layer",
)
refused("a hard link out of the image", i.tar(hard_link("b", "../../etc/passwd")), by="points out of the image")
refused("a hard link to a directory", i.tar(folder("d"), hard_link("b", "d")), by="which is a directory")
shows(
    "a link below, written through",
    i.tar(
        folder("usr"),
        folder("usr/lib"),
        text("usr/lib/old", ""),
        link("lib", "usr/lib"),
        folder("run"),
        folder("var"),
        link("var/run", "/run"),
    ),
    i.tar(text("lib/new", ""), text("lib/deep/er", ""), text("var/run/pid", "")),
    script="readlink /lib; readlink /var/run; ls /usr/lib /run",
    says=["usr/lib", "/run", "/run:", "pid", "", "/usr/lib:", "deep", "new", "old"],
)
shows(
    "a link below, removed through",
    i.tar(folder("usr"), folder("usr/lib"), text("usr/lib/old", ""), text("usr/lib/kept", ""), link("lib", "usr/lib")),
    i.tar(text("lib/.wh.old", "")),
    script="readlink /lib; ls /lib/",
    says=["usr/lib", "kept"],
)
shows(
    "a link below, replaced by name",
    i.tar(folder("usr"), text("usr/old", ""), link("opt", "usr")),
    i.tar(folder("opt"), text("opt/new", "")),
    script="ls /opt /usr",
    says=["/opt:", "new", "", "/usr:", "old"],
)
shows(
    "a link out of the root, written through",
    i.tar(link("out", "../../../../srv"), link("abs", "/srv")),
    i.tar(text("out/a", ""), text("abs/b", "")),
    script="readlink /out; ls /srv",
    says=["../../../../srv", "a", "b"],
)
shows("a link that circles", i.tar(link("a", "b"), link("b", "a")), i.tar(text("a/x", "")), script="ls /a", says=["x"])
shows(
    "directories that a layer leaves out",
    i.tar(folder("data", mode=0o1777, uid=1000, gid=1000)),
    i.tar(text("data/x/y", ""), text("tmp/z", "")),
    script="stat -c '%a %u %n' /data /data/x /tmp",
    says=["1777 1000 /data", "755 0 /data/x", "1777 0 /tmp"],
)

# -- what files are ----------------------------------------------------------------------------------------------------

shows(
    "attributes",
    i.tar(entry("x", content="x", pax_headers=ATTRIBUTES), program("bin/tool", "#!/bin/sh\n", pax_headers=ATTRIBUTES)),
    script="/bin/tool; cat /x",
    User="app",
    says=["x"],
)
shows(
    "modes and times",
    i.tar(
        program("s", "", mode=0o6755),
        text("future", "", mtime=4_000_000_000),
        text("past", "", mtime=-1000),
        text("half", "", mtime=1.5),
        folder("ro", mode=0o555),
        text("ro/x", "x"),
        entry("pipe", tarfile.FIFOTYPE),
    ),
    script="stat -c '%a %Y' /s /future /past /ro; cat /ro/x; test -p /pipe && echo ' pipe'",
    says=["6755 0", "644 4000000000", "644 -1000", "555 0", "x pipe"],
)
shows(
    "owners",
    i.tar(
        *(text(f"o/{uid}", "", uid=uid, gid=uid) for uid in (0, 1, 1000, 65534, 65535)),
        text("o/high", "text", uid=100_000, gid=2_000_000),
    ),
    script="stat -c '%u %g' /o/*; echo more >> /o/high && cat /o/high",
    says=["0 0", "1 1", "1000 1000", "65534 65534", "65535 65535", "65534 65534", "textmore"],
)
shows(
    "names",
    i.tar(
        text("n/grüße 🌍", ""),
        text(b"n/\xff\xfe".decode("utf-8", "surrogateescape"), ""),
        text("n/" + "l" * 255, ""),
        text("n/new\nline", ""),
    ),
    i.tar(text("m/" + "d/" * 60 + "x" * 150, "gnu"), format=tarfile.GNU_FORMAT),
    script="ls /n | busybox wc -c; cat /m/" + "d/" * 60 + "x*; test -e '/n/grüße 🌍' && echo ' unicode'",
    says=["281", "gnu unicode"],
)
shows("said twice", i.tar(text("a", "old"), text("a", "new\n")), script="cat /a", says=["new"])
shows(
    "devices below dev are left out",
    i.tar(folder("dev"), entry("dev/sda", tarfile.BLKTYPE, devmajor=8)),
    script="ls /dev/sda 2>&1 | busybox wc -l",
    says=["1"],
)
refused("a device elsewhere", i.tar(entry("srv/sda", tarfile.BLKTYPE, devmajor=8)), by="'srv/sda' is a device")
refused("a kind that there is not", i.tar(entry("x", b"V")), by="of the kind b'V'")
refused("a path with ..", i.tar(text("a/../../x", "")), by="'a/../../x' points out of the image")
refused("a whiteout with ..", i.tar(text("a/.wh...", "")), by="points out of the image")
shows("an absolute path", i.tar(text("/abs/x", "in\n")), script="cat /abs/x", says=["in"])
refused("a name that is too long", i.tar(text("n" * 256, "")), by="cannot be made: File name too long")
refused("an empty link", i.tar(link("a", "")), by="'a' cannot be made|cannot be made: No such file")
refused("a file as a directory", i.tar(text("a", ""), text("a/b", "")), by="'a' is used as a directory but is none")
refused(
    "an attribute that is too large",
    i.tar(entry("x", pax_headers={"SCHILY.xattr.user.big": "x" * 100_000})),
    by="the attribute 'user.big' of 'x' cannot be kept",
)


def _sparse() -> bytes:
    info, _ = text("hole", "")
    info.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.map": "50000000,3",
        "GNU.sparse.size": "50000003",
    }
    info.size = 3
    return i.tar((info, b"end"))


shows(
    "a file with holes",
    _sparse(),
    script="busybox wc -c < /hole; tail -c 3 /hole; echo; test $(du -k /hole | cut -f1) -lt 1000 && echo small",
    says=["50000003", "end", "small"],
)
