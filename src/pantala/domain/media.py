"""Content types by the name of a file, as `crates/pantala-wire/src/media.rs` has them: what a deploy puts into a bucket
says the same as what a machine's own file server says."""

from __future__ import annotations

UNKNOWN = "application/octet-stream"
_TYPES = {
    "html htm": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js mjs": "text/javascript; charset=utf-8",
    "json map": "application/json",
    "txt log": "text/plain; charset=utf-8",
    "md": "text/markdown; charset=utf-8",
    "csv": "text/csv; charset=utf-8",
    "xml": "application/xml",
    "svg": "image/svg+xml",
    "png": "image/png",
    "jpg jpeg": "image/jpeg",
    "gif": "image/gif",
    "webp": "image/webp",
    "avif": "image/avif",
    "ico": "image/x-icon",
    "woff": "font/woff",
    "woff2": "font/woff2",
    "ttf": "font/ttf",
    "otf": "font/otf",
    "wasm": "application/wasm",
    "pdf": "application/pdf",
    "webmanifest": "application/manifest+json",
    "mp3": "audio/mpeg",
    "ogg": "audio/ogg",
    "wav": "audio/wav",
    "mp4": "video/mp4",
    "webm": "video/webm",
    "zip": "application/zip",
    "gz": "application/gzip",
}
CONTENT_TYPES = {extension: kind for extensions, kind in _TYPES.items() for extension in extensions.split()}


def content_type(name: str) -> str:
    _, dot, extension = name.rpartition("/")[2].rpartition(".")
    return CONTENT_TYPES.get(extension.lower(), UNKNOWN) if dot else UNKNOWN
