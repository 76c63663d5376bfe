"""A real S3 server (moto) on loopback, in a process of its own that can be stopped and started again."""

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path


class S3Server:
    """What was stored survives `kill` and `start`: requests are recorded and played back, single puts only."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._recording = folder / "recording"
        self._log = folder / "moto.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def options(self) -> dict:
        """fsspec's storage options."""
        return {
            "key": "test", "secret": "test", "endpoint_url": self.url,
            "client_kwargs": {"region_name": "us-east-1"},
        }  # fmt: skip

    def start(self, remember: bool = True) -> None:
        env = {**os.environ, "MOTO_ENABLE_RECORDING": "True", "MOTO_RECORDER_FILEPATH": str(self._recording)}
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(self.port)],
                env=env, stdout=log, stderr=log,
            )  # fmt: skip
        end = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/moto-api/", timeout=5).read()
                break
            except OSError:
                assert time.monotonic() < end and self._process.poll() is None, self._log.read_text()
                time.sleep(0.05)
        if self._recording.exists() and remember:
            self._post("replay-recording")
        elif self._recording.exists():
            self._recording.unlink()
        self._post("start-recording")

    def _post(self, what: str) -> None:
        request = urllib.request.Request(f"{self.url}/moto-api/recorder/{what}", method="POST")
        urllib.request.urlopen(request, timeout=60).read()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def client(self):
        import boto3

        return boto3.client(
            "s3", endpoint_url=self.url, aws_access_key_id="test", aws_secret_access_key="test",
            region_name="us-east-1",
        )  # fmt: skip


def serve(port: int) -> None:
    """Runs the server; one request at a time, because moto's recorder mixes up those that come at once."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    app, turn = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def one_at_a_time(environ, start_response):
        if "/recorder/" in environ["PATH_INFO"]:  # playing back calls the server itself
            return app(environ, start_response)
        with turn:
            return list(app(environ, start_response))

    run_simple("127.0.0.1", port, one_at_a_time, threaded=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
