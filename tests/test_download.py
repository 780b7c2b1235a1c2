"""A download ends in the whole, checked file or in one message: every way a server can fail, over loopback."""

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
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from convert import CheckpointError, MixerConfig
from convert import download as module
from convert.download import download
from convert.published import BASE_URL, ON_HUB, PUBLISHED

NAME, FILE = "imagenet1k/Mixer-B_16", "imagenet1k/Mixer-B_16.npz"
BODY = np.random.default_rng(0).bytes(700_001)  # several chunks, and no whole number of them
HALF = 300_007


def md5(data):
    return "md5=" + base64.b64encode(hashlib.md5(data).digest()).decode()


def crc32c(data):
    """One bit at a time, from the definition."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return "crc32c=" + base64.b64encode((register ^ 0xFFFFFFFF).to_bytes(4, "big")).decode()


@dataclass
class Site:
    """A server on loopback. Each request gets the next of `answers`, then what a good server says.

    `headers` go with every good answer; `asked` has the path and the headers of each request. The client's side says when
    bytes have `arrived`, the end of the test when all is `over`.
    """

    files: dict[str, bytes] = field(default_factory=lambda: {FILE: BODY})
    headers: list[tuple[str, str]] = field(default_factory=lambda: [("ETag", '"one"')])
    answers: list = field(default_factory=list)
    asked: list = field(default_factory=list)
    url: str = ""
    arrived: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def ranges(self):
        return [headers["Range"] for _, headers in self.asked]


def serve(request, site, *, cut=None, length=True, ranges=True, total=None):
    """A good answer, or one that ends `cut` bytes into the body, says no length, knows no ranges, or lies about the total."""
    body, start = site.files.get(request.path[1:]), 0
    if body is None:
        return answer(request, 404)
    asked = re.fullmatch(r"bytes=(\d+)-", request.headers["Range"] or "")
    if asked and ranges and request.headers["If-Range"] in (None, dict(site.headers).get("ETag")):
        start = int(asked[1])
    request.send_response(206 if start else 200)
    if start:
        request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{total or len(body)}")
    if length:
        request.send_header("Content-Length", str(len(body) - start))
    for header in site.headers:
        request.send_header(*header)
    request.end_headers()
    request.wfile.write(body[start:][:cut])


def answer(request, status, body=b"", **headers):
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


def saying(status, body=b"", **headers):
    return lambda request, site: answer(request, status, body, **headers)


def serving(**faults):
    return lambda request, site: serve(request, site, **faults)


def hang_up(request, site):
    """Close without an answer."""


def reset(request, site):
    """Send half, and break the connection off hard once some of it is there."""
    serve(request, site, cut=HALF)
    site.arrived.wait(20)
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.connection.close()


def stall(request, site):
    """Send half, then nothing; whoever waits for long is refused."""
    serve(request, site, cut=HALF)
    if not site.over.wait(20):
        site.answers = [saying(404)]


@pytest.fixture
def site():
    site = Site()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            site.asked.append((self.path, dict(self.headers) | {"Range": self.headers["Range"]}))
            (site.answers.pop(0) if site.answers else serve)(self, site)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = False  # so that closing the server waits for them
        server.handle_error = lambda *_: None  # a client that has gone away
        site.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield site
        site.over.set()
        server.shutdown()
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
def part(tmp_path):
    return tmp_path / "cache" / f"{FILE}.part"


def break_off(fetch, site, part):
    """Leave half a file behind."""
    site.answers = [serving(cut=HALF)]
    with pytest.raises(CheckpointError):
        fetch(retries=0)
    assert part.read_bytes() == BODY[:HALF]
    site.asked.clear()


def left_in(folder):
    """The files in a folder, but for the lock."""
    return sorted(file.name for file in folder.rglob("*") if file.is_file() and file.suffix != ".lock")


def test_a_good_download_is_whole_and_leaves_nothing_else(fetch, site, tmp_path, pauses):
    seen = []
    path = fetch(progress=lambda done, total: seen.append((done, total)))
    assert path == tmp_path / "cache" / FILE
    assert path.read_bytes() == BODY
    assert left_in(tmp_path) == ["Mixer-B_16.npz"]
    assert seen[-1] == (len(BODY), len(BODY))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert site.ranges == [None]
    assert pauses == []


def test_the_name_may_end_in_npz(fetch):
    assert fetch(FILE).read_bytes() == BODY


def test_what_is_cached_needs_no_server(fetch, site):
    path = fetch()
    site.asked.clear()
    assert fetch(base="http://127.0.0.1:9") == path
    assert site.asked == []


def test_force_fetches_what_is_cached(fetch, site):
    fetch()
    site.files[FILE] = BODY[::-1]
    assert fetch().read_bytes() == BODY
    assert fetch(force=True).read_bytes() == BODY[::-1]


def test_a_failed_force_keeps_what_is_cached(fetch, site):
    path = fetch()
    site.answers = [saying(404)]
    with pytest.raises(CheckpointError, match="404"):
        fetch(force=True)
    assert path.read_bytes() == BODY


@pytest.mark.parametrize("broken", [serving(cut=HALF), reset, stall], ids=["closed", "reset", "stalled"])
def test_a_broken_transfer_goes_on_where_it_broke_off(fetch, site, pauses, broken):
    site.headers.append(("x-goog-hash", md5(BODY)))
    site.answers = [broken]
    path = fetch(timeout=0.2 if broken is stall else 30, progress=lambda *_: site.arrived.set())
    assert path.read_bytes() == BODY
    assert site.ranges[0] is None
    start = int(site.ranges[1].removeprefix("bytes=").removesuffix("-"))
    assert start == HALF or (broken is reset and 0 < start < HALF)  # a reset may swallow what was not read yet
    assert site.asked[1][1]["If-Range"] == '"one"'
    assert len(pauses) == 1


def test_the_next_call_goes_on_too(fetch, site, part):
    break_off(fetch, site, part)
    seen = []
    path = fetch(progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == BODY
    assert site.ranges == [f"bytes={HALF}-"]
    assert seen[0][0] > HALF
    assert seen[-1] == (len(BODY), len(BODY))
    assert not part.exists()


def test_a_server_without_ranges_starts_over(fetch, site, part):
    break_off(fetch, site, part)
    site.answers = [serving(ranges=False)]
    assert fetch().read_bytes() == BODY
    assert len(site.asked) == 1


def test_another_etag_starts_over(fetch, site, part):
    break_off(fetch, site, part)
    site.files[FILE], site.headers = BODY[::-1], [("ETag", '"two"')]
    site.answers = [serving(cut=HALF)]
    assert fetch().read_bytes() == BODY[::-1]
    assert site.ranges == [f"bytes={HALF}-"] * 2
    assert [headers["If-Range"] for _, headers in site.asked] == ['"one"', '"two"']


def test_a_range_of_another_file_is_not_appended(fetch, site, part):
    break_off(fetch, site, part)
    site.files[FILE], site.headers = BODY[::-1], [("ETag", '"two"')]
    rest = {"ETag": '"two"', "Content_Range": f"bytes {HALF}-{len(BODY) - 1}/{len(BODY)}"}
    site.answers = [saying(206, BODY[::-1][HALF:], **rest)]  # although If-Range asked for the other
    assert fetch().read_bytes() == BODY[::-1]
    assert site.ranges == [f"bytes={HALF}-", None]


@pytest.mark.parametrize("span", ["bytes 5-9/700001", "bytes */700001", ""])
def test_another_range_than_asked_for_is_not_appended(fetch, site, part, span):
    break_off(fetch, site, part)
    site.answers = [saying(206, BODY[HALF:], ETag='"one"', Content_Range=span)]
    assert fetch().read_bytes() == BODY
    assert site.ranges == [f"bytes={HALF}-", None]


def test_416_starts_over(fetch, site, part, pauses):
    break_off(fetch, site, part)
    site.answers = [saying(416, Content_Range=f"bytes */{HALF}")]
    assert fetch().read_bytes() == BODY
    assert site.ranges == [f"bytes={HALF}-", None]
    assert pauses == [0]


def test_416_to_a_plain_request_is_refused(fetch, site):
    site.answers = [saying(416)]
    with pytest.raises(CheckpointError, match="416 R"):
        fetch()


@pytest.mark.parametrize("headers", [[], [("ETag", 'W/"weak"')]], ids=["no ETag", "a weak ETag"])
def test_without_a_strong_etag_nothing_is_resumed(fetch, site, part, headers):
    site.headers = headers
    break_off(fetch, site, part)
    assert fetch().read_bytes() == BODY
    assert site.ranges == [None]


def test_a_range_answered_in_pieces_is_put_together(fetch, site):
    site.answers = [serving(cut=100_000)] * 3
    assert fetch().read_bytes() == BODY
    assert site.ranges == [None, "bytes=100000-", "bytes=200000-", "bytes=300000-"]


def test_without_a_length_the_end_is_the_end(fetch, site):
    site.answers = [serving(length=False)]
    totals = set()
    assert fetch(progress=lambda done, total: totals.add(total)).read_bytes() == BODY
    assert totals == {None}


def test_a_body_that_stays_short_is_an_error_and_is_kept(fetch, site, part, pauses):
    message = (
        f"^{site.url}/{FILE}: the answer ended after {HALF} of {len(BODY)} bytes .*attempt 4, the last.*goes on from there"
    )
    site.answers = [serving(cut=HALF)] + [serving(cut=0)] * 3
    with pytest.raises(CheckpointError, match=message):
        fetch()
    assert part.read_bytes() == BODY[:HALF]
    assert len(pauses) == 3
    assert not part.with_suffix("").exists()


def test_an_empty_body_is_no_file(fetch, site, tmp_path):
    site.files[FILE] = b""
    with pytest.raises(CheckpointError, match="the answer ended after 0 of"):
        fetch(retries=1)
    assert not (tmp_path / "cache" / FILE).exists()


def test_a_total_that_is_not_reached_is_an_error(fetch, site, part):
    break_off(fetch, site, part)
    site.answers = [serving(total=len(BODY) + 1)]
    with pytest.raises(CheckpointError, match=f"ended after {len(BODY)} of {len(BODY) + 1} bytes"):
        fetch(retries=0)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(fetch, site, status):
    site.answers = [saying(status)]
    assert fetch().read_bytes() == BODY


def test_the_pauses_double_and_end(fetch, site, pauses):
    site.answers = [saying(503)] * 9
    with pytest.raises(CheckpointError, match=f"^{site.url}/{FILE}: the server answers 503 .*attempt 9, the last"):
        fetch(retries=8)
    assert len(pauses) == 8
    assert all(min(2**n / 2, 60) <= pause <= min(2**n, 60) for n, pause in enumerate(pauses))


@pytest.mark.parametrize(("said", "pause"), [("7", 7), ("0", 0), ("9999", 60)])
def test_retry_after_is_honoured_up_to_a_minute(fetch, site, pauses, said, pause):
    site.answers = [saying(429, Retry_After=said)]
    fetch()
    assert pauses == [pause]


def test_retry_after_a_date_is_an_ordinary_pause(fetch, site, pauses):
    site.answers = [saying(503, Retry_After="Wed, 21 Oct 2026 07:28:00 GMT")]
    fetch()
    assert 0.5 <= pauses[0] <= 1


def test_no_answer_is_asked_again(fetch, site):
    site.answers = [hang_up]
    assert fetch().read_bytes() == BODY


def test_no_server_is_an_error(fetch, pauses):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    message = rf"^http://127.0.0.1:{port}/{FILE}: no answer \(.*refused\).*check the connection and try again later"
    with pytest.raises(CheckpointError, match=message):
        fetch(base=f"http://127.0.0.1:{port}")
    assert len(pauses) == 3


@pytest.mark.parametrize(("status", "reason"), [(404, "Not Found"), (403, "Forbidden"), (401, "Unauthorized")])
def test_a_refusal_is_final_and_says_what_to_do(fetch, site, pauses, tmp_path, status, reason):
    site.answers = [saying(status, b"<html>")]
    message = f"^{site.url}/{FILE}: the server answers {status} {reason}; .*MIXER_JAX_BASE_URL .*put at {tmp_path}/cache/{FILE}"
    with pytest.raises(CheckpointError, match=message):
        fetch()
    assert pauses == []
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    "page",
    [
        saying(200, b"<!DOCTYPE html><html>", Content_Type="application/octet-stream"),
        saying(200, b"\n <?xml version='1.0'?>"),
        saying(200, b"Please log in", Content_Type="text/html; charset=utf-8"),
    ],
    ids=["by its first byte", "XML", "by its type"],
)
@pytest.mark.parametrize("resumed", [False, True])
def test_a_web_page_is_refused_and_spares_what_has_come(fetch, site, part, page, resumed):
    if resumed:
        break_off(fetch, site, part)
    site.answers = [page]
    with pytest.raises(CheckpointError, match=f"^{site.url}/{FILE}: a web page .*a proxy or a log-in page may be in the way"):
        fetch()
    assert (part.read_bytes() if part.exists() else None) == (BODY[:HALF] if resumed else None)
    assert fetch().read_bytes() == BODY


@pytest.mark.parametrize("form", ["two headers", "a comma between"])
def test_right_hashes_pass(fetch, site, form):
    site.files[FILE] = BODY[:40_000]
    hashes = [crc32c(BODY[:40_000]), md5(BODY[:40_000]), "sha1=unknown"]
    said = hashes if form == "two headers" else [", ".join(hashes)]
    site.headers += [("x-goog-hash", value) for value in said]
    assert fetch().read_bytes() == BODY[:40_000]


@pytest.mark.parametrize("form", ["md5 alone", "crc32c alone", "wrong md5, right crc32c", "right md5, wrong crc32c"])
def test_a_wrong_hash_removes_what_came(fetch, site, tmp_path, form):
    site.files[FILE], wrong = BODY[:40_000], BODY[1:40_001]
    hashes = {
        "md5 alone": [md5(wrong)],
        "crc32c alone": [crc32c(wrong)],
        "wrong md5, right crc32c": [crc32c(BODY[:40_000]), md5(wrong)],
        "right md5, wrong crc32c": [crc32c(wrong), md5(BODY[:40_000])],
    }[form]
    site.headers += [("x-goog-hash", value) for value in hashes]
    kind = "crc32c" if "wrong crc32c" in form or form == "crc32c alone" else "md5"
    with pytest.raises(CheckpointError, match=f"^{site.url}/{FILE}: damaged on the way: its {kind} is .*download it again"):
        fetch()
    assert left_in(tmp_path) == []


def test_the_hash_covers_the_part_that_came_before(fetch, site, part, tmp_path):
    site.headers.append(("x-goog-hash", md5(BODY)))
    break_off(fetch, site, part)
    part.write_bytes(BODY[1 : HALF + 1])
    with pytest.raises(CheckpointError, match="damaged on the way: its md5 is"):
        fetch()
    assert site.ranges == [f"bytes={HALF}-"]
    assert left_in(tmp_path) == []
    assert fetch().read_bytes() == BODY


def test_crc32c_has_its_check_value():
    assert module.HASHES["crc32c"](io.BytesIO(b"123456789")) == (0xE3069283).to_bytes(4, "big")


@pytest.mark.parametrize("size", [0, 1, 3, 4, 8191, 8192, 8193, 24_579])
def test_crc32c_of_any_length_is_the_definition(size):
    """Rows have 8192 bytes."""
    found = module.HASHES["crc32c"](io.BytesIO(BODY[:size]))
    assert "crc32c=" + base64.b64encode(found).decode() == crc32c(BODY[:size])


def test_crc32c_over_blocks_of_reading_is_that_of_one_piece(monkeypatch):
    whole = module.HASHES["crc32c"](io.BytesIO(BODY))  # blocks of 512 KiB: two of them
    monkeypatch.setattr(module, "LANES", 1 << 8)
    assert module.HASHES["crc32c"](io.BytesIO(BODY)) == whole
    assert module.HASHES["crc32c"](io.BytesIO(BODY[:-1] + b"?")) != whole


def test_a_full_disk_is_found_before_the_body(fetch, site, part, monkeypatch):
    break_off(fetch, site, part)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=len(BODY) - HALF - 1))
    with pytest.raises(CheckpointError, match=rf"{FILE}: cannot be written \(0 MiB more wanted, 0 MiB left .*MIXER_JAX_CACHE"):
        fetch()
    assert part.read_bytes() == BODY[:HALF]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=len(BODY) - HALF))
    assert fetch().read_bytes() == BODY


def test_a_cache_that_cannot_be_written_is_an_error(fetch, site, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        CheckpointError, match=f"^{tmp_path}/file/{FILE}: cannot be written .*MIXER_JAX_CACHE names another folder"
    ):
        fetch(cache=tmp_path / "file")
    assert site.asked == []


def test_a_folder_in_the_place_of_the_file_is_an_error(fetch, tmp_path):
    (tmp_path / "cache" / FILE).mkdir(parents=True)
    with pytest.raises(CheckpointError, match="cannot be written .*Is a directory"):
        fetch()


def test_files_of_one_name_are_kept_apart(fetch, site):
    site.files["sam/Mixer-B_16.npz"] = BODY[::-1]
    paths = [fetch(NAME), fetch("sam/Mixer-B_16")]
    assert [path.read_bytes() for path in paths] == [BODY, BODY[::-1]]
    assert [path.read_bytes() for path in (fetch(NAME), fetch("sam/Mixer-B_16"))] == [BODY, BODY[::-1]]
    assert len(site.asked) == 2


def test_the_environment_names_cache_and_mirror(fetch, site, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MIXER_JAX_BASE_URL", f"{site.url}/")
    chosen = {"cache": None, "base": None}
    assert fetch(**chosen) == tmp_path / "home" / ".cache" / "mixer-jax" / FILE
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fetch(**chosen) == tmp_path / "xdg" / "mixer-jax" / FILE
    monkeypatch.setenv("MIXER_JAX_CACHE", "~/mine")
    assert fetch(**chosen) == tmp_path / "home" / "mine" / FILE
    assert fetch(cache=tmp_path / "argument", base=None) == tmp_path / "argument" / FILE
    monkeypatch.setenv("MIXER_JAX_BASE_URL", "http://127.0.0.1:9")
    assert fetch(cache=tmp_path / "address") == tmp_path / "address" / FILE
    assert [path for path, _ in site.asked] == [f"/{FILE}"] * 5


@pytest.mark.parametrize("base", ["file:///etc", "storage.example", "https://with space"])
def test_what_is_no_web_address_is_refused(fetch, base):
    with pytest.raises(CheckpointError, match="is no address to download from: .*https://"):
        fetch(base=base)


@pytest.mark.parametrize("name", ["Mixer-B_16", "imagenet1k/Mixer-B_32", "../../secret", "hf:timm", "hf:a/b/c", ""])
def test_an_unknown_name_lists_the_known(fetch, site, name):
    with pytest.raises(CheckpointError, match=f"^'{name}' is no published checkpoint; these are:\n") as error:
        fetch(name)
    assert all(known in str(error.value) for known in [*PUBLISHED, *ON_HUB, "hf:owner/repository"])
    assert site.asked == []


@pytest.mark.parametrize("length", [True, False], ids=["announced", "found"])
def test_the_official_address_must_give_the_published_size(fetch, site, tmp_path, monkeypatch, length):
    monkeypatch.setattr(module, "BASE_URL", f"{site.url}/")
    site.answers, seen = [serving(length=length)], []
    with pytest.raises(
        CheckpointError, match=f"^{site.url}/{FILE}: 700001 bytes are 0.67 MiB, but the published file has 228.47"
    ):
        fetch(progress=lambda done, _: seen.append(done))
    assert left_in(tmp_path) == []
    assert (seen == []) == length  # then it is refused before its body


def test_the_second_of_two_downloads_takes_what_the_first_fetched(fetch, site, part, monkeypatch):
    def waited(*_):
        part.with_suffix("").write_bytes(b"of the first")

    monkeypatch.setattr(module.fcntl, "flock", waited)
    assert fetch().read_bytes() == b"of the first"
    assert site.asked == []


def test_downloads_at_one_time_are_one_download(fetch, site):
    start = threading.Barrier(4)

    def run(_):
        start.wait()
        return fetch().read_bytes()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(4))) == [BODY] * 4
    assert len(site.asked) == 1


def test_an_interrupted_download_is_kept(fetch, part):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(progress=interrupt)
    assert part.stat().st_size > 0
    assert fetch().read_bytes() == BODY


def test_the_table_has_the_listed_files():
    assert len(PUBLISHED) == 11
    assert BASE_URL == "https://storage.googleapis.com/mixer_models/"
    for name, file in PUBLISHED.items():
        assert (file.name, file.file) == (name, f"{name}.npz")
        assert name.endswith("/Mixer-" + file.variant.replace("/", "_"))
        assert file.classes == (21_843 if name.startswith("imagenet21k/") else 1000)
    assert {name: file.top1 for name, file in PUBLISHED.items() if file.top1} == {
        "imagenet1k/Mixer-B_16": 76.44,
        "imagenet1k/Mixer-L_16": 71.76,
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_listed_size_is_that_of_the_shapes(name):
    """What np.savez writes: the arrays, headers of 128 bytes, and each name twice in the zip."""
    published = PUBLISHED[name]
    config = MixerConfig.named(published.variant, num_classes=published.classes)
    block = ["LayerNorm_0/scale", "LayerNorm_0/bias", "LayerNorm_1/scale", "LayerNorm_1/bias"]
    block += [f"{mlp}_mixing/Dense_{i}/{leaf}" for mlp in ("token", "channel") for i in (0, 1) for leaf in ("kernel", "bias")]
    names = ["stem/kernel", "stem/bias", "head/kernel", "head/bias", "pre_head_layer_norm/scale", "pre_head_layer_norm/bias"]
    names += [f"MixerBlock_{i}/{leaf}" for i in range(config.num_blocks) for leaf in block]
    size = 4 * config.num_parameters + sum(128 + 30 + 20 + 46 + 2 * len(f"{name}.npy") for name in names) + 22
    assert published.is_plausible(size)
    assert not published.is_plausible(size + 2**15)
    assert not published.is_plausible(size - 2**15)
    exact = {"imagenet1k/Mixer-B_16": 239_567_448, "imagenet1k/Mixer-L_16": 832_874_440}
    assert size == exact.get(name, size)


@dataclass
class Hub:
    """Stands in for huggingface_hub."""

    file: Path
    cached: bool = False
    fault: Exception | None = None
    asked: list = field(default_factory=list)

    def try_to_load_from_cache(self, repo_id, filename, cache_dir=None):
        return str(self.file) if self.cached else None

    def hf_hub_download(self, repo_id, filename, *, cache_dir, endpoint, force_download, etag_timeout):
        self.asked.append((repo_id, filename, cache_dir, endpoint, force_download))
        if self.fault:
            raise self.fault
        return str(self.file)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "model.safetensors")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.delenv("MIXER_JAX_CACHE", raising=False)
    return hub


@pytest.mark.parametrize("name", [*ON_HUB, "hf:some-one/mixer.of_mine"])
def test_the_hub_is_asked_through_its_client(hub, name):
    assert download(name) == hub.file
    assert hub.asked == [(name.removeprefix("hf:"), "model.safetensors", None, None, False)]


def test_the_hub_is_not_asked_for_what_is_cached(hub, tmp_path):
    hub.cached = True
    assert download("hf:a/b") == hub.file
    assert hub.asked == []
    assert download("hf:a/b", force=True, cache=tmp_path, base="http://mirror") == hub.file
    assert hub.asked == [("a/b", "model.safetensors", tmp_path / "hub", "http://mirror", True)]


def test_a_failure_of_the_hub_is_one_message(hub):
    hub.fault = RuntimeError("no such repository")
    with pytest.raises(
        CheckpointError, match=r"^hf:a/b: model.safetensors cannot be fetched \(no such repository\); check the"
    ):
        download("hf:a/b")


def test_without_the_hubs_client_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'mixer-jax\[hub\]'"):
        download("hf:a/b")


def test_the_note_on_the_wrong_tag():
    for name, file in ON_HUB.items():
        assert ("tag ft_in1k is wrong" in file.note) == name.endswith("ft_in1k")
        assert file.classes == (1000 if name.endswith("ft_in1k") else 21_843)


def test_a_published_name_loads_like_a_file_and_then_offline(site, tmp_path, monkeypatch, capsys):
    """The server has the weights of another, tiny Mixer under the published name; a mirror may."""
    from conftest import GOLDENS

    import mixer_jax
    from convert.__main__ import main

    square = GOLDENS["square"]
    site.files = {FILE: square.weights_file.read_bytes()}
    site.headers = [("x-goog-hash", md5(square.weights_file.read_bytes()))]
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("MIXER_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MIXER_JAX_BASE_URL", site.url)
    assert mixer_jax.load(NAME).config == square.config
    assert [path for path, _ in site.asked] == [f"/{FILE}"]
    site.files.clear()
    assert mixer_jax.load(NAME).config == square.config
    assert len(site.asked) == 1
    assert main(["download", NAME]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "cache" / FILE)
    assert main(["inspect", NAME, "--json"]) == 0
    assert main(["download", "imagenet1k/Mixer-Z_99"]) == 1
    assert "is no published checkpoint; these are:" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("where", ["download", "read", "load", "inspect", "predict", "summary"])
def test_a_terminal_shows_the_progress_of_a_download_wherever_it_is_asked_for(site, tmp_path, monkeypatch, where):
    import mixer_jax
    from convert import read
    from convert.__main__ import main
    from mixer_jax.__main__ import main as mixer_main

    square = Path(__file__).parent / "golden" / "square" / "google.npz"
    site.files = {FILE: square.read_bytes()}
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("MIXER_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MIXER_JAX_BASE_URL", site.url)
    monkeypatch.setattr(module, "PATIENCE", 0)
    (tmp_path / "image.png").write_bytes(b"")
    calls = {
        "download": lambda: main(["download", NAME]),
        "read": lambda: read(NAME),
        "load": lambda: mixer_jax.load(NAME),
        "inspect": lambda: main(["inspect", NAME]),
        "predict": lambda: mixer_main(["predict", NAME, str(tmp_path / "image.png")]),
        "summary": lambda: mixer_main(["summary", NAME]),
    }
    for error_stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", error_stream)
        calls[where]()
        assert (f"{NAME}: " in error_stream.getvalue()) == shown
        shutil.rmtree(tmp_path / "cache")
    assert [path for path, _ in site.asked] == [f"/{FILE}"] * 2


def test_the_bar_reaches_the_total_and_goes_away(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(module, "PATIENCE", 0)
    with module._bar("a file") as progress:
        for done in (0, HALF, len(BODY)):
            time.sleep(0.15)  # longer than between two drawings
            progress(done, len(BODY))
        drawn = terminal.getvalue()
    assert " 43%|" in drawn
    assert "300k/700k" in drawn
    assert "100%|" in drawn
    assert terminal.getvalue().endswith("\r")
