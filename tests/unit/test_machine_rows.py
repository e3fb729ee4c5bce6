"""What a machine's metadata becomes in its row: private names may ask for it, and rows are small."""

from __future__ import annotations

from pantala.agent.view import METADATA_BYTES_MAX, named_metadata


def test_the_users_own_entries_have_names() -> None:
    given = {"role": "leader", "fly_release_id": "r1", "fly_platform_version": "v2", "process_group": "web"}
    assert named_metadata(given) == {"role": "leader"}


def test_short_entries_go_first_and_the_row_stays_small() -> None:
    given = {f"key{number}": "x" * number for number in range(60)}
    kept = named_metadata(given)
    assert list(kept) == [f"key{number}" for number in range(len(kept))]
    assert sum(len(key) + len(value) for key, value in kept.items()) <= METADATA_BYTES_MAX
    assert kept
