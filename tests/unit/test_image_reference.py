from __future__ import annotations

import pytest

from pantala.errors import InvalidRequest
from pantala.images.reference import parse, unparse

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("nginx", "docker.io/library/nginx:latest"),
        ("nginx:1.25", "docker.io/library/nginx:1.25"),
        ("grafana/grafana", "docker.io/grafana/grafana:latest"),
        ("registry.pantala.test/app:deployment-01", "registry.pantala.test/app:deployment-01"),
        ("localhost:5000/a/b:c", "localhost:5000/a/b:c"),
        (f"ghcr.io/x/y@{DIGEST}", f"ghcr.io/x/y@{DIGEST}"),
        (f"ghcr.io/x/y:v1@{DIGEST}", f"ghcr.io/x/y:v1@{DIGEST}"),
    ],
)
def test_references_are_normalised_as_container_tools_do(text: str, full: str) -> None:
    assert unparse(parse(text)) == full


@pytest.mark.parametrize("text", ["", "UPPER", "a b", "x:", "x@sha256:short", "x:-bad", "../x"])
def test_what_is_no_reference_is_refused_by_field(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"config\.image"):
        parse(text)
