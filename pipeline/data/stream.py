"""Foreign tars without an index, read as a stream by the `webdataset` library: for a first try, not for exact runs.

Every loader worker draws whole tars at random, again and again, and shuffles a thousand samples. Sample ids are running
numbers: they say nothing of which sample it was. So a resume is approximate, another number of ranks or workers sees
other samples, and an audit is not possible; `mixer data index` makes the same tars exact.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_tools.checksum import crc32
from data_tools.errors import UserError
from pipeline.data.decode import Choose, decode_image
from pipeline.data.source import BadSample, RawSample

_IMAGES = "jpg;jpeg;png;webp;bmp;gif;tif;tiff"
_BUFFER = 1000  # samples
_MAX_FAILURES = 100  # tars and samples in a row
_TAR = re.compile(r"\.(tar|tgz|tar\.gz)$")


def is_stream(path: str) -> bool:
    """Does `path` name tars (`a-{000..099}.tar`) or a `pipe:`, rather than a data set?"""
    return path.startswith("pipe:") or _TAR.search(path) is not None


class StreamSource:
    """Samples of tars in the order of a stream; `samples` is what counts as an epoch.

    Raises:
        UserError: no number of samples given; or a shell would be run that the configuration does not allow.
    """

    def __init__(self, urls: str, *, samples: int | None, seed: int, num_classes: int | None, allow_pipe: bool):
        # Whatever webdataset expands (`::`, braces), a scheme needs a colon: in the text, or out of the environment
        if not allow_pipe and (re.search("[:$]", urls) or "GOPEN_REWRITE" in os.environ):
            raise UserError(
                f"data.train={urls}: webdataset runs a shell for `pipe:` and for URLs (anything with `:` or `$` in it, "
                "or with GOPEN_REWRITE set); if you trust that text, set data.allow_pipe=true. Or make the set exact: "
                "`mixer data index`"
            )
        if not samples:
            raise UserError(f"data.train={urls} is a stream, of unknown length: set data.stream_samples=N")
        self.name, self.digest = f"{urls} (a stream)", f"stream-{crc32(urls.encode()):08x}-{samples}"
        self.shard_sizes, self.splits = [samples], ["train"]
        self.classes: list[str] | None = None
        self.num_classes = num_classes
        self._urls, self._seed = urls, seed
        self._pid, self._samples, self._failures = -1, iter(()), 0
        if os.environ.get("RANK", "0") == "0":
            print(
                f"warning: {self.name}: a resume is approximate and an audit impossible; `mixer data index` mends that"
            )

    def read(self, sample_id: int, channels: int, choose: Choose | None = None) -> RawSample:
        """The stream's next sample, whatever `sample_id` is."""
        if self._pid != os.getpid():  # a worker of its own; the first id it is asked for tells it from others
            self._pid, self._samples = os.getpid(), self._stream(sample_id)
        data, label = next(self._samples)
        try:
            return RawSample(decode_image(data, channels, choose), int(label), crc32(data))
        except ValueError as e:
            raise BadSample(f"{self.name}: {e}") from e

    def crc32(self, sample_ids: np.ndarray) -> np.ndarray:
        raise UserError(f"{self.name}: what was read from a stream is not known, so it cannot be audited")

    def keys(self, shard: int) -> np.ndarray:
        raise UserError(f"{self.name}: a stream has no subsets; index it first (`mixer data index`)")

    def labels(self) -> np.ndarray:
        raise UserError(f"{self.name}: the labels of a stream are not known before it is read; index it first")

    def sample_name(self, sample_id: int) -> str:
        return f"{self.name} {sample_id}"

    def _stream(self, first: int) -> Iterator[tuple[bytes, Any]]:
        webdataset: Any = importlib.import_module("webdataset")  # most of it is unknown to type checkers

        seed = self._seed * 1_000_003 + first
        tars = webdataset.DataPipeline(
            webdataset.ResampledShards(self._urls, seed=seed, deterministic=True),
            webdataset.tarfile_to_samples(handler=self._failed),
            webdataset.shuffle(_BUFFER, initial=100, seed=seed),
            webdataset.to_tuple(_IMAGES, "cls", handler=self._failed),
        )
        for data, label in tars:
            self._failures = 0
            yield data, label

    def _failed(self, error: Exception) -> bool:
        """webdataset's question whether to go on: yes, but not for ever where nothing can be read."""
        self._failures += 1
        if self._failures > _MAX_FAILURES:
            raise UserError(f"{self.name}: nothing can be read of it: {str(error) or type(error).__name__}")
        print(f"warning: {self.name}: passed over: {error!r}", flush=True)
        return True
