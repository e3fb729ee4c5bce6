"""The documents name what is there: files, commands, keys of fly.toml, benchmarks."""

from __future__ import annotations

import ast
import re
import runpy
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("src/**/README.md"), *ROOT.glob("crates/*/README.md")]
)
PATH = re.compile(r"(?<![\w./-])(?:src|crates|tests|scripts|benchmarks|schemas|examples|docs)/[\w./-]+")
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
READERS = {
    "raw", "string", "boolean", "integer", "number", "port", "choice", "seconds", "strings", "string_map", "mapping",
    "table", "tables", "named_tables", "_clamped", "_command", "_wait", "_words",
}  # fmt: skip
WITH_SPELLINGS = {"raw", "string", "integer", "port", "table", "tables"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_and_link_on_a_page_leads_somewhere(page: Path) -> None:
    text = page.read_text()
    named = {found.rstrip(".-/") for found in PATH.findall(text)}
    gone = sorted(name for name in named if not (ROOT / name).exists())
    gone += [target for target in LINK.findall(text) if not (page.parent / target).exists()]
    assert gone == []


def test_the_command_reference_is_what_the_commands_say() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "cli_reference.py"))
    assert (ROOT / "docs" / "reference" / "cli.md").read_text() == script["page"](), "run scripts/cli_reference.py"


def test_the_api_reference_is_what_the_endpoints_say() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "api_reference.py"))
    assert (ROOT / "docs" / "reference" / "api.md").read_text() == script["page"](), "run scripts/api_reference.py"


def test_every_key_that_the_parser_asks_for_is_in_the_guide() -> None:
    known = asked_keys(ROOT / "src" / "pantala" / "appconfig")
    assert {"app", "http_service", "replay_cache", "build_target", "buildpacks", "release_command_timeout"} <= known
    told = set(re.findall(r"`([\w-]+)`", (ROOT / "docs" / "guides" / "fly-toml.md").read_text()))
    assert sorted(known - told) == []


def test_every_metric_of_the_proxy_is_in_the_reference() -> None:
    proxy = ROOT / "crates" / "pantala-proxy" / "src"
    mesh = (proxy / "mesh" / "report.rs").read_text()
    known = set(re.findall(r'"pantala_proxy_(\w+)"', (proxy / "admin.rs").read_text() + mesh))
    known |= {f"mesh_{name}_total" for name in re.findall(r'\(\s*"(\w+)",\s*"[^"]+",\s*&m\.', mesh)}
    assert {"waiting", "handover_draining", "mesh_requests_total", "mesh_pings_missed_total"} <= known
    told = set(re.findall(r"`([\w]+)`", (ROOT / "docs" / "reference" / "metrics.md").read_text()))
    assert sorted(known - told) == []


def asked_keys(package: Path) -> set[str]:
    """Keys in the sources: arguments of the reader's look-ups, and the tuples that loops take keys from."""
    keys: set[str] = set()
    for source in sorted(package.glob("parse*.py")):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Call):
                function = node.func
                name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
                if name in READERS:
                    words = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                    keys.update(words if name in WITH_SPELLINGS else words[:1])
            elif isinstance(node, ast.For | ast.comprehension):
                keys.update(keys_of_loop(node))
    return keys


def keys_of_loop(loop: ast.For | ast.comprehension) -> list[str]:
    """`for key in ("one", "two")`"""
    if getattr(loop.target, "id", "") != "key" or not isinstance(loop.iter, ast.Tuple):
        return []
    return [str(item.value) for item in loop.iter.elts if isinstance(item, ast.Constant)]


def test_every_dependency_has_its_reason() -> None:
    page = (ROOT / "docs" / "contributing" / "dependencies.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    names = [re.split(r"[><=\[ ]", entry)[0] for entry in wanted]
    names += tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["dependencies"]
    told = set(re.findall(r"[\w-]+", page))
    assert sorted(name for name in names if name not in told and not name.startswith("pantala-")) == []


def test_every_published_number_has_a_command_that_exists() -> None:
    page = (ROOT / "SPECIFICATION.md").read_text()
    named = set(re.findall(r"make bench NAME=(\w+)", page))
    there = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    boxed = {"wake", "create", "deploy", "cli", "memory"}
    assert named == boxed | {"api", "mesh", "catalogue", "placement", "proxy", "regions", "routes", "trace"}
    assert named <= there
