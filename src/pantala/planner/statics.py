"""Which files of an app go into a bucket, which are there already, and which pushes may go. Pure; the keys are
described in `wire/statics.py`, `control/statics.py` carries it out.

A page that a browser opened before a deploy asks for its scripts and pictures after it. Names that hold a
fingerprint of their content mean the same for ever, so the newest push keeps those of the pushes before it; any
other name that the project no longer has is gone with the deploy.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import msgspec

from pantala.wire.statics import FileContent, Manifest

KEPT_PUSHES = 3
"""Of each folder, the newest included; as many as the original keeps."""
_LOADED_BY_PAGES = frozenset(
    "avif css gif ico jpeg jpg js map mjs mp3 mp4 ogg otf png svg ttf wasm wav webm webp woff woff2".split()
)
_FINGERPRINT = re.compile(
    r"""(?=.*[0-9])(?=.*[a-f])[0-9a-f]{8,}      # hexadecimal: webpack, Rails, Django, Hugo
      | (?=.*[2-7])(?=.*[A-Z])[A-Z2-7]{8}       # base 32: esbuild
      | (?=.*[a-z])(?=.*[a-zA-Z0-9_][A-Z])[A-Za-z0-9_]{8}(?:[A-Za-z0-9_]{4})?  # base 64: Vite, Rollup
    """,
    re.VERBOSE,
)


class PushPlan(msgspec.Struct, frozen=True, kw_only=True):
    """`same`: the push that has just these files. Else `uploads`, and which push has each file of `copies` (the
    project's own, unchanged) and of `kept_from` (older, still asked for)."""

    same: str | None = None
    uploads: list[str] = []
    copies: dict[str, str] = {}
    kept: dict[str, FileContent] = {}
    kept_from: dict[str, str] = {}


def plan_push(files: Mapping[str, FileContent], earlier: Mapping[str, Manifest]) -> PushPlan:
    """`earlier`: the complete pushes of the same folder, by id."""
    newest_first = sorted(earlier, reverse=True)[:KEPT_PUSHES]
    if newest_first and earlier[newest_first[0]].files == files:
        return PushPlan(same=newest_first[0])
    copies: dict[str, str] = {}
    kept: dict[str, FileContent] = {}
    kept_from: dict[str, str] = {}
    for push in newest_first:
        for path, content in earlier[push].files.items():
            if files.get(path) == content:
                copies.setdefault(path, push)
            elif path not in files and path not in kept and fingerprinted(path):
                kept[path], kept_from[path] = content, push
    uploads = [path for path in sorted(files) if path not in copies]
    return PushPlan(uploads=uploads, copies=copies, kept=kept, kept_from=kept_from)


def fingerprinted(path: str) -> bool:
    """Whether a bundler has put a hash of what a page loads into its name: `main.3f2a9c1b.js`, `index-DiwrgTda.css`.
    Rather too strict than too loose: what somebody removed from the project must not stay."""
    name, _, kind = path.rpartition("/")[2].rpartition(".")
    words = re.split(r"[.-]", name)[1:]  # the first is the file's own name
    return kind.lower() in _LOADED_BY_PAGES and any(_FINGERPRINT.fullmatch(word) for word in words)


def plan_cleaning(pushes: Mapping[str, str], *, used: Collection[str]) -> list[str]:
    """Complete pushes that may go, oldest first. `pushes`: id and folder (`url_prefix`) of each; `used`: those that
    machines name."""
    gone: list[str] = []
    for folder in sorted(set(pushes.values())):
        of_folder = sorted((push for push, prefix in pushes.items() if prefix == folder), reverse=True)
        gone += [push for push in of_folder[KEPT_PUSHES:] if push not in used]
    return sorted(gone)
