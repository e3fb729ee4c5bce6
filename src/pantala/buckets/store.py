"""Objects of the operator's S3-compatible store: put, copied, listed, removed by the operator's credentials. Made by
`server/compose.py` from the same settings by which edges read (`BucketSettings`); who may have what done is decided in
`control/statics.py`.

botocore does the protocol (signatures, retries, virtual hosts, XML) and blocks, so each call has a thread; it is
imported with the first call, because most platforms never make one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar, cast

import anyio
import anyio.to_thread
import msgspec

from pantala.errors import InvalidRequest, NotFound, TransientError, UserError
from pantala.wire.feed import BucketSettings

T = TypeVar("T")

AT_ONCE_MAX = 16
CONNECT_TIMEOUT_S = 5
ATTEMPTS_MAX = 3
DELETED_AT_ONCE = 1_000
"""What S3 takes in one request."""
USUAL_AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"
"""The ones that edges use."""


class _Client(Protocol):
    """What is used of botocore's S3 client, whose methods are made at run time."""

    def put_object(self, **parameters: Any) -> dict[str, Any]: ...
    def get_object(self, **parameters: Any) -> dict[str, Any]: ...
    def copy_object(self, **parameters: Any) -> dict[str, Any]: ...
    def list_objects_v2(self, **parameters: Any) -> dict[str, Any]: ...
    def delete_objects(self, **parameters: Any) -> dict[str, Any]: ...


class _Credentials(msgspec.Struct, frozen=True):
    access_key_id: str
    secret_access_key: str
    session_token: str | None = None


class BucketStore:
    """Errors name bucket and key: UserError for what the operator has to mend, TransientError for a store that cannot
    be reached."""

    def __init__(self, settings: BucketSettings) -> None:
        self._settings = settings
        self._limiter = anyio.CapacityLimiter(AT_ONCE_MAX)
        self._making = threading.Lock()
        self._made: _Client | None = None

    async def put(self, bucket: str, key: str, content: IO[bytes] | bytes, *, size: int, content_type: str) -> None:
        def call(client: _Client) -> None:
            client.put_object(Bucket=bucket, Key=key, Body=content, ContentLength=size, ContentType=content_type)

        await self._do(f"writing {key} to the bucket {bucket}", bucket, call)

    async def get(self, bucket: str, key: str, *, bytes_max: int) -> bytes:
        """Raises NotFound."""

        def call(client: _Client) -> bytes:
            answer = client.get_object(Bucket=bucket, Key=key)
            with answer["Body"] as body:
                return cast(bytes, body.read(bytes_max + 1))

        found = await self._do(f"reading {key} from the bucket {bucket}", bucket, call)
        if len(found) > bytes_max:
            raise UserError(f"{key} in the bucket {bucket} is larger than {bytes_max} bytes")
        return found

    async def copy(self, bucket: str, source: str, key: str) -> None:
        """Within the bucket, with its content type. Raises NotFound."""

        def call(client: _Client) -> None:
            client.copy_object(Bucket=bucket, Key=key, CopySource={"Bucket": bucket, "Key": source})

        await self._do(f"copying {source} to {key} in the bucket {bucket}", bucket, call)

    async def list_sizes(self, bucket: str, prefix: str) -> dict[str, int]:
        """All keys that begin so."""

        def call(client: _Client) -> dict[str, int]:
            return {found["Key"]: found["Size"] for page in _pages(client, bucket, prefix, "") for found in page[0]}

        return await self._do(f"listing {prefix} of the bucket {bucket}", bucket, call)

    async def list_names(self, bucket: str, folder: str) -> tuple[list[str], list[str]]:
        """What is right in a folder (`…/`): keys of objects, and folders with their slash."""

        def call(client: _Client) -> tuple[list[str], list[str]]:
            keys: list[str] = []
            folders: list[str] = []
            for objects, inner in _pages(client, bucket, folder, "/"):
                keys += [found["Key"] for found in objects]
                folders += [found["Prefix"] for found in inner]
            return keys, folders

        return await self._do(f"listing {folder} of the bucket {bucket}", bucket, call)

    async def delete(self, bucket: str, keys: Sequence[str]) -> None:
        """Those that are not there count as deleted."""

        def call(client: _Client) -> None:
            for begin in range(0, len(keys), DELETED_AT_ONCE):
                some = [{"Key": key} for key in keys[begin : begin + DELETED_AT_ONCE]]
                answer = client.delete_objects(Bucket=bucket, Delete={"Objects": some, "Quiet": True})
                if errors := answer.get("Errors"):
                    first = errors[0]
                    raise UserError(
                        f"{first.get('Key')} in the bucket {bucket} was not removed: {first.get('Message')}"
                    )

        if keys:
            await self._do(f"removing {len(keys)} object(s) from the bucket {bucket}", bucket, call)

    # -- the client --------------------------------------------------------------------------------------------------

    async def _do(self, doing: str, bucket: str, call: Callable[[_Client], T]) -> T:
        """To its end, even when the caller is cancelled: botocore has its own time limits."""

        def run() -> T:
            client = self._client()
            from botocore.exceptions import BotoCoreError, ClientError

            try:
                return call(client)
            except ClientError as error:
                raise _refused(doing, bucket, cast(dict[str, Any], error.response)) from error
            except BotoCoreError as error:
                raise TransientError(
                    f"the store of this platform cannot be reached ({doing}): {error}",
                    hint="the operator named it with --buckets",
                ) from error

        return await anyio.to_thread.run_sync(run, limiter=self._limiter)

    def _client(self) -> _Client:
        with self._making:
            if self._made is None:
                self._made = self._make()
            return self._made

    def _make(self) -> _Client:
        from botocore.config import Config
        from botocore.session import Session

        settings = self._settings
        credentials = _read(settings.credentials_file)
        config = Config(
            signature_version="s3v4",
            s3={"addressing_style": "virtual" if settings.virtual_host else "path"},
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=settings.silence_timeout_ms / 1000,
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS_MAX},
            max_pool_connections=AT_ONCE_MAX,
            # Checksums in trailers are beyond many stores that speak S3 otherwise.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            proxies={},
        )
        client: Any = Session().create_client(
            "s3",
            region_name=settings.region,
            endpoint_url=settings.endpoint,
            verify=settings.ca_file or USUAL_AUTHORITIES,
            aws_access_key_id=credentials.access_key_id,
            aws_secret_access_key=credentials.secret_access_key,
            aws_session_token=credentials.session_token,
            config=config,
        )
        return client


def _pages(client: _Client, bucket: str, prefix: str, delimiter: str) -> list[tuple[list[Any], list[Any]]]:
    """Objects and folders of each page; at most a thousand of them each."""
    pages: list[tuple[list[Any], list[Any]]] = []
    parameters: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix} | ({"Delimiter": delimiter} if delimiter else {})
    while True:
        answer = client.list_objects_v2(**parameters)
        pages.append((answer.get("Contents", []), answer.get("CommonPrefixes", [])))
        token = answer.get("NextContinuationToken")
        if not answer.get("IsTruncated") or not token:
            return pages
        parameters["ContinuationToken"] = token


def _read(path: str) -> _Credentials:
    if not path:
        raise UserError(
            "deploys cannot write to the store of this platform: it has no credentials",
            hint="the operator names a credentials_file in --buckets",
        )
    with suppress(msgspec.MsgspecError):  # what the parser says about a secret is not repeated
        try:
            return msgspec.json.decode(Path(path).read_bytes(), type=_Credentials)
        except OSError as error:
            raise InvalidRequest(f"{path} cannot be read: {error.strerror}", field="credentials_file") from error
    raise InvalidRequest("is not JSON with access_key_id and secret_access_key", field="credentials_file")


def _refused(doing: str, bucket: str, answer: dict[str, Any]) -> UserError | TransientError:
    code = str(answer.get("Error", {}).get("Code", ""))
    words = str(answer.get("Error", {}).get("Message", ""))[:200]
    status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    match code:
        case "NoSuchBucket":
            return UserError(
                f"the platform's store has no bucket {bucket}",
                hint="its operator makes it there, or names another one in --buckets",
                status="no_such_bucket",
            )
        case "NoSuchKey" | "404":
            return NotFound(f"{doing}: there is no such object")
        case _ if status in (401, 403):
            return UserError(
                f"the store refused {doing}: {code} {words}".rstrip(),
                hint="the credentials that the operator gave in --buckets must be allowed to write there",
                status="bucket_refused",
            )
        case _ if status >= 500 or status == 429:
            return TransientError(f"the store failed at {doing}: {status} {code} {words}".rstrip())
        case _:
            return UserError(f"the store refused {doing}: {status} {code} {words}".rstrip(), status="bucket_refused")
