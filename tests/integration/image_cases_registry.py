"""The corpus, second part: how images are packed and described, what is broken on the way, and bombs."""

from __future__ import annotations

import gzip
import json
import tarfile
from dataclasses import replace
from typing import Any

import zstandard
from image_cases import BASE, EMPTY, HERE, NOTE, OTHER, STATIC, case, refused, shows

from pantala.images.platforms import BASELINES
from pantala.testing import images as i
from pantala.testing.images import Layer, Made, digest_of, entry, folder, index, text

ZSTD = f"{i.OCI_LAYER}+zstd"
GZIP = f"{i.OCI_LAYER}+gzip"
SKIPPABLE = b"\x50\x2a\x4d\x18" + (7).to_bytes(4, "little") + b"a table"
CAT = {"Cmd": ["/bin/cat", "/note"]}


def note(blob: bytes, media_type: str = GZIP, **more: Any) -> Layer:
    return Layer(plain=NOTE, blob=blob, media_type=media_type, **more)


# -- packed ------------------------------------------------------------------------------------------------------------

for name, layer in {
    "plain": note(NOTE, i.OCI_LAYER),
    "gzip of several members": note(gzip.compress(NOTE[:700]) + gzip.compress(NOTE[700:])),
    "gzip padded with zeros": note(i.packed(NOTE) + bytes(3000)),
    "zstd": note(zstandard.compress(NOTE), ZSTD),
    "zstd of several frames": note(zstandard.compress(NOTE[:700]) + zstandard.compress(NOTE[700:]), ZSTD),
    "zstd with tables of its own": note(SKIPPABLE + zstandard.compress(NOTE) + SKIPPABLE, ZSTD),
    "zstd that is called gzip": note(zstandard.compress(NOTE)),
    "a foreign layer that was pushed too": note(
        i.packed(NOTE), "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
    ),
}.items():
    shows(name, layer, script="cat /note", says=["here"])
refused("gzip cut short", note(i.packed(NOTE)[:-20]), by="ends in the middle of its compressed data")
refused(
    "gzip and something else", note(i.packed(NOTE) + b"more"), by="other data follows the end of its compressed data"
)
refused("zstd cut short", note(zstandard.compress(NOTE)[:-5], ZSTD), by="ends in the middle of its compressed data")
refused("xz", note(b"\xfd7zXZ\0" + bytes(50)), by="it is compressed with xz; layers are plain tar, gzip or zstd")
refused("no archive at all", Layer(plain=b"#!/bin/sh\n" * 100), by="it is not a readable layer")
refused("an archive cut short", Layer(plain=STATIC[:100_000]), by="it is not a readable layer")

# -- broken on the way -------------------------------------------------------------------------------------------------


def fresh(name: str) -> tuple[Made, bytes]:
    """An image that no other case has anything of, but for the base; and the blob of its last layer."""
    plain = i.tar(text("note", name))
    return i.image(BASE, plain, run=CAT | {"Env": [f"NAME={name}"]}), i.packed(plain)


def damaged() -> Made:
    """The registry has other bytes for the layer than its digest says."""
    made, blob = fresh("damaged")
    return replace(made, blobs=made.blobs | {digest_of(blob): bytes([blob[0] ^ 1]) + blob[1:]})


def sized(size: int) -> Made:
    made, _ = fresh(f"sized {size}")
    document = json.loads(made.manifest)
    document["layers"][-1]["size"] = size
    return replace(made, manifest=json.dumps(document).encode())


def without(*, config: bool) -> Made:
    """The registry lost the config, or the last layer."""
    made, _ = fresh(f"without {config}")
    document = json.loads(made.manifest)
    lost = document["config"] if config else document["layers"][-1]
    return replace(made, blobs={digest: blob for digest, blob in made.blobs.items() if digest != lost["digest"]})


def elsewhere() -> Made:
    """A layer that only its makers may hand out, as its manifest says where."""
    kind = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
    there = Layer(plain=i.tar(text("far", "")), media_type=kind, more={"urls": ["http://127.0.0.1:1/layer"]})
    made = i.image(BASE, there, run=CAT)
    return replace(made, blobs={digest: blob for digest, blob in made.blobs.items() if digest != digest_of(there.blob)})


WRONG = digest_of(b"wrong")
case(
    "a blob of another digest",
    damaged,
    refused="for sha256:[0-9a-f]{64} is not that blob: its digest is",
    lies=True,
)
case(
    "a blob that is longer than said",
    lambda: sized(10),
    refused="has more than 10 bytes, the manifest says 10",
    lies=True,
)
case(
    "a blob that is shorter than said", lambda: sized(9999), refused=r"has \d+ bytes, the manifest says 9999", lies=True
)
case("a layer that is not there", lambda: without(config=False), refused="does not have its blob sha256:", lies=True)
case("a config that is not there", lambda: without(config=True), refused="does not have its blob sha256:", lies=True)
case(
    "a foreign layer that is elsewhere",
    elsewhere,
    refused="does not have its blob sha256:",
    lies=True,
)
case(
    "a layer that is not the config's",
    lambda: i.image(BASE, NOTE, run=CAT, config={"rootfs": {"diff_ids": [digest_of(BASE), WRONG]}}),
    refused=f"unpacks to {digest_of(NOTE)}, its config .rootfs.diff_ids. says {WRONG}",
)
case(
    "fewer layers than the config names",
    lambda: i.image(BASE, run=CAT, config={"rootfs": {"diff_ids": [digest_of(BASE), WRONG]}}),
    refused="its config names 2 layers .rootfs.diff_ids., its manifest 1",
)
case(
    "a config that names no layers",
    lambda: i.image(BASE, NOTE, run=CAT, config={"rootfs": None}),
    says=["here"],
)

# -- described ---------------------------------------------------------------------------------------------------------


def configured(blob: bytes) -> Made:
    return i.image(BASE, config_blob=blob)


case("a config that is no JSON", lambda: configured(b"{"), refused="its config sha256:.* is not JSON", lies=True)
case(
    "a config that is a list", lambda: configured(b"[]"), refused="has no readable config: Expected `object`", lies=True
)
case(
    "a config that is nested", lambda: configured(b"[" * 60_000), refused="its config sha256:.* is not JSON", lies=True
)
case(
    "a config that is too large", lambda: configured(b" " * 70_000), refused="has 70000 bytes, at most 65536", lies=True
)
case(
    "a config with a command of one word",
    lambda: i.image(BASE, run={"Cmd": "/bin/sh"}),
    refused=r"Expected `array.*`, got `str` - at `\$.config.Cmd`",
)
case(
    "a chart",
    lambda: i.image(NOTE, config_type="application/vnd.cncf.helm.config.v1+json"),
    refused="is no container image: its config is of the type 'application/vnd.cncf.helm.config",
)
case(
    "an encrypted layer",
    lambda: i.image(note(NOTE, f"{GZIP}+encrypted")),
    refused="is of the type '.*encrypted', which holds no files",
)
case(
    "Docker's schema 2",
    lambda: i.image(
        Layer(plain=BASE, media_type=i.DOCKER_LAYER),
        Layer(plain=NOTE, media_type=i.DOCKER_LAYER),
        run=CAT,
        media_type=i.DOCKER,
        config_type=i.DOCKER_CONFIG,
    ),
    says=["here"],
)
case(
    "Docker's schema 1",
    lambda: Made(manifest=b'{"schemaVersion": 1, "name": "app"}', media_type=i.DOCKER_SCHEMA_1, blobs={}),
    refused="is an image of Docker's schema 1",
    lies=True,
)
case(
    "another processor's image",
    lambda: i.image(BASE, config={"architecture": OTHER, "variant": "v8"}),
    refused=f"is made for linux/{OTHER}/v8, this host needs linux/{HERE}",
)
case(
    "an image of Windows",
    lambda: i.image(BASE, config={"os": "windows", "architecture": "amd64"}),
    refused=f"is made for windows/amd64, this host needs linux/{HERE}",
)


def here(said: str = "here") -> Made:
    return i.image(BASE, i.tar(text("note", f"{said}\n")), run=CAT)


def linux(architecture: str = HERE, variant: str = "") -> dict[str, str]:
    return {"os": "linux", "architecture": architecture} | ({"variant": variant} if variant else {})


def attestation() -> tuple[Made, dict[str, str]]:
    about = i.image(Layer(plain=b"{}", blob=b"{}", media_type="application/vnd.in-toto+json"))
    return about, {"os": "unknown", "architecture": "unknown"}


case(
    "an index with attestations",
    lambda: index(attestation(), (here("other"), linux(OTHER)), (here(), linux()), attestation()),
    says=["here"],
)
case("an index in an index", lambda: index((index((here(), linux())), None), media_type=i.OCI_INDEX), says=["here"])
case(
    "an index in an index for another",
    lambda: index((index((here("other"), linux(OTHER))), None), (index((here(), linux())), None)),
    says=["here"],
)
case("an index that names no platform", lambda: index((here(), None)), says=["here"])
case(
    "Docker's list",
    lambda: index((here("other"), linux(OTHER)), (here(), linux()), media_type=i.DOCKER_LIST),
    says=["here"],
)
case(
    "variants, of which the one for all is taken",
    lambda: index((here("newer"), linux(HERE, "v99")), (here(), linux(HERE, BASELINES.get(HERE, "")))),
    says=["here"],
)
case(
    "a variant that this processor is not",
    lambda: index((here(), linux(HERE, "v99")), attestation()),
    refused=f"is made for linux/{HERE}/v99, this host needs linux/{HERE}",
)
case(
    "an index for others only",
    lambda: index(
        (here(), linux(OTHER)), (here(), linux("s390x")), (here(), {"os": "windows", "architecture": "amd64"})
    ),
    refused=f"is made for linux/{OTHER}, linux/s390x, windows/amd64, this host needs linux/{HERE}",
)
case("an index of attestations only", lambda: index(attestation()), refused="is made for no platform")
case("an index of nothing", index, refused="is made for no platform", lies=True)


def endless() -> Made:
    """Indexes in one another, more than anybody needs."""
    made = here()
    for _ in range(30):
        made = index((made, None))
    return made


case("indexes without end", endless, refused="its index leads to too many others", lies=True)


def described(digest: str, more: dict[str, Any]) -> bytes:
    return json.dumps({"config": {"mediaType": i.OCI_CONFIG, "digest": digest, "size": 2}} | more).encode()


NESTED, OF_512 = b"[" * 200_000, "sha512:" + "0" * 128
for name, body, said in (
    ("a manifest that is too large", b" " * 300_000, "its manifest is too large, at most 262144 bytes"),
    ("a manifest that is nested", NESTED, "its manifest is not JSON"),
    ("a manifest that is a list", b"[]", "its manifest is not an object"),
    ("a manifest without layers", described(WRONG, {}), "has no readable manifest: 'layers' is missing"),
    ("a manifest with another digest", described(OF_512, {"layers": []}), r"has no readable manifest: .* `\$.digest`"),
):
    case(name, lambda body=body: Made(manifest=body, media_type=i.OCI, blobs={}), refused=said, lies=True)

# -- bombs -------------------------------------------------------------------------------------------------------------

ZEROS = gzip.compress(bytes(16 * 1024**2))


def of_zeros(times: int) -> Layer:
    """`times` 16 MiB of zeros in 16 KiB each, behind an archive's end."""
    return Layer(plain=EMPTY, blob=i.packed(EMPTY) + ZEROS * times)


def large(name: str, size: int) -> bytes:
    """The head of an archive with a file of that size; what follows is up to the compressor."""
    info, _ = entry(name)
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT)


refused("zeros behind the end, gzip", of_zeros(100), by="unpacks to more than 200 times its size")
refused(
    "zeros in a file, zstd",
    Layer(plain=EMPTY, blob=zstandard.compress(large("f", 20_000_000) + bytes(20_000_000)), media_type=ZSTD),
    by="unpacks to more than 200 times its size",
)
refused(
    "a window that no host has",
    Layer(plain=EMPTY, blob=b"\x28\xb5\x2f\xfd\x00\xff" + bytes(64), media_type=ZSTD),
    by="it is not a readable layer",
)
refused("a file of a terabyte", Layer(plain=large("f", 2**40)), by="unpacks to more than 67108864 bytes")
refused("a file of less than nothing", Layer(plain=large("f", -(2**40))), by="claims to hold|not a readable layer")
refused("many files", i.tar(*(text(f"f{n}", "") for n in range(1_001))), by="it holds more than 1000 entries")
refused(
    "many directories that nobody names",
    i.tar(*(text(f"{n}/" + "d/" * 200 + "f", "") for n in range(30))),
    by="it holds more than 1000 entries",
)
refused(
    "directories without end",
    i.tar(text("d/" * 300 + "f", "")),
    by="it holds a path of more than 255 directories",
)
refused(
    "links to links, deeper each time",
    i.tar(
        folder("a"),
        *(
            e
            for n in range(30)
            for e in (text(f"l{n}/" + "d/" * 200 + "f", ""), i.link(f"l{n + 1}", f"l{n}/" + "d/" * 200))
        ),
    ),
    by="it holds more than 1000 entries",
)
refused(
    "a name of a gigabyte",
    Layer(plain=tarfile.TarInfo("././@LongLink").tobuf(tarfile.GNU_FORMAT)[:124] + b"10000000000\0" + bytes(376)),
    by="not a readable layer",
)
case(
    "more than an image may hold",
    lambda: i.image(*(i.tar(text(f"f{n}", "\x01\x02\x03" * 20_000_000)) for n in range(3)), run={"Cmd": ["/x"]}),
    refused="unpacks to more than 150000000 bytes|200 times its size",
)
