"""Fetching a published checkpoint: resumed where it broke off, checked, and in the cache whole or not at all."""

import base64
import contextlib
import fcntl
import hashlib
import http.client
import itertools
import os
import random
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np

from .errors import CheckpointError
from .published import BASE_URL, HUB, ON_HUB, PUBLISHED, Published

Progress = Callable[[int, int | None], object]

CHUNK = 1 << 18  # bytes
LONGEST_PAUSE = 60.0  # seconds
ELSEWHERE = "cache=... or MIXER_JAX_CACHE names another folder"


def download(
    name: str,
    *,
    cache: str | os.PathLike[str] | None = None,
    base: str | None = None,
    progress: Progress | None = None,
    force: bool = False,
    retries: int = 5,
    timeout: float = 30.0,
) -> Path:
    """The path of a published checkpoint in the cache, fetched first unless it is there; then nothing is requested.

    `name` is a key of PUBLISHED, such as "imagenet1k/Mixer-B_16", or "hf:owner/repository". `cache` defaults to
    MIXER_JAX_CACHE, then ~/.cache/mixer-jax; `base`, the address of a mirror, to MIXER_JAX_BASE_URL, then BASE_URL.
    `progress` is called with the bytes that are there and their total, None where the server does not say it. `force`
    fetches also what the cache has. `timeout` is the longest silence in seconds; after it, a broken connection or an
    answer such as 503, `retries` more requests are made, each going on where the last broke off. What has come so far is
    kept in a `.part` file for the next call.

    Raises CheckpointError, naming the address or the file and what to do. The hub is asked through its own client, which
    has its own retries and progress bar; ImportError without it.
    """
    folder = cache or os.environ.get("MIXER_JAX_CACHE")
    if re.fullmatch(rf"{HUB}[\w.-]+/[\w.-]+", name):
        return _from_hub(name.removeprefix(HUB), Path(folder).expanduser() / "hub" if folder else None, base, force, timeout)
    published = PUBLISHED.get(name.removesuffix(".npz"))
    if published is None:
        known = "\n  ".join([*PUBLISHED, *ON_HUB, f"{HUB}owner/repository"])
        raise CheckpointError(f"{name!r} is no published checkpoint; these are:\n  {known}")
    target = Path(folder or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "mixer-jax").expanduser() / published.file
    base = base or os.environ.get("MIXER_JAX_BASE_URL") or BASE_URL
    if not re.fullmatch(r"https?://\S+", base):
        raise CheckpointError(f"{base!r} is no address to download from: it must begin with https:// or http://")
    if force or not target.is_file():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target.with_name(f".{target.name}.lock"), "a+") as state:
                fcntl.flock(state, fcntl.LOCK_EX)  # whoever comes second waits here and finds the file
                if force or not target.is_file():
                    _Transfer(published, base, target, state, progress, timeout).run(retries)
        except OSError as error:
            raise CheckpointError(f"{target}: cannot be written ({error}); {ELSEWHERE}") from None
    return target


class _Broken(Exception):
    """A request that is worth another one, after `pause` seconds if the server said so."""

    def __init__(self, what: str, pause: float | None = None):
        super().__init__(what)
        self.pause = pause


class _Transfer:
    """One file on its way into the cache; `state` is a locked file that holds the ETag of the partial one."""

    def __init__(
        self, published: Published, base: str, target: Path, state: IO[str], progress: Progress | None, timeout: float
    ):
        self.published = published if base.rstrip("/") == BASE_URL.rstrip("/") else None  # a mirror may hold other sizes
        self.url = f"{base.rstrip('/')}/{published.file}"
        self.target, self.part = target, target.with_name(f"{target.name}.part")
        self.state, self.progress, self.timeout = state, progress or (lambda done, total: None), timeout

    def run(self, retries: int) -> None:
        for attempt in itertools.count():
            try:
                digests = self._request()
                break
            except _Broken as broken:
                if attempt == retries:
                    raise CheckpointError(
                        f"{self.url}: {broken}, at the last of {retries + 1} attempts; try again later: it goes on from there"
                    ) from None
                backoff = 2**attempt * random.uniform(0.5, 1) if broken.pause is None else broken.pause
                time.sleep(min(backoff, LONGEST_PAUSE))
        self._verify(digests)
        self.part.replace(self.target)

    def _request(self) -> dict[str, bytes]:
        """Ask once for what is missing and append it; the digests of the whole file that the server gives."""
        offset = self._offset()
        self.state.seek(0)
        etag = self.state.read()
        resume = {"Range": f"bytes={offset}-", "If-Range": etag} if offset and etag else {}
        with self._answer(resume) as response:
            status, headers = response.status, response.headers
            if status == 200:
                offset, length = 0, headers["Content-Length"] or ""
                total = int(length) if length.isdecimal() else None
            elif status == 206 or (status == 416 and resume):
                span = re.match(r"bytes (\d+)-\d+/(\d+)", headers["Content-Range"] or "")
                if not span or int(span[1]) != offset or headers["ETag"] != etag:
                    self.part.unlink(missing_ok=True)
                    raise _Broken("the partial file is not of what the server has now", pause=0)
                total = int(span[2])
            elif status in (408, 429) or status >= 500:
                after = headers["Retry-After"] or ""
                raise _Broken(f"the server answers {status} {response.reason}", float(after) if after.isdecimal() else None)
            else:
                raise CheckpointError(
                    f"{self.url}: the server answers {status} {response.reason}; base=... or MIXER_JAX_BASE_URL names a mirror, "
                    f"and a file fetched by other means can be put at {self.target}"
                )
            chunks = _chunks(response)
            first = next(chunks, b"")
            if headers.get_content_type() == "text/html" or (offset == 0 and first.lstrip().startswith(b"<")):
                raise CheckpointError(
                    f"{self.url}: a web page (HTML or XML) came and not the file; open the address in a browser: a proxy or a "
                    "log-in page may be in the way"
                )
            if total is not None:
                self._expect(total)
            with open(self.part, "ab") as file:
                if offset == 0:
                    file.truncate(0)
                    self.state.truncate(0)
                    self.state.write(headers["ETag"] if (headers["ETag"] or "").startswith('"') else "")  # none that is weak
                    self.state.flush()
                for chunk in itertools.chain([first], chunks):
                    file.write(chunk)
                    offset += len(chunk)
                    self.progress(offset, total)
                file.flush()
                os.fsync(file.fileno())
            if offset == 0 or total not in (None, offset):
                raise _Broken(f"the answer ended after {offset} of {total or 'an unknown number of'} bytes")
            return _digests(headers)
