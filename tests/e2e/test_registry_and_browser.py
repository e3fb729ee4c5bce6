"""Stock programs against a box: skopeo at the registry, a browser at an app; both verify the certificate."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path

import pytest
from probe_rig import GREETING, admin_token, asked, deploy_probe, image_of, stranger_token

from pantala.testing.box import BoxRig

pytestmark = pytest.mark.root

APP = "showcase"
BROWSER = """\
set -e
export HOME="$1"
mkdir -p "$HOME/.pki/nssdb"
certutil -d "sql:$HOME/.pki/nssdb" -N --empty-password
certutil -d "sql:$HOME/.pki/nssdb" -A -t C,, -n box -i "$2"
exec chromium --headless --no-sandbox --disable-gpu --disable-dev-shm-usage --user-data-dir="$HOME/profile" \\
  --dump-dom "$3"
"""


@pytest.fixture(scope="module")
def showcase(box: BoxRig, tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    deploy_probe(box, tmp_path_factory.mktemp("showcase"), APP)
    yield APP
    box.pantala("apps", "destroy", APP, "--yes")


def test_skopeo_copies_the_deployed_image_with_a_token(box: BoxRig, showcase: str, tmp_path: Path) -> None:
    repository, _, digest = image_of(box, showcase).partition("@")
    deploy_token = json.loads(box.pantala("tokens", "create", "deploy", "-a", showcase, "--json").stdout)["token"]
    for number, token in enumerate((admin_token(box), deploy_token)):
        target = tmp_path / str(number)
        box.at("skopeo", "copy", "--src-creds", f"x:{token}", f"docker://{repository}", f"dir:{target}")
        manifest = json.loads((target / "manifest.json").read_bytes())
        assert all((target / layer["digest"].removeprefix("sha256:")).is_file() for layer in manifest["layers"])
    shown = box.at("skopeo", "inspect", "--creds", f"x:{deploy_token}", f"docker://{repository}")
    assert json.loads(shown.stdout)["Digest"] == digest


def test_skopeo_gets_nothing_without_a_token_or_with_anothers(box: BoxRig, showcase: str, tmp_path: Path) -> None:
    repository = image_of(box, showcase).partition("@")[0]
    box.pantala("apps", "create", "showcase-other")
    try:
        other = box.pantala("tokens", "create", "deploy", "-a", "showcase-other").stdout.strip()
        for credentials in (
            ("--no-creds",),
            ("--creds", "x:nonsense"),
            ("--creds", f"x:{stranger_token(box)}"),
            ("--creds", f"x:{other}"),
        ):
            refused = box.at("skopeo", "inspect", *credentials, f"docker://{repository}", check=False)
            assert refused.code != 0, credentials[0]
            assert "Digest" not in refused.stdout
            assert any(word in refused.stderr for word in ("unauthorized", "denied", "authentication required"))
        pushed = box.at(
            "skopeo", "copy", "--src-creds", f"x:{admin_token(box)}", "--dest-creds", f"x:{other}",
            f"docker://{repository}", f"docker://{repository.rpartition(':')[0]}:forged", check=False,
        )  # fmt: skip
        assert pushed.code != 0
    finally:
        box.pantala("apps", "destroy", "showcase-other", "--yes")


def test_a_browser_shows_the_page_and_verifies_its_certificate(box: BoxRig, showcase: str, tmp_path: Path) -> None:
    script = tmp_path / "browser.sh"
    script.write_text(BROWSER)
    authority = box.state / "control" / "ca" / "ca.pem"
    url = f"https://{showcase}.apps.pantala.test/"
    shown = box.at("sh", str(script), str(tmp_path / "home"), str(authority), url)
    assert GREETING in shown.stdout
    assert asked(box, showcase, "/") == GREETING
    stranger = tmp_path / "stranger"
    (stranger / ".pki" / "nssdb").mkdir(parents=True)
    command = ["env", f"HOME={stranger}", "chromium", "--headless", "--no-sandbox", "--disable-gpu",
               "--disable-dev-shm-usage", f"--user-data-dir={stranger / 'profile'}", "--dump-dom", url]  # fmt: skip
    assert GREETING not in box.at(*command, check=False).stdout  # without the box's authority it is not trusted
