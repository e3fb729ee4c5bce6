"""What a source directory is, and a Dockerfile for it that can be read and kept.

First match wins: an own Dockerfile, Flask, static files. What is not recognised is said so, with what would help.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

DOCKERFILES = ("Dockerfile", "dockerfile", "Containerfile")
_REQUIREMENT = re.compile(r"^\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[[^\]]*\])?\s*(.*?)\s*(?:[;#].*)?$")
_FLASK_OBJECT = re.compile(r"^(\w+)\s*(?::[^=]+)?=\s*(?:flask\.)?Flask\(", re.MULTILINE)
_FLASK_FACTORY = re.compile(r"^def\s+(create_app|make_app)\s*\(", re.MULTILINE)
_EXPOSE = re.compile(r"^\s*EXPOSE\s+(\d+)(?:/tcp)?\b", re.MULTILINE | re.IGNORECASE)

PYTHON = "3.11"


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """`files`: texts to write into the directory, unless they are there. `family` is shown to the user."""

    family: str
    port: int
    files: dict[str, str] = {}
    notes: tuple[str, ...] = ()


def scan(root: Path) -> Source | None:
    """What the directory holds; None when nothing is recognised."""
    for name in DOCKERFILES:
        if (root / name).is_file():
            return _dockerfile(root / name)
    return _flask(root) or _static(root)


def exposed_port(dockerfile: str) -> int | None:
    """The first EXPOSE of a Dockerfile."""
    found = _EXPOSE.search(dockerfile)
    return int(found[1]) if found else None


def _dockerfile(path: Path) -> Source:
    port = exposed_port(path.read_text(errors="replace"))
    notes = () if port else (f"{path.name} has no EXPOSE; the app is expected on port 8080",)
    return Source(family="Dockerfile", port=port or 8080, notes=notes)


# -- Flask -----------------------------------------------------------------------------------------------------------


def _flask(root: Path) -> Source | None:
    requirements = _requirements(root)
    if "flask" not in requirements:
        return None
    target = _flask_target(root)
    if target is None:
        return None
    install = (
        "COPY requirements.txt ./\n"
        "RUN --mount=type=cache,target=/root/.cache/pip \\\n"
        "    pip install --no-compile -r requirements.txt{extra} && \\\n"
        "    python -m compileall -q --invalidation-mode unchecked-hash \\\n"
        "        \"$(python -c 'import flask, pathlib; print(pathlib.Path(flask.__file__).parents[1])')\"\n"
    )
    extra = "" if "gunicorn" in requirements else " gunicorn==23.0.0"
    notes = ["production server: gunicorn, not Flask's development server"]
    if extra:
        notes.append("requirements.txt does not name gunicorn; the Dockerfile installs it")
    dockerfile = (
        "# Flask behind gunicorn. Dependencies are a layer of their own: changing the app alone does not reinstall\n"
        "# them. Byte code is compiled without timestamps, so the same source makes the same image.\n"
        f"FROM python:{_python_version(root)}-slim\n"
        "\n"
        "ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1\n"
        "WORKDIR /app\n"
        "\n"
        f"{install.format(extra=extra)}"
        "\n"
        "COPY . .\n"
        "USER 10001:10001\n"
        "\n"
        "EXPOSE 8080\n"
        f'CMD ["gunicorn", "--bind", "0.0.0.0:8080", "--workers", "2", "--threads", "4", "{target}"]\n'
    )
    return Source(
        family="Flask",
        port=8080,
        files={"Dockerfile": dockerfile, ".dockerignore": PYTHON_IGNORE},
        notes=tuple(notes),
    )


PYTHON_IGNORE = """\
.git
.venv
venv
__pycache__
**/*.pyc
.env
fly.toml
Dockerfile
.dockerignore
"""


def _requirements(root: Path) -> dict[str, str]:
    """Lower-case names of what the project depends on, with their version text."""
    names: dict[str, str] = {}
    path = root / "requirements.txt"
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            if (found := _REQUIREMENT.match(line)) and not line.lstrip().startswith(("#", "-")):
                names[found[1].lower().replace("_", "-")] = found[2]
    return names


def _flask_target(root: Path) -> str | None:
    """`module:object` for gunicorn, found in the usual files."""
    for name in ("wsgi.py", "app.py", "main.py", "application.py", "hello.py"):
        path = root / name
        if not path.is_file():
            continue
        text = path.read_text(errors="replace")
        if found := _FLASK_OBJECT.search(text):
            return f"{path.stem}:{found[1]}"
        if found := _FLASK_FACTORY.search(text):
            return f"{path.stem}:{found[1]}()"
        if re.search(r"^(?:from|import)\s", text, re.MULTILINE) and re.search(r"\bapp\b", text):
            return f"{path.stem}:app"
    return None


def _python_version(root: Path) -> str:
    """The project's own wish (`.python-version`, `requires-python`, `runtime.txt`), else ours."""
    for name, pattern in ((".python-version", r"^(\d+\.\d+)"), ("runtime.txt", r"^python-(\d+\.\d+)")):
        path = root / name
        if path.is_file() and (found := re.search(pattern, path.read_text(errors="replace"))):
            return found[1]
    return PYTHON


# -- static ----------------------------------------------------------------------------------------------------------


def _static(root: Path) -> Source | None:
    folder = next(
        (name for name in ("", "public", "dist", "build", "site") if (root / name / "index.html").is_file()), None
    )
    if folder is None:
        return None
    dockerfile = (
        "# A static site behind nginx.\n"
        "FROM nginx:1.22\n"
        "\n"
        "COPY nginx.conf /etc/nginx/nginx.conf\n"
        f"COPY {folder or '.'} /srv\n"
        "\n"
        "EXPOSE 8080\n"
    )
    return Source(
        family="static site",
        port=8080,
        files={"Dockerfile": dockerfile, "nginx.conf": NGINX_CONF, ".dockerignore": STATIC_IGNORE},
    )


STATIC_IGNORE = """\
.git
fly.toml
Dockerfile
.dockerignore
"""

NGINX_CONF = """\
worker_processes 1;
events { worker_connections 1024; }
http {
  include /etc/nginx/mime.types;
  access_log off;
  sendfile on;
  gzip_static on;
  server {
    listen 8080;
    root /srv;
    location / { try_files $uri $uri/ $uri.html /404.html =404; }
    location = /nginx.conf { return 404; }
  }
}
"""
