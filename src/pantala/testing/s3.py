"""A real S3 server (`versitygw` over a folder) on loopback. Objects are put and policies set by curl, which signs by
itself: what is stored here owes nothing to the code under test."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from pantala.kit import binaries
from pantala.testing.authority import Authority
from pantala.testing.poll import until
from pantala.testing.ports import free_port
from pantala.wire.feed import BucketSettings

REGION = "eu-test-1"
WITHIN_S = 15.0
ACCESS, SECRET = "operator", "operators-own-secret"


class S3:
    def __init__(self, folder: Path, authority: Authority | None = None) -> None:
        self.ca_file = folder / "s3-ca.pem"
        self.port = free_port()
        self.endpoint = f"{'https' if authority else 'http'}://localhost:{self.port}"
        self._folder = folder
        self._authority = authority
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        program = binaries.find("versitygw")
        root = self._folder / "s3"
        root.mkdir(exist_ok=True)
        tls: list[str] = []
        if self._authority is not None:
            own = self._authority.issue("localhost")
            (self._folder / "s3.pem").write_text(own.chain_pem)
            (self._folder / "s3.key").write_text(own.key_pem)
            self.ca_file.write_text(self._authority.pem())
            tls = ["--cert", str(self._folder / "s3.pem"), "--key", str(self._folder / "s3.key")]
        environment = {**os.environ, "ROOT_ACCESS_KEY_ID": ACCESS, "ROOT_SECRET_ACCESS_KEY": SECRET}
        with (self._folder / "s3.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                program, "--port", f"localhost:{self.port}", "--region", REGION, "--keep-alive", *tls,
                "posix", str(root),
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
            )  # fmt: skip

        async def up() -> bool:
            assert self._process is not None
            assert self._process.returncode is None, (self._folder / "s3.log").read_text()
            try:
                _, writer = await asyncio.open_connection("localhost", self.port)
            except OSError:
                return False
            writer.close()
            return True

        await until(up, bool, within_s=WITHIN_S, every_s=0.02)

    async def stop(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        self._process = None

    def settings(self, **changes: Any) -> BucketSettings:
        """With the operator's credentials in a file of their own."""
        secrets = self._folder / "bucket-credentials.json"
        secrets.touch(mode=stat.S_IRUSR | stat.S_IWUSR)
        secrets.write_text(json.dumps({"access_key_id": ACCESS, "secret_access_key": SECRET}))
        options: dict[str, Any] = {
            "endpoint": self.endpoint,
            "region": REGION,
            "ca_file": str(self.ca_file) if self.endpoint.startswith("https") else "",
            "credentials_file": str(secrets),
            **changes,
        }
        return BucketSettings(**options)

    def objects(self, bucket: str) -> dict[str, bytes]:
        """By key what lies in the server's folder."""
        root = self._folder / "s3" / bucket
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    async def bucket(self, name: str, *, public: bool = False) -> None:
        await self._curl("PUT", name)
        if public:
            statement = {
                "Effect": "Allow",
                "Principal": "*",
                "Action": ["s3:GetObject"],
                "Resource": [f"arn:aws:s3:::{name}/*"],
            }
            policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]}).encode()
            await self._curl("PUT", f"{name}?policy=", policy)

    async def put(self, bucket: str, key: str, content: bytes, *headers: str) -> None:
        await self._curl("PUT", f"{bucket}/{key}", content, *headers)

    async def _curl(self, method: str, path: str, body: bytes = b"", *headers: str) -> None:
        options = [option for header in headers for option in ("-H", header)]
        process = await asyncio.create_subprocess_exec(
            "curl", "-sS", "-f", "-m", str(int(WITHIN_S)), "-X", method, "--data-binary", "@-", "-o", "/dev/null",
            "--cacert", str(self.ca_file), "--aws-sigv4", f"aws:amz:{REGION}:s3", "--user", f"{ACCESS}:{SECRET}",
            "-H", "x-amz-content-sha256: UNSIGNED-PAYLOAD", "-H", "expect:", *(options or ["-H", "content-type:"]),
            f"{self.endpoint}/{path}",
            stdin=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        _, said = await process.communicate(body)
        assert process.returncode == 0, said.decode()


@asynccontextmanager
async def s3(folder: Path, *, tls: bool = False) -> AsyncGenerator[S3]:
    server = S3(folder, Authority() if tls else None)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
