"""When a scheduled machine runs: `hourly`, `daily`, `weekly`, `monthly`, counted from its first start, or a cron
expression of five fields with an IANA time zone behind it (`"0 4 * * * Europe/Berlin"`; UTC without one). Pure.

Cron fields take names, ranges, steps and lists. When clocks change, a time that is left out runs at the change, and one
that comes twice runs once, as Debian's cron does it.
"""

from __future__ import annotations

import calendar
from datetime import UTC, datetime, timedelta, tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from pantala.errors import InvalidRequest

WORDS = ("hourly", "daily", "weekly", "monthly")
_STEPS = {"hourly": timedelta(hours=1), "daily": timedelta(days=1), "weekly": timedelta(weeks=1)}
_FORMS = f"one of {', '.join(WORDS)}, or five cron fields with an optional time zone, such as '0 4 * * * Europe/Berlin'"
FIELD = "config.schedule"


def check(expression: str) -> None:
    """Raises InvalidRequest that says what would be right."""
    if expression not in WORDS:
        next_run(expression, anchor=_EPOCH, after=_EPOCH)


def needs_anchor(expression: str) -> bool:
    """Whether it is counted from the first start."""
    return expression in WORDS


def next_run(expression: str, *, anchor: datetime, after: datetime) -> datetime:
    """The first run later than `after`."""
    if expression in WORDS:
        return _counted(expression, anchor, after)[1]
    return _cron(expression, after, reverse=False)


def last_run(expression: str, *, anchor: datetime, until: datetime) -> datetime:
    """The last run that is not later than `until`."""
    if expression in WORDS:
        return _counted(expression, anchor, until)[0]
    return _cron(expression, until + timedelta(seconds=1), reverse=True)


def _counted(word: str, anchor: datetime, at: datetime) -> tuple[datetime, datetime]:
    """The runs around `at`: the last one up to it and the first one after it."""
    if word == "monthly":
        months = (at.year - anchor.year) * 12 + at.month - anchor.month
        if _months_later(anchor, months) > at:
            months -= 1
        return _months_later(anchor, months), _months_later(anchor, months + 1)
    step = _STEPS[word]
    last = anchor + (at - anchor) // step * step
    return last, last + step


def _months_later(anchor: datetime, months: int) -> datetime:
    """The same day of that month, or its last one."""
    years, month = divmod(anchor.month - 1 + months, 12)
    year = anchor.year + years
    return anchor.replace(year=year, month=month + 1, day=min(anchor.day, calendar.monthrange(year, month + 1)[1]))


def _cron(expression: str, at: datetime, *, reverse: bool) -> datetime:
    fields = expression.split()
    if len(fields) not in (5, 6):
        raise InvalidRequest(f"{expression!r} is not {_FORMS}", field=FIELD)
    zone = _zone(fields[5]) if len(fields) == 6 else UTC
    try:
        return next(CronSim(" ".join(fields[:5]), at.astimezone(zone), reverse=reverse)).astimezone(UTC)
    except CronSimError as error:
        raise InvalidRequest(f"{expression!r}: {str(error).lower()}; it must be {_FORMS}", field=FIELD) from error
    except StopIteration as error:
        raise InvalidRequest(f"{expression!r} names no day that ever comes", field=FIELD) from error


def _zone(name: str) -> tzinfo:
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise InvalidRequest(
            f"{name!r} is not a time zone; name one as Europe/Berlin or America/New_York", field=FIELD
        ) from error


_EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
