"""A tiny root filesystem for machines in tests, from Debian's static busybox (package `busybox-static`)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from pantala.domain.runtime import ImageConfig, UnpackedImage

BUSYBOX = Path("/bin/busybox")
_DYNAMIC_LOADER = b"/lib64/ld-linux"


def busybox_image(folder: Path) -> UnpackedImage:
    """An image of one layer in `folder`: a shell with its tools, and the user `app` (1000)."""
    if not BUSYBOX.is_file() or _DYNAMIC_LOADER in BUSYBOX.read_bytes():
        raise AssertionError("the Debian package busybox-static is not installed")
    for name in ("bin", "etc", "tmp", "www", "root"):
        (folder / name).mkdir(parents=True)
    (folder / "tmp").chmod(0o1777)
    shutil.copy2(BUSYBOX, folder / "bin/busybox")
    applets = subprocess.run([str(BUSYBOX), "--list"], capture_output=True, text=True, check=True).stdout.split()
    for applet in applets:
        if applet != "busybox":
            (folder / "bin" / applet).symlink_to("busybox")
    (folder / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:App:/www:/bin/sh\n")
    (folder / "etc/group").write_text("root:x:0:\napp:x:1000:\nextra:x:1500:app\n")
    (folder / "www/index.html").write_text("hello from a machine\n")
    return UnpackedImage(digest="sha256:test", layers=(folder,), config=ImageConfig())
