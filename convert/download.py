"""Fetching a published checkpoint: resumed where it broke off, checked, and in the cache whole or not at all."""

__all__ = ["download"]

import base64
import contextlib
import fcntl
import hashlib
import http.client
import io
import itertools
import os
import random
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, NoReturn

import numpy as np
from tqdm import tqdm

from .errors import CheckpointError
from .published import BASE_URL, HUB, HUB_FILE, ON_HUB, PUBLISHED, Published

Progress = Callable[[int, int | None], object]
Response = http.client.HTTPResponse | urllib.error.HTTPError

CHUNK = 1 << 18  # bytes
PATIENCE = 2.0  # seconds
LANES = 1 << 11
LONGEST_PAUSE = 60.0  # seconds
MIRROR = "base=... or MIXER_JAX_BASE_URL names a mirror"
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
    """The path of a published checkpoint in the cache. What is not there is fetched; for what is, nothing is requested.

    `name` is a key of PUBLISHED, such as "imagenet1k/Mixer-B_16", or "hf:owner/repository". `cache` defaults to
    MIXER_JAX_CACHE, then ~/.cache/mixer-jax; `base`, the address of a mirror, to MIXER_JAX_BASE_URL, then BASE_URL.
    `progress` is called with the bytes that are there and their total, None where the server does not say it; unless it is
    given, a terminal shows a bar for what takes longer than PATIENCE. `force` fetches also what is there. After a broken
    connection, `timeout` seconds of silence or an answer such as 503, up to `retries` more requests go on where the last
    one ended; so does the next call, from the `.part` file that is left.

    Raises CheckpointError, naming the address or the file and what to do. The hub is asked through its own client, with
    its own retries and progress bar, and its own cache unless one is named; ImportError where that client is missing.
    """
    folder = cache or os.environ.get("MIXER_JAX_CACHE")
    if re.fullmatch(rf"{HUB}[\w.-]+/[\w.-]+", name):
        return _from_hub(name.removeprefix(HUB), Path(folder).expanduser() / "hub" if folder else None, base, force, timeout)
    published = PUBLISHED.get(name.removesuffix(".npz"))
    if published is None:
        known = "\n  ".join([*PUBLISHED, *ON_HUB, f"{HUB}owner/repository"])
        raise CheckpointError(f"{name!r} is no published checkpoint; these are:\n  {known}")
    target = Path(folder or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "mixer-jax").expanduser() / published.file
    base = (base or os.environ.get("MIXER_JAX_BASE_URL") or BASE_URL).rstrip("/")
    if not re.fullmatch(r"https?://[!-~]+", base):
        raise CheckpointError(f"{base!r} is no address to download from: {MIRROR}, beginning with https:// or http://")
    listed = published if base == BASE_URL.rstrip("/") else None  # a mirror may hold what it likes
    if force or not target.is_file():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target.with_name(f".{target.name}.lock"), "a+", encoding="utf-8") as state:
                fcntl.flock(state, fcntl.LOCK_EX)  # whoever comes second waits here, then finds the file
                if force or not target.is_file():
                    with _bar(published.name) if progress is None else contextlib.nullcontext(progress) as report:
                        _Transfer(f"{base}/{published.file}", target, listed, state, report, timeout).run(retries)
        except OSError as error:
            raise CheckpointError(f"{target}: cannot be written ({error}); {ELSEWHERE}") from None
    return target


@contextlib.contextmanager
def _bar(name: str) -> Iterator[Progress]:
    with tqdm(desc=name, unit="B", unit_scale=True, delay=PATIENCE, disable=None, leave=False) as bar:

        def progress(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


@dataclass
class _Broken(Exception):
    """A request that is worth another one, after `pause` seconds where that is known."""

    what: str
    pause: float | None = None


@dataclass
class _Transfer:
    """One file on its way into the cache. `state` is the locked file that keeps the ETag of the partial one."""

    url: str
    target: Path
    listed: Published | None
    state: IO[str]
    progress: Progress
    timeout: float

    def __post_init__(self) -> None:
        self.part = self.target.with_name(f"{self.target.name}.part")

    def run(self, retries: int) -> None:
        for attempt in itertools.count():
            try:
                hashes = self._request()
                break
            except _Broken as broken:
                if attempt >= retries:
                    raise CheckpointError(
                        f"{self.url}: {broken.what} (attempt {attempt + 1}, the last); check the connection and try again "
                        "later: what came is kept, and the next download goes on from there"
                    ) from None
                backoff = 2**attempt * random.uniform(0.5, 1)
                time.sleep(min(backoff if broken.pause is None else broken.pause, LONGEST_PAUSE))
        self._verify(hashes)
        self.part.replace(self.target)

    def _request(self) -> dict[str, str]:
        """Ask once for what is missing and append it; the hashes of the whole file that the server gives."""
        self.state.seek(0)
        etag, had = self.state.read(), self.part.stat().st_size if self.part.exists() else 0
        asked = {"Range": f"bytes={had}-", "If-Range": etag} if had and etag else {}
        with self._answer(asked) as response:
            headers, status = response.headers, response.status or 0
            if status == 200:
                start, length = 0, headers["Content-Length"] or ""
                total = int(length) if length.isdecimal() else None
            elif status == 206 or (status == 416 and asked):
                span = re.match(r"bytes (\d+)-\d+/(\d+)", headers["Content-Range"] or "")
                if not span or int(span[1]) != had or headers["ETag"] != etag:
                    self.part.unlink(missing_ok=True)
                    raise _Broken("the partial file, now removed, is not of what the server has", pause=0)
                start, total = had, int(span[2])
            else:
                self._refuse(status, response.reason, headers["Retry-After"] or "")
            chunks = _chunks(response)
            first = next(chunks, b"")
            if headers.get_content_type() == "text/html" or (start == 0 and first.lstrip().startswith(b"<")):
                raise CheckpointError(
                    f"{self.url}: a web page (HTML or XML) came and not the file: open the address in a browser to see what it "
                    "says; a proxy or a log-in page may be in the way"
                )
            if total is not None:
                self._require_listed(total)
                free = shutil.disk_usage(self.part.parent).free
                if free < total - had:
                    raise OSError(f"{(total - had) / 2**20:.0f} MiB more wanted, {free / 2**20:.0f} MiB left on the disk")
            if start == 0:
                self.part.write_bytes(b"")
                self.state.truncate(0)
                etag = headers["ETag"] or ""
                self.state.write(etag if etag.startswith('"') else "")  # a weak one does not vouch for every byte
                self.state.flush()
            done = self._append(itertools.chain([first], chunks), start, total)
        if done == 0 or total not in (None, done):
            raise _Broken(f"the answer ended after {done} of {total or 'an unknown number of'} bytes")
        given = (entry.strip().partition("=") for entry in ",".join(headers.get_all("x-goog-hash", [])).split(","))
        return {kind: value for kind, _, value in given if kind in HASHES}

    def _answer(self, headers: dict[str, str]) -> Response:
        request = urllib.request.Request(self.url, headers={"User-Agent": "mixer-jax", **headers})
        try:
            return urllib.request.urlopen(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            return error  # which is an answer too
        except (OSError, http.client.HTTPException) as error:
            raise _Broken(f"no answer ({getattr(error, 'reason', error)})") from None

    def _refuse(self, status: int, reason: str, after: str) -> NoReturn:
        if status in (408, 429) or status >= 500:
            raise _Broken(f"the server answers {status} {reason}", float(after) if after.isdecimal() else None)
        raise CheckpointError(
            f"{self.url}: the server answers {status} {reason}; {MIRROR}, and a file that came in another way can be put at "
            f"{self.target}"
        )

    def _append(self, chunks: Iterable[bytes], done: int, total: int | None) -> int:
        with open(self.part, "ab") as file:
            for chunk in chunks:
                file.write(chunk)
                done += len(chunk)
                self.progress(done, total)
            file.flush()
            os.fsync(file.fileno())
        return done

    def _verify(self, hashes: dict[str, str]) -> None:
        self._require_listed(self.part.stat().st_size)
        for kind, wanted in hashes.items():
            with open(self.part, "rb") as file:
                found = base64.b64encode(HASHES[kind](file)).decode()
            if found != wanted:
                self.part.unlink()
                raise CheckpointError(
                    f"{self.url}: damaged on the way: its {kind} is {found}, the server says {wanted}; what came is removed, "
                    "download it again"
                )

    def _require_listed(self, size: int) -> None:
        if self.listed and not self.listed.is_plausible(size):
            self.part.unlink(missing_ok=True)
            raise CheckpointError(
                f"{self.url}: {size} bytes are {size / 2**20:.2f} MiB, but the published file has {self.listed.mib}: it is "
                f"another one, and not kept; {MIRROR}"
            )


def _chunks(response: Response) -> Iterator[bytes]:
    try:
        while chunk := response.read1(CHUNK):
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(f"the connection broke ({error})") from None


def _from_hub(repository: str, cache: Path | None, endpoint: str | None, force: bool, timeout: float) -> Path:
    try:
        import huggingface_hub as hub  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ImportError(f"a name with {HUB} needs the hub's client: pip install 'mixer-jax[hub]'") from None
    try:
        path = hub.try_to_load_from_cache(repository, HUB_FILE, cache_dir=cache)
        if force or not isinstance(path, str):
            options = {"cache_dir": cache, "endpoint": endpoint, "force_download": force, "etag_timeout": timeout}
            path = hub.hf_hub_download(repository, HUB_FILE, **options)
    except Exception as error:  # the hub's own, and those of the libraries below it
        raise CheckpointError(
            f"{HUB}{repository}: {HUB_FILE} cannot be fetched ({error}); check the name and the connection"
        ) from None
    return Path(path)


def _md5(file: io.BufferedReader) -> bytes:
    return hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).digest()


def _crc32c(file: io.BufferedReader) -> bytes:
    """CRC-32C (Castagnoli), big-endian as Google's storage gives it; about 500 MB/s.

    A CRC is linear, so a row of LANES words can stand for all that came before: every word is carried over the row that
    follows, by a table for each half of its bits, and added to the word there. Only the last row is taken byte by byte.
    """
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ 0x82F63B78, table >> 1)
    carried = np.uint32(1) << np.arange(32, dtype=np.uint32)
    for _ in range(4 * LANES):
        carried = table[carried & 0xFF] ^ carried >> 8
    low = high = np.zeros(1, np.uint32)
    for bit in range(16):
        low, high = np.append(low, low ^ carried[bit]), np.append(high, high ^ carried[16 + bit])
    row, tail = np.zeros(LANES, np.uint32), b""
    row[-1] = 0x641F6454  # brings the register to 0xFFFFFFFF, where a CRC begins
    while block := file.read(64 * 4 * LANES):
        whole = len(block) - len(block) % (4 * LANES)
        for words in np.frombuffer(block[:whole], "<u4").reshape(-1, LANES):
            row = low[row & 0xFFFF] ^ high[row >> 16] ^ words
        tail = block[whole:]
    register, steps = 0, table.tolist()
    for byte in row.astype("<u4").tobytes() + tail:
        register = steps[(register ^ byte) & 0xFF] ^ register >> 8
    return (register ^ 0xFFFFFFFF).to_bytes(4, "big")


HASHES = {"md5": _md5, "crc32c": _crc32c}  # by their names in x-goog-hash
