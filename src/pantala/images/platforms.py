"""Which entry of an image index is for this host. Pure, but for one look at the processor."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import msgspec

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "riscv64": "riscv64", "ppc64le": "ppc64le", "s390x": "s390x"}
BASELINES = {"amd64": "v1", "arm64": "v8"}
"""The variant that every processor of the architecture runs; no variant means the same."""

_AMD64_LEVELS = (
    {"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"},
    {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"},
    {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"},
)
"""Processor flags that the variants v2, v3 and v4 add, as Linux names them."""


class Platform(msgspec.Struct, frozen=True):
    os: str = ""
    architecture: str = ""
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part) or "no platform"


def host_architecture() -> str:
    return ARCHITECTURES.get(platform.machine(), platform.machine())


@functools.cache
def host_variants() -> tuple[str, ...]:
    """Variants of its architecture that this host runs, the one that runs anywhere first."""
    architecture = host_architecture()
    if architecture != "amd64":
        return (BASELINES[architecture],) if architecture in BASELINES else ()
    return amd64_variants(_processor_flags())


def amd64_variants(flags: set[str]) -> tuple[str, ...]:
    variants = ["v1"]
    for level, needed in enumerate(_AMD64_LEVELS, start=2):
        if not needed <= flags:
            break
        variants.append(f"v{level}")
    return tuple(variants)


def _processor_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return set(value.split())
    return set()


def rank(wanted: Platform) -> int | None:
    """How well this host suits: the lowest first, so that all hosts of a kind choose the same; None if not at all."""
    if wanted.os != "linux" or wanted.architecture != host_architecture():
        return None
    variants = host_variants()
    if wanted.variant in ("", BASELINES.get(wanted.architecture)):
        return 0
    return variants.index(wanted.variant) if wanted.variant in variants else None


def needed() -> str:
    return f"linux/{host_architecture()}"
