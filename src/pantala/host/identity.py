"""Who a host is: the keys it makes and keeps, what it asks to be let in with, and what it is given.

Private halves are made here and never travel: a signing key (its rows), a sealing key (secrets for its machines), the
key of its certificate and the seed of its bus user.
"""

from __future__ import annotations

import msgspec

from pantala.agent.identity import Identity
from pantala.errors import InvalidRequest
from pantala.host.place import Place
from pantala.kit.files import write_private
from pantala.kit.nkeys import NKey
from pantala.kit.sealing import Opener, Signer, ensure_key
from pantala.wire.hosts import Joined, JoinRequest, Renewed


def join_request(
    place: Place, *, region: str, node: str = "", zone: str = "", edge: bool = True, token: str = ""
) -> JoinRequest:
    """What control is asked; the keys are made on the first call and kept."""
    place.make_folders()
    return JoinRequest(
        token=token,
        node=node,
        region=region,
        zone=zone,
        address=place.address,
        edge=edge,
        verify_key=Signer(ensure_key(place.key("signing.key"))).verify_key,
        sealing_key=Opener(ensure_key(place.key("sealing.key"))).public_key,
        csr_pem=_identity(place).request(),
        bus_key=NKey.ensure("user", place.key("bus.seed")).public,
    )


def keep(place: Place, joined: Joined) -> None:
    """Write what control gave where agent, proxy and nats-server look for it; safe to repeat."""
    NKey.ensure("user", place.key("bus.seed"))
    _identity(place).keep(
        Renewed(
            certificate_pem=joined.certificate_pem,
            authority_pem=joined.authority_pem,
            user_jwt=joined.bus.user_jwt,
        )
    )
    edge_key = place.identity("edge.key")
    if joined.edge_key_sealed:
        opener = Opener(ensure_key(place.key("sealing.key")))
        write_private(edge_key, opener.open(joined.edge_key_sealed))
    else:
        edge_key.unlink(missing_ok=True)
    write_private(place.joined, msgspec.json.format(msgspec.json.encode(joined), indent=2))


def load_joined(place: Place) -> Joined | None:
    """What this host was given, or None where it has not joined."""
    try:
        return msgspec.json.decode(place.joined.read_bytes(), type=Joined)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"{place.joined}: {error}") from error


def _identity(place: Place) -> Identity:
    """The part that the agent renews."""
    return Identity(place.state_dir / "identity", place.state_dir / "keys")
