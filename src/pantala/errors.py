"""The one exception tree.

Every error that crosses a package border is one of these. `UserError` texts are safe to show; everything else is
shown as an id and logged whole. On the wire an error is `{"error": sentence, "status": word}`.
"""

from __future__ import annotations

from typing import ClassVar


class PantalaError(Exception):
    """Root of the tree. `message` is one sentence; `hint`, where there is one, says what to try next."""

    http_code: ClassVar[int] = 500
    status: str = "unknown"

    def __init__(self, message: str, *, hint: str | None = None, status: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if status is not None:
            self.status = status

    def sentence(self) -> str:
        """Message and hint as one text, for surfaces that have a single line."""
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UserError(PantalaError):
    """The caller can understand and mend it."""

    http_code = 400
    status = "unknown"


class InvalidRequest(UserError):
    """A value is wrong. `field` is its path in the request (`config.services[0].internal_port`)."""

    http_code = 400
    status = "invalid_request"

    def __init__(self, message: str, *, field: str | None = None, hint: str | None = None) -> None:
        super().__init__(f"{field}: {message}" if field else message, hint=hint)
        self.field = field


class Unauthenticated(UserError):
    http_code = 401
    status = "unauthenticated"


class Forbidden(UserError):
    http_code = 403
    status = "forbidden"


class NotFound(UserError):
    http_code = 404
    status = "not_found"


class RequestTimeout(UserError):
    """A wait ended before its state was reached."""

    http_code = 408
    status = "timeout"


class Conflict(UserError):
    http_code = 409
    status = "conflict"


class WrongState(Conflict):
    """The machine is in a state in which this cannot be done. (Clients of the original expect 412.)"""

    http_code = 412
    status = "wrong_state"


class LeaseHeld(Conflict):
    status = "lease_held"


class NameTaken(Conflict):
    http_code = 422
    status = "name_taken"


class RateLimited(UserError):
    http_code = 429
    status = "rate_limited"

    def __init__(self, message: str, *, retry_after_s: float, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class NotOffered(UserError):
    """Part of the API that this version does not have yet."""

    http_code = 501
    status = "not_implemented"


class CapacityError(PantalaError):
    """Nothing fits. `excluded` counts hosts by the constraint that ruled them out."""

    http_code = 422
    status = "insufficient_capacity"

    def __init__(self, message: str, *, excluded: dict[str, int] | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.excluded = excluded or {}


class TransientError(PantalaError):
    """Doing it again may help, not before `retry_after_s`."""

    http_code = 500
    status = "unavailable"

    def __init__(self, message: str, *, retry_after_s: float = 1.0, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class NodeUnreachable(TransientError):
    pass


class StoreBusy(TransientError):
    pass


class DriverBusy(TransientError):
    pass


class DiskFull(TransientError):
    """No room on a disk of the platform: what for, where, and how much is free. Nothing was changed."""

    http_code = 507
    status = "disk_full"


class DriverError(PantalaError):
    """A driver failed. `guest_fault`: the image or its command is to blame, not the host."""

    status = "driver_failed"

    def __init__(self, message: str, *, guest_fault: bool = False, retry: bool = False) -> None:
        super().__init__(message)
        self.guest_fault = guest_fault
        self.retry = retry


class InternalError(PantalaError):
    """Ours. The user sees `incident`, the log sees everything."""

    status = "internal"

    def __init__(self, message: str, *, incident: str | None = None) -> None:
        super().__init__(message)
        self.incident = incident
