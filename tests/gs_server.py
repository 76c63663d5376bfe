"""A Google Cloud Storage server on loopback (the package gcp-storage-emulator), in a process of its own."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path


class GSServer:
    def __init__(self, folder: Path) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url, self._log = f"http://127.0.0.1:{self.port}", folder / "gs.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def options(self) -> dict:
        """fsspec's storage options."""
        return {"endpoint_url": self.url, "token": "anon", "project": "test"}

    def start(self) -> None:
        code = "from gcp_storage_emulator.__main__ import main; main()"
        arguments = ["start", "--host=127.0.0.1", f"--port={self.port}", "--in-memory"]
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=log, stderr=log)
        end = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(self.url, timeout=5).read()
                return
            except OSError:
                assert time.monotonic() < end and self._process.poll() is None, self._log.read_text()
                time.sleep(0.05)

    def make_bucket(self, name: str) -> None:
        self._post("/storage/v1/b?project=test", json.dumps({"name": name}).encode(), "application/json")

    def put(self, bucket: str, name: str, body: bytes) -> None:
        query = urllib.parse.urlencode({"uploadType": "media", "name": name})
        self._post(f"/upload/storage/v1/b/{bucket}/o?{query}", body, "application/octet-stream")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _post(self, path: str, body: bytes, kind: str) -> None:
        request = urllib.request.Request(self.url + path, body, {"Content-Type": kind}, method="POST")
        urllib.request.urlopen(request, timeout=30).read()
