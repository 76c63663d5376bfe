"""A real S3 server (moto) on loopback, in a process of its own that can be killed and started again.

moto keeps everything in memory; what makes it survive is a journal of the writes, which the next process plays back
before it listens. (Multipart uploads are not in it: their ids are random. Objects below 50 MB come in one request.)
"""

import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from base64 import b64decode, b64encode
from pathlib import Path


class S3Server:
    """`kill` is a power cut, `start` brings the server back with (or without) what it had stored."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._journal, self._log = folder / "journal", folder / "moto.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def options(self) -> dict:
        """fsspec's storage options."""
        return {
            "key": "test",
            "secret": "test",
            "endpoint_url": self.url,
            "client_kwargs": {"region_name": "us-east-1"},
        }

    def start(self, remember: bool = True) -> None:
        if not remember:
            self._journal.unlink(missing_ok=True)
        with open(self._log, "ab") as log:
            command = [sys.executable, __file__, str(self.port), str(self._journal)]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        end = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/moto-api/", timeout=5).read()
                return
            except OSError:
                assert time.monotonic() < end and self._process.poll() is None, self._log.read_text()
                time.sleep(0.05)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def client(self):
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )


def serve(port: int, journal: Path) -> None:
    """Plays the journal back, then serves; one request at a time, so that the journal has them in order."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple
    from werkzeug.test import Client
    from werkzeug.wrappers import Request

    app, turn = DomainDispatcherApplication(create_backend_app), threading.Lock()
    if journal.exists():
        client = Client(app)
        for line in journal.read_text().splitlines():
            entry = json.loads(line)
            entry["data"] = b64decode(entry["data"])
            client.open(base_url=f"http://127.0.0.1:{port}", **entry)
    log = open(journal, "a")  # noqa: SIM115

    def journaled(environ, start_response):
        with turn:
            if environ["REQUEST_METHOD"] in ("PUT", "POST", "DELETE"):
                request = Request(environ)
                headers = {k: v for k, v in request.headers if k.lower() not in ("content-length", "expect")}
                entry = {"path": request.path, "query_string": request.query_string.decode(), "headers": headers}
                body = request.get_data(cache=True)
                environ["wsgi.input"] = io.BytesIO(body)
                entry |= {"method": request.method, "data": b64encode(body).decode()}
                answer = list(app(environ, start_response))
                log.write(json.dumps(entry) + "\n")
                log.flush()  # in the kernel: a killed process does not take it along
                return answer
            return list(app(environ, start_response))

    run_simple("127.0.0.1", port, journaled, threaded=True)


if __name__ == "__main__":
    os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")
    serve(int(sys.argv[1]), Path(sys.argv[2]))
