"""`pantala trace`: one request, from the edge to the machine."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from pantala.cli.output import emit, emit_json, say
from pantala.cli.session import api, json_option, run

if TYPE_CHECKING:
    from pantala.wire.feed import TraceRecord
    from pantala.wire.trace import RequestTrace, TracePart

    Arrival = tuple[TracePart, list[TraceRecord]]

NEVER_ARRIVED = ("connect", "not_sent")
"""Tries that failed so have left nothing on the machine's host."""
FAILURES = {
    "connect": "no connection",
    "not_sent": "it could not be sent",
    "stale": "the kept connection had ended",
    "died": "it ended without an answer",
}


@click.command()
@click.argument("request_id", metavar="ID")
@json_option
def trace(*, request_id: str, as_json: bool) -> None:
    """Show where a request was and how long each step took.

    ID is the Fly-Request-Id of its answer, with or without the region. Requests are kept for ten minutes at most.
    """

    from pantala.kit import request_ids

    request_ids.parse(request_id)  # what is no id need not travel

    async def main() -> None:
        async with api() as client:
            found = await client.trace(request_id)
        if as_json:
            emit_json(found)
            return
        for line in lines(found):
            emit(line)
        for one in found.unheard:
            say(f"Not heard: {one.host} ({one.reason})")

    run(main)


def lines(found: RequestTrace) -> list[str]:
    """A tree: the edge with its tries, under each what the machine's host says of it."""
    arrivals = {part.host: _arrivals(part) for part in found.parts}
    shown = [found.id]
    for part in found.parts:
        tries = [record for record in part.records if record.role == "edge"]
        if tries:
            shown.append(_place("edge", part, tries[0]))
        for record in tries:
            there = _arrival_of(record, part, tries, arrivals)
            shown += _indented(_edge_try(record, part, there))
    # What no edge speaks of: its host was not heard, or keeps it no longer.
    for left in arrivals.values():
        for part, records in left.values():
            shown += [_place("worker", part, records[0]), *_indented(_worker_tries(records))]
    return shown


def _arrivals(part: TracePart) -> dict[int, Arrival]:
    """By number: each time that a request came to a host from an edge it began a count of its own."""
    groups: dict[int, list[TraceRecord]] = {}
    for record in part.records:
        if record.role == "worker":
            groups.setdefault(record.began_us, []).append(record)
    return {number: (part, groups[began]) for number, began in enumerate(sorted(groups))}


def _arrival_of(
    record: TraceRecord, edge: TracePart, tries: list[TraceRecord], arrivals: dict[str, dict[int, Arrival]]
) -> Arrival | None:
    """What the machine's host says of a try of the edge; taken out, so that it is told once."""
    if not _abroad(record, edge) or record.reason in NEVER_ARRIVED:
        return None
    arrived = [one for one in tries if one.node == record.node and one.reason not in NEVER_ARRIVED]
    number = next(number for number, one in enumerate(arrived) if one is record)
    return arrivals.get(record.node, {}).pop(number, None)


def _edge_try(record: TraceRecord, edge: TracePart, there: Arrival | None) -> list[str]:
    if record.attempt == 0:
        waited = f", of it waited: {', '.join(_waits(record))}" if record.waited_us else ""
        return [f"{record.app or 'no app'}: {_end(record)} after {_ms(record.from_us)}{waited}"]
    steps = [f"edge {_ms(_own(record))}", *_waits(record)]
    if not _abroad(record, edge):
        steps += _direct(record)
    elif there is None:
        steps.append(f"mesh, and all beyond it, {_ms(record.answer_us)}")
    else:
        part, records = there
        spent = records[-1].from_us + _until_head(records[-1])
        steps.append(f"mesh {_ms(max(record.answer_us - spent, 0))}")
        steps += [_place("worker", part, records[0]), *_indented(_worker_tries(records))]
    return [_head(record), *_indented([*steps, *_body(record)])]


def _worker_tries(records: list[TraceRecord]) -> list[str]:
    shown: list[str] = []
    for record in records:
        steps = [f"worker {_ms(_own(record))}", *_waits(record)]
        if record.outcome != "turned":
            steps += _direct(record)
        shown += [_head(record), *_indented([*steps, *_body(record)])]
    return shown


def _head(record: TraceRecord) -> str:
    """Which try it was, of which machine, and how it ended."""
    replay = f", replay {record.replays}" if record.replays else ""
    where = f" in {record.region} on host {record.node}" if record.node else ""
    machine = f": {record.app} machine {record.machine}{where}" if record.machine else ""
    took = record.from_us + _until_head(record)
    return f"try {record.attempt}{replay}{machine}: {_end(record)} after {_ms(took)}"


def _end(record: TraceRecord) -> str:
    code = f" {record.code}" if record.code else ""
    match record.outcome:
        case "answered":
            return f"answered {record.status}"
        case "failed":
            return f"failed{code}, {FAILURES.get(record.reason, record.reason)}"
        case "turned":
            return f"not taken by its host{code} ({record.reason})"
        case _:
            return f"refused with {record.status}{code}"


def _direct(record: TraceRecord) -> list[str]:
    connect = "connect kept" if record.reused else f"connect {_ms(record.connect_us)}"
    return [connect, f"app {_ms(record.answer_us)}"]


def _waits(record: TraceRecord) -> list[str]:
    wakes = ("cold", "resume")
    return [f"wake {_ms(us)} ({why})" if why in wakes else f"{why} {_ms(us)}" for why, us in record.waited_us.items()]


def _body(record: TraceRecord) -> list[str]:
    if record.outcome != "answered":
        return []
    if record.body_us is None:
        return ["body under way"]
    return [f"body {_ms(record.body_us)}{', broken off' if record.cut else ''}"]


def _own(record: TraceRecord) -> int:
    """What the proxy itself took until a machine had a slot."""
    return max(record.choose_us - sum(record.waited_us.values()), 0)


def _until_head(record: TraceRecord) -> int:
    return record.choose_us + record.connect_us + record.answer_us


def _abroad(record: TraceRecord, edge: TracePart) -> bool:
    return bool(record.node) and record.node != edge.host


def _place(role: str, part: TracePart, record: TraceRecord) -> str:
    moment = datetime.fromtimestamp(record.began_us / 1e6, UTC).isoformat(timespec="milliseconds")
    return f"{role} {part.region} host {part.host} at {moment.removesuffix('+00:00')}Z"


def _ms(us: int) -> str:
    return f"{us / 1000:.1f} ms"


def _indented(found: list[str]) -> list[str]:
    return [f"  {line}" for line in found]
