"""Operations of the original that come later: each says so, and what to do meanwhile, with 501."""

from __future__ import annotations

from pantala.server.endpoint import Endpoint, not_offered

VOLUMES = "volumes are not offered by this version; keep what must last in a database or an object store elsewhere"
OIDC = "OpenID Connect tokens are not offered by this version; give the machine a secret instead"
KMS = "KMS tokens are not offered by this version; the API token itself may use /v1/apps/{app}/secretkeys"
POSTGRES = "managed Postgres is not offered by this version; run one as an app, or use one from elsewhere"

_VOLUMES = "/v1/apps/{app}/volumes"
_VOLUME = f"{_VOLUMES}/{{volume}}"
_CLUSTERS = "/v1/postgres"
_CLUSTER = f"{_CLUSTERS}/{{cluster}}"


def _volume(method: str, path: str, summary: str) -> Endpoint:
    return not_offered(method, path, tag="Volumes", summary=summary, later=VOLUMES)


def _postgres(method: str, path: str, summary: str) -> Endpoint:
    return not_offered(method, path, tag="Postgres", summary=summary, later=POSTGRES)


ENDPOINTS = [
    _volume("GET", _VOLUMES, "Volumes of an app"),
    _volume("POST", _VOLUMES, "Create a volume"),
    _volume("GET", _VOLUME, "One volume"),
    _volume("PUT", _VOLUME, "Change a volume"),
    _volume("POST", _VOLUME, "Change a volume, as the older description has it"),
    _volume("DELETE", _VOLUME, "Destroy a volume"),
    _volume("PUT", f"{_VOLUME}/extend", "Make a volume larger"),
    _volume("GET", f"{_VOLUME}/snapshots", "Snapshots of a volume"),
    _volume("POST", f"{_VOLUME}/snapshots", "Take a snapshot of a volume"),
    _volume("GET", "/v1/orgs/{org}/volumes", "Volumes of all apps of an org"),
    not_offered("POST", "/v1/tokens/oidc", tag="Accounts", summary="An OpenID Connect token", later=OIDC),
    not_offered("POST", "/v1/tokens/kms", tag="Accounts", summary="A token for secret keys", later=KMS),
    _postgres("GET", _CLUSTERS, "Clusters"),
    _postgres("POST", _CLUSTERS, "Create a cluster"),
    _postgres("GET", _CLUSTER, "One cluster"),
    _postgres("DELETE", _CLUSTER, "Delete a cluster"),
    *(
        _postgres(method, f"{_CLUSTER}/{part}", f"{part.replace('_', ' ').capitalize()} of a cluster")
        for part in ("attachments", "backups", "databases", "extensions", "users")
        for method in ("GET", "POST")
    ),
    _postgres("POST", f"{_CLUSTER}/fork", "Fork a cluster"),
    _postgres("POST", f"{_CLUSTER}/restore", "Restore a cluster"),
    _postgres("GET", f"{_CLUSTER}/users/{{user}}/credentials", "How a user of a cluster logs in"),
    _postgres("POST", f"{_CLUSTER}/users/{{user}}/rotate_password", "A new password for a user of a cluster"),
]
