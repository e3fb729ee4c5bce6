"""What tests measured on the way: told at the end of the run, also of those that passed."""

from __future__ import annotations

FIGURES: list[str] = []


def tell(text: str) -> None:
    FIGURES.append(text)
    print(text)
