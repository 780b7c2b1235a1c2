"""A download ends in the complete, checked file or in one message: every way a server can fail, over loopback."""

import base64
import hashlib
import http.server
import io
import re
import shutil
import socket
import struct
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import GOLDENS

from convert import CheckpointError, MixerConfig, progress
from convert import download as module
from convert.download import download
from convert.layouts import GOOGLE
from convert.mapping import shapes
from convert.published import AT_TIMM, BASE_URL, KNOWN, ON_HUB, PUBLISHED

NAME, FILE = "imagenet1k/Mixer-B_16", "imagenet1k/Mixer-B_16.npz"
BODY = np.random.default_rng(0).bytes(700_001)  # several chunks, and no multiple of their size
HALF = 300_007
REST = f"bytes={HALF}-"


def md5(data):
    return "md5=" + base64.b64encode(hashlib.md5(data).digest()).decode()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append((self.path, self.headers))
        (self.server.answers.pop(0) if self.server.answers else serving())(self, self.server)

    def log_message(self, *_):
        pass


class Site(http.server.ThreadingHTTPServer):
    """A server on loopback. Each request gets the next of `answers`, then what a good server says.

    `headers` go with every good answer; `requests` has the path and the headers of each request. The client's side says when
    bytes have `arrived`, the end of the test when all is `over`.
    """

    daemon_threads = False  # so that closing the server waits for them

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files, self.headers, self.answers, self.requests = {FILE: BODY}, [("ETag", '"one"')], [], []
        self.arrived, self.over = threading.Event(), threading.Event()

    def handle_error(self, *_):
        """A client that has gone away."""

    @property
    def ranges(self):
        return [headers["Range"] for _, headers in self.requests]


def answering(status, body=b"", **headers):
    def answer(request, site):
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    return answer


def serving(*, cut=None, length=True, ranges=True, total=None):
    """A good answer, or one that ends `cut` bytes into the body, says no length, knows no ranges, or gives a wrong total."""

    def serve(request, site):
        body, start = site.files.get(request.path[1:]), 0
        if body is None:
            return answering(404)(request, site)
        span = re.fullmatch(r"bytes=(\d+)-", request.headers["Range"] or "")
        if span and ranges and request.headers["If-Range"] in (None, dict(site.headers).get("ETag")):
            start = int(span[1])
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{total or len(body)}")
        if length:
            request.send_header("Content-Length", str(len(body) - start))
        for header in site.headers:
            request.send_header(*header)
        request.end_headers()
        request.wfile.write(body[start:][:cut])

    return serve


def hang_up(request, site):
    """Close without an answer."""


def reset(request, site):
    """Send half, and break the connection off hard once some of it is there."""
    serving(cut=HALF)(request, site)
    site.arrived.wait(20)
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.connection.close()


def stall(request, site):
    """Send half, then nothing; whoever waits for long is refused."""
    serving(cut=HALF)(request, site)
    if not site.over.wait(20):
        site.answers = [answering(404)]


@pytest.fixture
def site():
    with Site() as site:
        thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield site
        site.over.set()
        site.shutdown()
        thread.join()


@pytest.fixture
def pauses(monkeypatch):
    """What would have been slept, in seconds."""
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


@pytest.fixture
def fetch(site, pauses, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    for name in ("MIXER_JAX_CACHE", "MIXER_JAX_BASE_URL", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    options = {"cache": tmp_path / "cache", "base": site.url, "retries": 3}
    return lambda name=NAME, **others: download(name, **options | others)


@pytest.fixture
def refused(fetch):
    """A fetch that must fail with this message; returns all of it."""

    def refused(message, *name, **options):
        with pytest.raises(CheckpointError, match=message) as error:
            fetch(*name, **options)
        return str(error.value)

    return refused


@pytest.fixture
def target(tmp_path):
    return tmp_path / "cache" / FILE


@pytest.fixture
def part(target):
    return target.with_name(f"{target.name}.part")


@pytest.fixture
def half(refused, site, part):
    """Half of the file, left by a download that broke off."""
    site.answers = [serving(cut=HALF)]
    refused("ended after", retries=0)
    assert part.read_bytes() == BODY[:HALF]
    site.requests.clear()
    return part


def left_in(folder):
    """The names of the files in a folder, but for the lock."""
    return sorted(file.name for file in folder.rglob("*") if file.is_file() and file.suffix != ".lock")


def test_a_good_download_is_complete_and_leaves_nothing_else(fetch, site, target, tmp_path, pauses):
    calls = []
    assert fetch(progress=lambda *call: calls.append(call)) == target
    assert target.read_bytes() == BODY
    assert left_in(tmp_path) == ["Mixer-B_16.npz"]
    assert calls[-1] == (len(BODY), len(BODY))
    assert calls == sorted(set(calls))
    assert (site.ranges, pauses) == ([None], [])


def test_what_is_cached_is_requested_again_only_with_force(fetch, refused, site, target):
    assert fetch(FILE) == target  # the name may end in .npz
    site.files[FILE] = BODY[::-1]
    assert fetch(base="http://127.0.0.1:9").read_bytes() == BODY
    assert len(site.requests) == 1
    assert fetch(force=True).read_bytes() == BODY[::-1]
    site.answers = [answering(404)]
    refused("404", force=True)
    assert target.read_bytes() == BODY[::-1]


# Resuming


@pytest.mark.parametrize("broken", [serving(cut=HALF), reset, stall], ids=["closed", "reset", "stalled"])
def test_a_broken_transfer_resumes_where_it_broke_off(fetch, site, pauses, broken):
    site.headers.append(("x-goog-hash", md5(BODY)))
    site.answers = [broken]
    path = fetch(timeout=0.2 if broken is stall else 30, progress=lambda *_: site.arrived.set())
    assert path.read_bytes() == BODY
    assert site.ranges[0] is None
    start = int(site.ranges[1].removeprefix("bytes=").removesuffix("-"))
    assert start == HALF or (broken is reset and 0 < start < HALF)  # a reset may drop what was not read yet
    assert site.requests[1][1]["If-Range"] == '"one"'
    assert len(pauses) == 1


def test_the_next_call_resumes_too(fetch, site, half, tmp_path):
    calls = []
    assert fetch(progress=lambda *call: calls.append(call)).read_bytes() == BODY
    assert site.ranges == [REST]
    assert calls[0][0] > HALF
    assert calls[-1] == (len(BODY), len(BODY))
    assert left_in(tmp_path) == ["Mixer-B_16.npz"]


SPANS = ("bytes 5-9/700001", "bytes */700001", "")
PIECES = [None, "bytes=100000-", "bytes=200000-", "bytes=300000-"]
CONTINUATIONS = {  # ETag, answers, the ranges that are requested
    "three pieces": ('"one"', [serving(cut=100_000)] * 3, PIECES),
    "no ETag": (None, [serving(cut=HALF)], [None, None]),
    "a weak ETag": ('W/"weak"', [serving(cut=HALF)], [None, None]),
    "no ranges": ('"one"', [serving(cut=HALF), serving(ranges=False)], [None, REST]),
    "416": ('"one"', [serving(cut=HALF), answering(416, Content_Range=f"bytes */{HALF}")], [None, REST, None]),
}
for span in SPANS:
    answer = answering(206, BODY[HALF:], ETag='"one"', Content_Range=span)
    CONTINUATIONS[f"another span: {span}"] = ('"one"', [serving(cut=HALF), answer], [None, REST, None])


@pytest.mark.parametrize("case", CONTINUATIONS)
def test_pieces_are_put_together_or_the_download_starts_over(fetch, site, pauses, case):
    etag, answers, ranges = CONTINUATIONS[case]
    site.headers, site.answers = [("ETag", etag)] if etag else [], list(answers)
    assert fetch().read_bytes() == BODY
    assert site.ranges == ranges
    assert (pauses[-1] == 0) == (ranges[1:] == [REST, None])  # the answer, and not the connection, was at fault


@pytest.mark.parametrize("ignores_if_range", [False, True])
def test_another_version_of_the_file_starts_over(fetch, site, half, ignores_if_range):
    site.files[FILE], site.headers = BODY[::-1], [("ETag", '"two"')]
    rest = {"ETag": '"two"', "Content_Range": f"bytes {HALF}-{len(BODY) - 1}/{len(BODY)}"}
    site.answers = [answering(206, BODY[::-1][HALF:], **rest) if ignores_if_range else serving(cut=HALF)]
    assert fetch().read_bytes() == BODY[::-1]
    assert site.ranges == [REST, None if ignores_if_range else REST]
    assert [headers["If-Range"] for _, headers in site.requests] == ['"one"', None if ignores_if_range else '"two"']


def test_an_interrupted_download_is_kept(fetch, part):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(progress=interrupt)
    assert part.stat().st_size > 0
    assert fetch().read_bytes() == BODY


# Lengths


def test_without_a_length_the_end_is_the_end(fetch, site):
    site.answers, totals = [serving(length=False)], set()
    assert fetch(progress=lambda done, total: totals.add(total)).read_bytes() == BODY
    assert totals == {None}


@pytest.mark.parametrize("length", [True, False], ids=["announced", "actual"])
def test_the_official_address_must_give_the_published_size(refused, site, tmp_path, monkeypatch, length):
    monkeypatch.setattr(module, "BASE_URL", f"{site.url}/")
    site.answers, calls = [serving(length=length)], []
    message = f"^{site.url}/{FILE}: 700001 bytes are 0.67 MiB, but the published file has 228.47"
    refused(message, progress=lambda *call: calls.append(call))
    assert not {"Mixer-B_16.npz", "Mixer-B_16.npz.part"} & set(left_in(tmp_path))
    assert (calls == []) == length  # then it is refused before its body


# Retries and refusals


@pytest.mark.parametrize(
    ("answer", "least", "most"),
    [
        *((answering(status), 0.5, 1) for status in (408, 429, 500, 502, 503, 504)),
        (hang_up, 0.5, 1),
        (answering(429, Retry_After="7"), 7, 7),
        (answering(429, Retry_After="0"), 0, 0),
        (answering(429, Retry_After="9999"), 60, 60),
        (answering(503, Retry_After="Wed, 21 Oct 2026 07:28:00 GMT"), 0.5, 1),
    ],
)
def test_a_busy_server_is_asked_again_after_a_pause(fetch, site, pauses, answer, least, most):
    site.answers = [answer]
    assert fetch().read_bytes() == BODY
    assert len(pauses) == 1
    assert least <= pauses[0] <= most


def test_the_pauses_double_and_end(refused, site, pauses):
    site.answers = [answering(503)] * 9
    refused(f"^{site.url}/{FILE}: the server answers 503 .*attempt 9, the last", retries=8)
    assert len(pauses) == 8
    assert all(min(2**n / 2, 60) <= pause <= min(2**n, 60) for n, pause in enumerate(pauses))


def test_no_server_is_an_error(refused, pauses):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    refused(rf"^{url}/{FILE}: no answer \(.*refused\).*check the connection and try again later", base=url)
    assert len(pauses) == 3


PAGE = "the answer is a web page .*a proxy or a log-in page may be in the way"
PAGES = {
    "by its first byte": answering(200, b"<!DOCTYPE html><html>", Content_Type="application/octet-stream"),
    "XML": answering(200, b"\n <?xml version='1.0'?>"),
    "by its type": answering(200, b"Please log in", Content_Type="text/html; charset=utf-8"),
}
SHORT = f"the answer ended after {HALF} of {len(BODY)} bytes .*attempt 4, the last.*resumes there"
REFUSALS = {  # answers, the message and how many bytes are kept
    "it stays short": ([serving(cut=HALF)] + [serving(cut=0)] * 3, SHORT, HALF),
    "a total that is not reached": (
        [serving(cut=HALF), *[serving(total=len(BODY) + 1)] * 3],
        f"the answer ended after {len(BODY)} of {len(BODY) + 1} bytes",
        len(BODY),
    ),
    "empty": ([answering(200, ETag='"one"')] * 4, "the answer ended after 0 of", 0),
    **{page: ([answer], PAGE, None) for page, answer in PAGES.items()},
}
for answer in ("404 Not Found", "403 Forbidden", "401 Unauthorized", "416 Requested Range"):
    remedy = f"the server answers {answer}.*; .*MIXER_JAX_BASE_URL .*put a file from elsewhere at .*/{FILE}$"
    REFUSALS[answer] = ([answering(int(answer[:3]), b"<html>")], remedy, None)


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_is_final_and_says_what_to_do(refused, site, pauses, target, part, refusal):
    answers, message, kept = REFUSALS[refusal]
    site.answers = list(answers)
    refused(f"^{site.url}/{FILE}: {message}")
    assert len(pauses) == len(answers) - 1
    assert (part.stat().st_size if part.exists() else None) == kept
    assert not target.exists()


@pytest.mark.parametrize("page", PAGES)
def test_a_web_page_does_not_touch_what_has_arrived(fetch, refused, site, half, page):
    site.answers = [PAGES[page]]
    refused(f"^{site.url}/{FILE}: {PAGE}")
    assert half.read_bytes() == BODY[:HALF]
    assert fetch().read_bytes() == BODY


# Hashes


CRC32C, RIGHT, WRONG = "crc32c=AAAAAA==", md5(BODY), md5(BODY[1:])  # the first is wrong as well, and not checked
HASHES = {True: [[CRC32C, RIGHT, "sha1=x"], [f"{CRC32C}, {RIGHT}"], [CRC32C], [f"x{WRONG}"]]}
HASHES[False] = [[WRONG], [CRC32C, WRONG], [f"{CRC32C},{WRONG}"]]


@pytest.mark.parametrize(("right", "hashes"), [(right, hashes) for right in HASHES for hashes in HASHES[right]])
def test_a_wrong_md5_removes_what_has_arrived_and_other_hashes_are_ignored(fetch, refused, site, target, part, right, hashes):
    site.headers += [("x-goog-hash", value) for value in hashes]
    if right:
        assert fetch().read_bytes() == BODY
    else:
        refused(f"^{site.url}/{FILE}: damaged on the way: its MD5 is .*download it again")
    assert target.exists() == right
    assert not part.exists()


def test_the_hash_covers_the_part_that_came_before(fetch, refused, site, half):
    site.headers.append(("x-goog-hash", md5(BODY)))
    half.write_bytes(BODY[1 : HALF + 1])
    refused("damaged on the way: its MD5 is")
    assert site.ranges == [REST]
    assert fetch().read_bytes() == BODY


# Disk, cache and names


def test_a_full_disk_is_noticed_before_the_body(fetch, refused, half, monkeypatch):
    room = types.SimpleNamespace(free=len(BODY) - HALF - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room)
    refused(rf"{FILE}: cannot be written \(0 MiB to download, 0 MiB left .*MIXER_JAX_CACHE")
    assert half.read_bytes() == BODY[:HALF]
    room.free += 1
    assert fetch().read_bytes() == BODY


def test_a_cache_that_cannot_be_written_is_an_error(refused, site, target, tmp_path):
    file = tmp_path / "file"
    file.touch()
    refused(f"^{file}/{FILE}: cannot be written .*MIXER_JAX_CACHE names another folder", cache=file)
    assert site.requests == []
    target.mkdir(parents=True)
    refused("cannot be written .*Is a directory")


def test_the_environment_names_cache_and_mirror(fetch, site, tmp_path, monkeypatch):
    for name, value, folder in (
        ("HOME", str(tmp_path / "home"), "home/.cache/mixer-jax"),
        ("XDG_CACHE_HOME", str(tmp_path / "xdg"), "xdg/mixer-jax"),
        ("MIXER_JAX_CACHE", "~/mine", "home/mine"),
    ):
        monkeypatch.setenv(name, value)
        monkeypatch.setenv("MIXER_JAX_BASE_URL", f"{site.url}/")
        assert fetch(cache=None, base=None) == tmp_path / folder / FILE
    monkeypatch.setenv("MIXER_JAX_BASE_URL", "http://127.0.0.1:9")
    assert fetch(cache=tmp_path / "argument") == tmp_path / "argument" / FILE
    assert [path for path, _ in site.requests] == [f"/{FILE}"] * 4


@pytest.mark.parametrize("base", ["file:///etc", "storage.example", "https://with space"])
def test_what_is_not_a_web_address_is_refused(refused, base):
    refused("is not an address to download from: .*https://", base=base)


@pytest.mark.parametrize("name", ["Mixer-B_16", "imagenet1k/Mixer-B_32", "../../secret", "hf:timm", "hf:a/b/c", ""])
def test_an_unknown_name_lists_the_known(refused, site, name):
    message = refused(f"^'{name}' is not a published checkpoint; these are:\n", name)
    assert all(known in message for known in [*PUBLISHED, *AT_TIMM, *ON_HUB, "hf:owner/repository"])
    assert site.requests == []


def test_downloads_at_one_time_are_one_download(fetch, site):
    start = threading.Barrier(4)

    def run(_):
        start.wait()
        return fetch().read_bytes()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(4))) == [BODY] * 4
    assert len(site.requests) == 1


# What is published


def test_the_table_has_the_listed_files():
    assert len(PUBLISHED) == 11
    assert BASE_URL == "https://storage.googleapis.com/mixer_models/"
    top1 = {"imagenet1k/Mixer-B_16": 76.44, "imagenet1k/Mixer-L_16": 71.76, "sam/Mixer-B_16": 77.36, "sam/Mixer-B_32": 72.47}
    assert {name: file.top1 for name, file in PUBLISHED.items() if file.top1} == top1
    assert all(name.startswith("sam/") == ("that others report" in file.note) for name, file in PUBLISHED.items())
    for name, file in ON_HUB.items():
        assert name.endswith("ft_in1k") == (file.classes == 1000)
        assert ("tag ft_in1k is wrong" in file.note) == name.endswith("goog_in21k_ft_in1k")
    for file in AT_TIMM.values():
        assert re.fullmatch(rf"timm/\w+-{file.sha256}\.pth", file.file)
        assert len(file.sha256) == 8
        assert file.address.startswith("https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-")
        assert (file.preprocessing == "timm_bilinear") == ("miil" in file.name) == (not file.copy_of)
    assert {file.classes for file in AT_TIMM.values()} == {1000, 21_843, 11_221}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_listed_size_is_that_of_the_shapes(name):
    """What np.savez writes: the arrays, headers of 128 bytes, and each name twice in the zip."""
    published = PUBLISHED[name]
    assert name.endswith("/Mixer-" + published.variant.replace("/", "_"))
    config = MixerConfig.named(published.variant, num_classes=21_843 if name.startswith("imagenet21k/") else 1000)
    assert config.num_classes == published.classes
    headers = sum(128 + 30 + 20 + 46 + 2 * len(f"{name}.npy") for name in shapes(GOOGLE, config.sizes)) + 22
    size = 4 * config.num_parameters + headers
    assert [published.is_plausible(size + wrong) for wrong in (-(2**15), 0, 2**15)] == [False, True, False]
    exact = {"imagenet1k/Mixer-B_16": 239_567_448, "imagenet1k/Mixer-L_16": 832_874_440}
    assert size == exact.get(name, size)


def test_a_file_with_its_hash_in_its_name_has_that_hash(fetch, refused, site, pauses, tmp_path, monkeypatch):
    name, sha256 = "timm/mixer_b16_224_miil-9229a591", hashlib.sha256(BODY).hexdigest()
    site.files[f"{name}.pth"] = BODY
    refused(f"^{site.url}/{name}.pth: not the published file: its SHA-256 is {sha256}, .* 9229a591", name)
    assert not list(tmp_path.rglob("*.pth"))
    monkeypatch.setitem(KNOWN, name, replace(KNOWN[name], sha256=sha256[:8]))
    assert fetch(f"{name}.pth", force=True) == fetch(name) == tmp_path / "cache" / f"{name}.pth"
    assert len(site.requests) == 2


def test_each_file_is_requested_from_its_owner_unless_a_mirror_is_named(pauses, tmp_path, monkeypatch):
    addresses = []

    def transfer(url, *_):
        addresses.append(url)
        raise RuntimeError("no request leaves this test")

    monkeypatch.delenv("MIXER_JAX_BASE_URL", raising=False)
    monkeypatch.setattr(module, "_Transfer", transfer)
    for file in (PUBLISHED | AT_TIMM).values():
        for base in (None, "http://mirror/a/"):
            with pytest.raises(RuntimeError):
                download(file.name, cache=tmp_path, base=base)
        assert addresses[-2:] == [file.address, f"http://mirror/a/{file.file}"]
    assert f"{BASE_URL}gsam/Mixer-S_8.npz" in addresses


class EntryNotFoundError(Exception):
    """The hub's client has one of this name."""


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def repository():
    """The files of a repository on the hub: their content, or an error. A file that is not here is absent."""
    return {"model.safetensors": b"weights", "config.json": b"{}"}


@pytest.fixture
def hub(tmp_path, monkeypatch, repository):
    """Stands in for huggingface_hub: a cache below tmp_path, which has the files that were downloaded."""
    hub, snapshot = Mock(), tmp_path / "hub" / "models--a--b" / "snapshots" / COMMIT

    def from_cache(_, file, cache_dir, revision=None):
        return str(snapshot / file) if (snapshot / file).exists() and revision in (None, COMMIT) else None

    def from_hub(_, file, revision=None, **options):
        content = repository.get(file, EntryNotFoundError(f"404: {file}"))
        if isinstance(content, Exception):
            raise content
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / file).write_bytes(content)
        return str(snapshot / file)

    hub.try_to_load_from_cache.side_effect, hub.hf_hub_download.side_effect = from_cache, from_hub
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.delenv("MIXER_JAX_CACHE", raising=False)
    return hub


@pytest.mark.parametrize("name", [*ON_HUB, "hf:some-one/mixer.of_mine"])
def test_the_hub_is_asked_through_its_client_for_what_is_not_cached(hub, tmp_path, name):
    """The weights, and the config of the same commit."""
    options: dict = {"cache_dir": None, "endpoint": None, "force_download": False, "etag_timeout": 30}
    path = download(name)
    assert (path.name, path.parent.name) == ("model.safetensors", COMMIT)
    assert left_in(tmp_path) == ["config.json", "model.safetensors"]
    first, second = hub.hf_hub_download.call_args_list
    assert (first.args, first.kwargs) == ((name.removeprefix("hf:"), "model.safetensors"), options)
    assert (second.args, second.kwargs) == ((first.args[0], "config.json"), options | {"revision": COMMIT})
    assert download(name) == path
    assert hub.hf_hub_download.call_count == 2
    options |= {"cache_dir": tmp_path / "hub", "endpoint": "http://mirror", "force_download": True}
    assert download(name, force=True, cache=tmp_path, base="http://mirror") == path
    assert hub.hf_hub_download.call_args.kwargs == options | {"revision": COMMIT}


def test_a_config_is_fetched_for_weights_that_were_cached_without_it(hub, repository, tmp_path):
    config = repository.pop("config.json")
    path = download("hf:a/b")
    assert left_in(tmp_path) == ["model.safetensors"]
    repository["config.json"] = config
    assert download("hf:a/b") == path
    assert path.with_name("config.json").read_bytes() == config
    hub.try_to_load_from_cache.side_effect = lambda _, file, **options: object() if file == "config.json" else str(path)
    calls = hub.hf_hub_download.call_count
    assert download("hf:a/b") == path  # the client remembers that there is none
    assert hub.hf_hub_download.call_count == calls


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_failure_of_the_hub_is_one_message(hub, refused, repository, monkeypatch, file):
    repository[file] = RuntimeError("no connection")
    refused(rf"^hf:a/b: {file} cannot be downloaded \(no connection\); check the name", "hf:a/b")
    repository.clear()
    refused(r"^hf:a/b: model.safetensors cannot be downloaded \(404: model.safetensors\)", "hf:a/b", force=True)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'mixer-jax\[hub\]'"):
        download("hf:a/b")


# Published names everywhere


@pytest.fixture
def mirror(site, tmp_path, monkeypatch):
    """The server, with the weights of another, tiny Mixer under the published name; a mirror may."""
    site.files = {FILE: GOLDENS["square"].weights_file.read_bytes()}
    for name, value in (("no_proxy", "*"), ("MIXER_JAX_CACHE", str(tmp_path / "cache")), ("MIXER_JAX_BASE_URL", site.url)):
        monkeypatch.setenv(name, value)
    return site


def test_a_published_name_loads_like_a_file_and_then_offline(mirror, target, capsys):
    import mixer_jax
    from convert.__main__ import main

    mirror.headers = [("x-goog-hash", md5(mirror.files[FILE]))]
    for _ in range(2):
        assert mixer_jax.load(NAME).config == GOLDENS["square"].config
        assert [path for path, _ in mirror.requests] == [f"/{FILE}"]
        mirror.files.clear()
    assert main(["download", NAME]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    assert main(["inspect", NAME, "--json"]) == 0
    assert main(["download", "imagenet1k/Mixer-Z_99"]) == 1
    assert "is not a published checkpoint; these are:" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("where", ["download", "read", "load", "predict", "summary"])
def test_a_terminal_shows_the_progress_of_a_download_wherever_it_happens(mirror, tmp_path, monkeypatch, where):
    import mixer_jax
    from convert import read
    from convert.__main__ import main
    from mixer_jax.__main__ import main as mixer_main

    monkeypatch.setattr(progress, "PATIENCE", 0)
    (tmp_path / "image.png").write_bytes(b"")
    calls = {
        "download": lambda: main(["download", NAME]),
        "read": lambda: read(NAME),
        "load": lambda: mixer_jax.load(NAME),
        "predict": lambda: mixer_main(["predict", NAME, str(tmp_path / "image.png")]),
        "summary": lambda: mixer_main(["summary", NAME]),
    }
    for error_stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", error_stream)
        calls[where]()
        assert (f"{NAME}: " in error_stream.getvalue()) == shown
        shutil.rmtree(tmp_path / "cache")
    assert [path for path, _ in mirror.requests] == [f"/{FILE}"] * 2


def test_the_bar_reaches_the_total_and_goes_away(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "PATIENCE", 0)
    with progress.progress_bar("a file") as report:
        for done in (0, HALF, len(BODY)):
            time.sleep(0.15)  # longer than between two drawings
            report(done, len(BODY))
        drawn = terminal.getvalue()
    assert all(text in drawn for text in (" 43%|", "300k/700k", "100%|"))
    assert terminal.getvalue().endswith("\r")


def test_weights_that_were_cached_without_a_config_are_there_offline(hub, repository):
    del repository["config.json"]
    path = download("hf:a/b")
    repository["config.json"] = type("LocalEntryNotFoundError", (EntryNotFoundError,), {})("offline and not in the cache")
    assert download("hf:a/b") == path
