"""Downloading a published checkpoint into the cache: resumed after an interruption, checked, there complete or not at all."""

__all__ = ["download"]

import base64
import contextlib
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from .errors import CheckpointError
from .hub_config import CONFIG_FILE
from .identity import sha256_of
from .progress import Progress, progress_bar
from .published import BASE_URL, HUB, HUB_FILE, Published, list_models, published_file

Response = http.client.HTTPResponse | urllib.error.HTTPError

CHUNK = 1 << 18  # bytes
LONGEST_PAUSE = 60.0  # seconds
ABSENT = ("EntryNotFoundError", "RemoteEntryNotFoundError")  # what the hub's client raises for a file that is not there
MIRROR = "base=... or MIXER_JAX_BASE_URL names a mirror"


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
    """The path of a published checkpoint in the cache, downloaded unless it is there or `force` asks for it again.

    `name` is one that `list_models` gives, such as "imagenet1k/Mixer-B_16", or "hf:owner/repository", which is fetched by the
    hub's own client (ImportError if it is missing), with its config.json if it has one. `cache` defaults to MIXER_JAX_CACHE,
    then ~/.cache/mixer-jax; `base`, the address of a mirror, to MIXER_JAX_BASE_URL, then the owners' own. `progress` is called
    with the bytes that are there and their total; without it, a terminal shows a bar. After a broken connection, `timeout`
    seconds of silence or an answer such as 503, up to `retries` more requests resume the download; so does the next call.
    Raises CheckpointError, saying what to do.
    """
    folder = cache or os.environ.get("MIXER_JAX_CACHE")
    if re.fullmatch(rf"{HUB}[\w.-]+/[\w.-]+", name):
        return _from_hub(name.removeprefix(HUB), Path(folder).expanduser() / "hub" if folder else None, base, force, timeout)
    published = None if name.startswith(HUB) else published_file(name)
    if published is None:
        known = "\n  ".join([*list_models(), f"{HUB}owner/repository"])
        raise CheckpointError(f"{name!r} is not a published checkpoint; these are:\n  {known}")
    target = (Path(folder).expanduser() if folder else cache_folder()) / published.file
    mirror = (base or os.environ.get("MIXER_JAX_BASE_URL") or "").rstrip("/")
    if mirror and not re.fullmatch(r"https?://[!-~]+", mirror):
        raise CheckpointError(f"{mirror!r} is not an address to download from: {MIRROR}, beginning with https:// or http://")
    if target.is_file() and not force:
        return target
    url = f"{mirror}/{published.file}" if mirror else published.address
    listed = published if mirror in ("", BASE_URL.rstrip("/")) else None  # a mirror may have any file of this name and no hash
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):  # a second process waits here, then finds the file
            if force or not target.is_file():
                with progress_bar(published.name) if progress is None else contextlib.nullcontext(progress) as report:
                    _Transfer(url, target, listed, published.sha256, report, timeout).run(retries)
    except OSError as error:
        raise CheckpointError(
            f"{target}: cannot be written ({error}); cache=... or MIXER_JAX_CACHE names another folder"
        ) from None
    return target


def cache_folder() -> Path:
    """MIXER_JAX_CACHE, or else ~/.cache/mixer-jax."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "mixer-jax"
    return Path(os.environ.get("MIXER_JAX_CACHE") or usual).expanduser()


@dataclass
class _Broken(Exception):
    """A failure that is worth another request, after `pause` seconds if the server says so."""

    reason: str
    pause: float | None = None


@dataclass
class _Transfer:
    """One download. `part` has the bytes that have arrived, `etag` the version of the file that they belong to."""

    url: str
    target: Path
    listed: Published | None
    sha256: str
    progress: Progress
    timeout: float

    def __post_init__(self) -> None:
        self.part = self.target.with_name(f"{self.target.name}.part")
        self.etag = self.target.with_name(f"{self.target.name}.etag")

    def run(self, retries: int) -> None:
        for attempt in itertools.count():
            try:
                md5 = self._request()
                break
            except _Broken as broken:
                if attempt >= retries:
                    raise CheckpointError(
                        f"{self.url}: {broken.reason} (attempt {attempt + 1}, the last); check the connection and try again "
                        "later: what has arrived is kept, and the next download resumes there"
                    ) from None
                backoff = 2**attempt * random.uniform(0.5, 1)
                time.sleep(min(backoff if broken.pause is None else broken.pause, LONGEST_PAUSE))
        self._verify(md5)
        self.part.replace(self.target)
        self.etag.unlink(missing_ok=True)

    def _request(self) -> str | None:
        """Ask for the bytes that are missing and append them. Returns the MD5 of the whole file if the server sends it."""
        etag = self.etag.read_text() if self.etag.exists() else ""
        have = self.part.stat().st_size if etag and self.part.exists() else 0
        with self._answer({"Range": f"bytes={have}-", "If-Range": etag} if have else {}) as response:
            start, total = self._span(response, have, etag)
            chunks = _chunks(response)
            first = next(chunks, b"")
            self._require_file(response, first, start)
            if total is not None:
                self._require_listed(total)
                self._require_room(total - have)
            if start == 0:
                new = response.headers["ETag"] or ""
                self.part.write_bytes(b"")
                self.etag.write_text(new if new.startswith('"') else "")  # a weak ETag does not stand for every byte
            done = self._append(itertools.chain([first], chunks), start, total)
        if done == 0 or total not in (None, done):
            raise _Broken(f"the answer ended after {done} of {total or 'an unknown number of'} bytes")
        hashes = ",".join(response.headers.get_all("x-goog-hash", []))
        md5 = re.search(r"(?:^|,)\s*md5=([^,\s]+)", hashes)
        return md5[1] if md5 else None

    def _answer(self, headers: dict[str, str]) -> Response:
        request = urllib.request.Request(self.url, headers={"User-Agent": "mixer-jax", **headers})
        try:
            return urllib.request.urlopen(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            return error  # an answer too, with another status
        except (OSError, http.client.HTTPException) as error:
            raise _Broken(f"no answer ({getattr(error, 'reason', error)})") from None

    def _span(self, response: Response, have: int, etag: str) -> tuple[int, int | None]:
        """Where in the file the body starts, and the size of the whole file (None: unknown)."""
        if response.status == 200:
            length = response.headers["Content-Length"] or ""
            return 0, int(length) if length.isdecimal() else None
        if response.status != 206 and not (response.status == 416 and have):
            status, pause = response.status or 0, response.headers["Retry-After"] or ""
            fault = f"the server answers {status} {response.reason}"
            if status in (408, 429) or status >= 500:
                raise _Broken(fault, float(pause) if pause.isdecimal() else None)
            raise CheckpointError(f"{self.url}: {fault}; {MIRROR}, or put a file from elsewhere at {self.target}")
        span = re.match(r"bytes (\d+)-\d+/(\d+)", response.headers["Content-Range"] or "")
        if not span or int(span[1]) != have or response.headers["ETag"] != etag:
            self.part.unlink(missing_ok=True)
            raise _Broken("the server has another version of the file, so the partial one was removed", pause=0)
        return have, int(span[2])

    def _require_file(self, response: Response, first: bytes, start: int) -> None:
        if response.headers.get_content_type() == "text/html" or (start == 0 and first.lstrip().startswith(b"<")):
            raise CheckpointError(
                f"{self.url}: the answer is a web page (HTML or XML), not the file: open the address in a browser to see what "
                "it says; a proxy or a log-in page may be in the way"
            )

    def _require_room(self, size: int) -> None:
        free = shutil.disk_usage(self.part.parent).free
        if free < size:
            raise OSError(f"{size / 2**20:.0f} MiB to download, {free / 2**20:.0f} MiB left on the disk")

    def _append(self, chunks: Iterator[bytes], done: int, total: int | None) -> int:
        with open(self.part, "ab") as file:
            for chunk in chunks:
                file.write(chunk)
                done += len(chunk)
                self.progress(done, total)
            file.flush()
            os.fsync(file.fileno())
        return done

    def _verify(self, expected: str | None) -> None:
        """The size, and the hashes that are known. The CRC-32 of its members is checked when they are read."""
        self._require_listed(self.part.stat().st_size)
        if not (sha256 := sha256_of(self.part) if self.sha256 else "").startswith(self.sha256):
            self.part.unlink()
            raise CheckpointError(
                f"{self.url}: not the published file: its SHA-256 is {sha256}, that of the published one begins with "
                f"{self.sha256}; the file is removed, download it again or from elsewhere: {MIRROR}"
            )
        if expected is None:
            return
        with open(self.part, "rb") as file:
            md5 = base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode()
        if md5 != expected:
            self.part.unlink()
            raise CheckpointError(
                f"{self.url}: damaged on the way: its MD5 is {md5}, the server says {expected}; the file is removed, "
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

    def fetch(file: str, **revision: str) -> Path | None:
        """None for a file that the repository does not have."""
        try:
            path = hub.try_to_load_from_cache(repository, file, cache_dir=cache, **revision)
            if path is not None and not isinstance(path, str) and not force:  # known to be absent
                return None
            if force or path is None:
                options = {"cache_dir": cache, "endpoint": endpoint, "force_download": force, "etag_timeout": timeout}
                path = hub.hf_hub_download(repository, file, **options, **revision)
        except Exception as error:  # the hub's own, and those of the libraries below it
            if file == CONFIG_FILE and type(error).__name__ in (*ABSENT, "LocalEntryNotFoundError"):  # the last: offline
                return None
            raise CheckpointError(
                f"{HUB}{repository}: {file} cannot be downloaded ({error}); check the name and the connection"
            ) from None
        return Path(path)

    weights = fetch(HUB_FILE)
    if weights is None:
        raise CheckpointError(f"{HUB}{repository}: has no {HUB_FILE}")
    snapshot = weights.parent  # named by the commit that the weights are of
    fetch(CONFIG_FILE, **({"revision": snapshot.name} if snapshot.parent.name == "snapshots" else {}))
    return weights
