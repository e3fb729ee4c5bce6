"""Where the platform is and who we are: the file that `pantala up` or `auth login` writes, and the variables over it.

`PANTALA_CONFIG_DIR` (default `~/.pantala`) holds `config.json`, mode 0600. `FLY_API_TOKEN` and `FLY_ACCESS_TOKEN`
win over its token, `FLY_FLAPS_BASE_URL` over its address, as flyctl's users expect.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from pantala.errors import InvalidRequest, Unauthenticated
from pantala.kit.secret import Secret

TOKEN_VARIABLES = ("FLY_ACCESS_TOKEN", "FLY_API_TOKEN")


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """`edge` is the address that the apps' names lead to; `ca_file` the authority that signs their certificates."""

    api_url: str = ""
    token: str = ""
    org: str = ""
    app_domain: str = ""
    edge: str = ""
    ca_file: str = ""
    box_state: str = ""

    @property
    def own_authority(self) -> Path | None:
        """Of a box: what it signs names of its users by, once it has."""
        path = Path(self.ca_file).parent.parent / "names-ca" / "ca.pem"
        return path if self.ca_file and path.is_file() else None


def config_path() -> Path:
    folder = os.environ.get("PANTALA_CONFIG_DIR")
    return (Path(folder) if folder else Path.home() / ".pantala") / "config.json"


def load_config() -> Config:
    path = config_path()
    try:
        return msgspec.json.decode(path.read_bytes(), type=Config)
    except FileNotFoundError:
        return Config()
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"{path} cannot be read: {error}", hint="remove it and log in again") from error


def save_config(config: Config) -> None:
    path = config_path()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = path.with_suffix(".new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.encode(config))
    fresh.rename(path)


def forget_config() -> None:
    config_path().unlink(missing_ok=True)


def api_url(config: Config) -> str:
    url = os.environ.get("FLY_FLAPS_BASE_URL") or config.api_url
    if not url:
        raise Unauthenticated(
            "no platform is known here",
            hint="start one with `pantala up`, or log in with `pantala auth login --api URL`",
        )
    return url


def token(config: Config) -> Secret:
    """The first variable that is set wins, even over the file."""
    for name in TOKEN_VARIABLES:
        if name in os.environ:
            return Secret(os.environ[name])
    return Secret(config.token)
