"""A dataset comes whole or not at all: damaged archives, bad servers, two at once, a death in the middle."""

import base64
import dataclasses
import errno
import fcntl
import functools
import gzip
import hashlib
import io
import os
import shutil
import signal
import socket
import struct
import tempfile
import threading
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision import datasets

from mnist_dist.config.schema import Config
from mnist_dist.data import archives as archives_module
from mnist_dist.data import download as module
from mnist_dist.data import synthetic
from mnist_dist.data.archives import list_archives, raw_folder, torchvision_class
from mnist_dist.data.dataset import dataset_file, fingerprint, load_dataset, write_dataset
from mnist_dist.data.download import fetch, find_place, look_up
from mnist_dist.errors import DownloadError, RequestError, StorageError
from tests.conftest import become, skip, start_ranks, start_verb, wait_for, wait_ranks
from tests.disks import can_mount, read_only, resize, small_disk

FAMILY = ["mnist", "fashion-mnist", "kmnist", "qmnist", "emnist-digits"]
NAMES = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
NUM_TRAIN, NUM_TEST = 400, 10  # images of the small family below: the first archive is several chunks long


def idx(values: Tensor, kind: int = 8) -> bytes:
    """A tensor in MNIST's own file format; kind 8 is uint8, 12 is int32."""
    head = struct.pack(">HBB", 0, kind, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    return head + values.numpy().astype({8: ">u1", 12: ">i4"}[kind]).tobytes()


def packed(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def drawn(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images and labels that are noise."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 28, 28), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 10, (count,), generator=generator)


TRAIN, TEST = drawn(NUM_TRAIN, seed=0), drawn(NUM_TEST, seed=1)


def archives(dataset: str) -> dict[str, bytes]:
    """A small dataset's archives, by the names and in the formats that the real ones have."""
    if dataset == "qmnist":
        found = {}
        for part, (images, labels) in (("train", TRAIN), ("test", TEST)):
            table = torch.stack([labels, *(torch.full_like(labels, 1000 + i) for i in range(7))], dim=1)
            found[f"qmnist-{part}-images-idx3-ubyte.gz"] = packed(idx(images))
            found[f"qmnist-{part}-labels-idx2-int.gz"] = packed(idx(table, kind=12))
        return found
    if dataset == "emnist-digits":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            for part, (images, labels) in (("train", TRAIN), ("test", TEST)):
                stem = f"gzip/emnist-digits-{part}"
                file.writestr(
                    zipfile.ZipInfo(f"{stem}-images-idx3-ubyte.gz"),
                    packed(idx(images.transpose(1, 2).contiguous())),
                )
                file.writestr(zipfile.ZipInfo(f"{stem}-labels-idx1-ubyte.gz"), packed(idx(labels)))
        return {"gzip.zip": buffer.getvalue()}
    return dict(zip(NAMES, (packed(idx(values)) for values in (*TRAIN, *TEST)), strict=True))


MNIST = archives("mnist")


def pretend(dataset: str, addresses: Iterable[str], set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """Have torchvision believe that the small archives are the dataset's own, to be had at these addresses."""
    cls = torchvision_class(dataset)
    sums = {name: hashlib.md5(data).hexdigest() for name, data in archives(dataset).items()}
    base = next(iter(addresses))
    if dataset == "emnist-digits":
        set_attribute(cls, "url", f"{base}gzip.zip")
        set_attribute(cls, "md5", sums["gzip.zip"])
    elif dataset == "qmnist":
        files = [(base + name, md5) for name, md5 in sums.items()]
        set_attribute(cls, "resources", {"train": files[:2], "test": files[2:], "nist": []})
    else:
        set_attribute(cls, "resources", list(sums.items()))
        set_attribute(cls, "mirrors", list(addresses))
    unpacked = {name: hashlib.md5(gzip.decompress(data)).hexdigest() for name, data in MNIST.items()}
    set_attribute(archives_module, "UNPACKED_MD5", {"mnist": unpacked})


@dataclasses.dataclass
class Mirror:
    """A server on this machine that misbehaves as told, a word for each request and "whole" after the last."""

    address: str
    misdeeds: deque[str] = dataclasses.field(default_factory=deque)
    served: list[str] = dataclasses.field(default_factory=list)  # "MISDEED NAME", in the order of the requests
    heard: list[str] = dataclasses.field(default_factory=list)  # user name and password, to the server or the proxy
    release: threading.Event = dataclasses.field(default_factory=threading.Event)  # lets "wait" and "stall" go on


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Mirror]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            name = self.path.rsplit("/", 1)[1]
            data = files[name]
            misdeed = mirror.misdeeds.popleft() if mirror.misdeeds else "whole"
            mirror.served.append(f"{misdeed} {name}")
            if misdeed == "nonsense":
                self.wfile.write(b"this is no HTTP\r\n\r\n")
                return
            header = self.headers.get("Authorization") or self.headers.get("Proxy-Authorization") or ""
            mirror.heard.append(base64.b64decode(header.removeprefix("Basic ")).decode())
            if misdeed.isdecimal():
                self.send_error(int(misdeed))
                return
            if misdeed.startswith("http:"):
                self.send_response(302)
                self.send_header("Location", misdeed + name)
                self.end_headers()
                return
            self.send_response(200)
            if misdeed == "half a chunk":
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"%x\r\n" % len(data) + data[: len(data) // 2])
                return
            if misdeed != "half, no length":
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if misdeed == "other":
                self.wfile.write(bytes(len(data)))
                return
            half = len(data) // 2
            self.wfile.write(data[:half])
            if misdeed in ("stall", "wait"):
                self.wfile.flush()
                mirror.release.wait(60)
            if misdeed in ("whole", "wait"):
                self.wfile.write(data[half:])

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, *_: object) -> None:
            pass  # a client that went away

    with Server(("127.0.0.1", 0), Handler) as server:
        mirror = Mirror(f"http://127.0.0.1:{server.server_port}/")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield mirror
        finally:
            mirror.release.set()
            server.shutdown()
            thread.join()


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    """A server of the small MNIST, which torchvision names twice, so that each round tries two addresses."""
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda _: None, monotonic=time.monotonic))
    with serving(MNIST) as mirror:
        pretend("mnist", [mirror.address + "one/", mirror.address + "two/"], monkeypatch.setattr)
        yield mirror


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def check_whole(data_dir: Path, dataset: str = "mnist") -> None:
    """The dataset is there, each pixel and label of it, and nothing half-done lies about."""
    check_pixels(data_dir, dataset)
    check_tidy(data_dir, dataset)


def check_pixels(data_dir: Path, dataset: str = "mnist") -> None:
    """The dataset can be loaded, with the fingerprint that it always has."""
    found = load_dataset(dataset, data_dir)
    parts = dict(zip(("train_images", "train_labels", "test_images", "test_labels"), (*TRAIN, *TEST), strict=True))
    assert found.fingerprint == fingerprint(parts)
    for split, (images, labels) in ((found.train, TRAIN), (found.eval_split, TEST)):
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        assert torch.equal(split.images, images)
        assert torch.equal(split.labels, labels)


def check_tidy(data_dir: Path, dataset: str = "mnist") -> None:
    names = {str(path.relative_to(data_dir)) for path in data_dir.rglob("*") if not path.is_dir()}
    raw = raw_folder(dataset, data_dir).relative_to(data_dir)
    assert names <= {f".{dataset}.lock", f"{dataset}.safetensors", *(f"{raw}/{name}" for name in archives(dataset))}


def fill_raw(data_dir: Path, **changed: bytes) -> Path:
    """Put the archives where torchvision would."""
    raw = data_dir / "MNIST/raw"
    raw.mkdir(parents=True)
    for name, data in MNIST.items():
        (raw / name).write_bytes(changed.get(name.split("-ubyte")[0].replace("-", "_"), data))
    return raw


def test_a_working_mirror_is_asked_once_for_each_archive(mirror: Mirror, tmp_path: Path) -> None:
    said: list[str] = []
    assert fetch("mnist", tmp_path / "new/data", say=said.append) == "mnist"
    check_whole(tmp_path / "new/data")
    assert said == ["unpacking mnist, once"]
    assert fetch("mnist", tmp_path / "new/data", say=said.append) == "mnist"
    assert mirror.served == [f"whole {name}" for name in NAMES]
    assert said == ["unpacking mnist, once"]


def make_torchvisions(dataset: str, root: Path, train: bool) -> Any:
    """What torchvision makes of the dataset; of archives that are there it only unpacks them."""
    options = {"split": "digits"} if dataset == "emnist-digits" else {}
    return torchvision_class(dataset)(root, train=train, download=True, **options)


@pytest.mark.parametrize("dataset", FAMILY)
def test_the_names_and_sums_are_those_that_torchvision_itself_would_fetch(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = []

    def note(url: str, download_root: str, filename: str | None = None, md5: str | None = None) -> None:
        assert Path(download_root) == raw_folder(dataset, tmp_path)
        wanted.append((filename or Path(url).name, md5, url))
        if dataset == "emnist-digits":  # which lists what it unpacked
            Path(download_root, "gzip").mkdir(exist_ok=True)

    monkeypatch.setattr(datasets.mnist, "download_and_extract_archive", note)
    for train in (True, False):
        with pytest.raises(RuntimeError, match="Dataset not found"):
            make_torchvisions(dataset, tmp_path, train)
    ours = list_archives(dataset)
    assert {(archive.name, archive.md5) for archive in ours} == {(name, md5) for name, md5, _ in wanted}
    assert all(url in archive.addresses for name, _, url in wanted for archive in ours if archive.name == name)
    assert len({archive.name for archive in ours}) == len(ours) == (1 if dataset == "emnist-digits" else 4)


@pytest.mark.parametrize("dataset", FAMILY)
def test_each_of_the_family_is_unpacked_to_upright_digits(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(archives(dataset)) as mirror:
        pretend(dataset, [mirror.address], monkeypatch.setattr)
        assert fetch(dataset, tmp_path, say=lambda _: None) == dataset
    check_whole(tmp_path, dataset)


def test_every_dataset_of_the_configuration_can_be_fetched() -> None:
    named = Config.model_json_schema()["properties"]["dataset"]["enum"]
    assert sorted(named) == sorted([*FAMILY, "synthetic"])


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda _: b"",
    "of another magic": lambda data: packed(b"\0\0\x0d\x03" + gzip.decompress(data)[4:]),
    "of other pixels": lambda data: packed(gzip.decompress(data)[:-1] + b"\xff"),
    "a web page": lambda _: b"<html>please log in</html>",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_archive_is_refused_by_name(damage: str, name: str, tmp_path: Path, no_network: None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        pretend("mnist", ["http://none.invalid/"], patch.setattr)
        path = fill_raw(tmp_path) / name
        path.write_bytes(DAMAGES[damage](MNIST[name]))
        with pytest.raises(DownloadError) as refused:
            fetch("mnist", tmp_path, missing="fail", say=pytest.fail)
    sentence = str(refused.value)
    assert sentence.startswith(f"{path} is damaged (its md5 sum is not {hashlib.md5(MNIST[name]).hexdigest()})")
    assert "mnist-dist fetch dataset=mnist" in sentence
    assert "\n" not in sentence
    assert not dataset_file("mnist", tmp_path).exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_archive_is_fetched_again(damage: str, mirror: Mirror, tmp_path: Path) -> None:
    name = NAMES[2]
    path = fill_raw(tmp_path) / name
    path.write_bytes(DAMAGES[damage](MNIST[name]))
    said: list[str] = []
    fetch("mnist", tmp_path, say=said.append)
    check_whole(tmp_path)
    assert mirror.served == [f"whole {name}"]
    assert said[0].startswith(f"{path} is damaged")
    assert path.read_bytes() == MNIST[name]


def test_a_server_that_fails_stalls_and_breaks_off_is_asked_until_it_works(mirror: Mirror, tmp_path: Path) -> None:
    mirror.misdeeds.extend(["500", "stall", "half", "whole"])
    said: list[str] = []
    fetch("mnist", tmp_path, say=said.append, stall_s=0.3)
    check_whole(tmp_path)
    assert [entry.split()[0] for entry in mirror.served] == ["500", "stall", "half", *["whole"] * 4]
    one, two = (f"{mirror.address}{folder}/{NAMES[0]} failed: " for folder in ("one", "two"))
    assert said[0] == f"{one}HTTP status 500 Internal Server Error"
    assert said[1] == f"{two}timed out"
    assert said[2].startswith(one)
    assert said[3:] == ["unpacking mnist, once"]


@pytest.mark.parametrize("misdeed", ["500", "stall", "half", "half, no length", "half a chunk", "nonsense", "other"])
def test_a_server_that_never_works_is_one_sentence(misdeed: str, mirror: Mirror, tmp_path: Path) -> None:
    mirror.misdeeds.extend([misdeed] * 100)
    said: list[str] = []
    with pytest.raises(DownloadError) as refused:
        fetch("mnist", tmp_path, say=said.append, stall_s=0.1)
    assert len(said) == len(mirror.served) == 2 * module.NUM_ROUNDS
    sentence = str(refused.value)
    assert sentence.startswith(f"{NAMES[0]} could not be fetched ({mirror.address}two/{NAMES[0]} ")
    assert "mirror=URL-or-FOLDER, or dataset=synthetic" in sentence
    assert "\n" not in sentence
    check_tidy(tmp_path)
    assert not list(tmp_path.rglob("*.gz"))


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:1", "http://no-such-host.invalid/", "http://a b/", "http://host:port/", "gopher://x/", "://"],
)
def test_an_address_that_is_none_is_one_sentence(address: str, mirror: Mirror, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="could not be fetched"):
        fetch("mnist", tmp_path, mirror=address, say=lambda _: None, stall_s=0.5)
    assert mirror.served == []
    check_tidy(tmp_path)


@pytest.mark.parametrize("status", ["404 Not Found", "403 Forbidden", "503 Service Unavailable"])
def test_the_status_of_a_server_is_said(status: str, mirror: Mirror, tmp_path: Path) -> None:
    mirror.misdeeds.extend([status.split()[0]] * 100)
    with pytest.raises(DownloadError, match=rf"two/{NAMES[0]} failed: HTTP status {status}\); check the network"):
        fetch("mnist", tmp_path, say=lambda _: None)


# as it stands in an address, and what it says
CREDENTIALS = {"me:s3cret": "me:s3cret", "me:s3c%40ret": "me:s3c@ret", "me:s3c@ret": "me:s3c@ret", "s3cret": "s3cret:"}
CREDENTIALS |= {"me:s3cret/#?x": "me:s3cret/#?x", "me:s3cret 1": "me:s3cret 1"}


@pytest.mark.parametrize("credentials", CREDENTIALS)
def test_a_password_in_a_mirrors_address_is_used_and_not_said(
    credentials: str, mirror: Mirror, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = mirror.address.replace("http://", f"http://{credentials}@")
    mirror.misdeeds.extend(["401", "other"])
    said: list[str] = []
    fetch("mnist", tmp_path, mirror=address, say=said.append)
    check_whole(tmp_path)
    assert mirror.heard == [CREDENTIALS[credentials]] * 6
    shown = mirror.address.replace("http://", "http://***@")
    assert said[0] == f"{shown}{NAMES[0]} failed: HTTP status 401 Unauthorized"
    assert said[1].startswith(f"{shown}{NAMES[0]} gave a file whose md5 sum is not ")
    mirror.misdeeds.extend(["403"] * 100)
    with pytest.raises(DownloadError) as refused:
        fetch("mnist", tmp_path / "own", mirror=address, say=said.append)
    assert f"({shown}{NAMES[0]} failed: HTTP status 403 Forbidden)" in str(refused.value)
    assert "s3c" not in "".join([*said, str(refused.value), *capsys.readouterr()])


def test_a_password_is_not_sent_to_the_server_that_a_mirror_redirects_to(mirror: Mirror, tmp_path: Path) -> None:
    with serving(MNIST) as other:
        mirror.misdeeds.extend([other.address, f"{mirror.address}elsewhere/"])
        fetch("mnist", tmp_path, mirror=mirror.address.replace("//", "//me:s3cret@"), say=lambda _: None)
        assert other.heard == [""]
    assert mirror.heard == ["me:s3cret"] * 5
    check_whole(tmp_path)


def test_the_proxy_is_said_without_its_password(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", mirror.address.replace("//", "//me:s3cret@"))
    mirror.misdeeds.append("502")
    said: list[str] = []
    fetch("mnist", tmp_path, mirror="http://you:s3cret2@no-such-host.invalid/", say=said.append)
    check_whole(tmp_path)
    proxy = mirror.address.replace("//", "//***@")
    assert said[0] == (
        f"http://***@no-such-host.invalid/{NAMES[0]} failed: HTTP status 502 Bad Gateway (through the proxy {proxy})"
    )
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    mirror.misdeeds.append("500")
    fetch("mnist", tmp_path / "own", mirror=mirror.address, say=said.append)
    assert said[-2] == f"{mirror.address}{NAMES[0]} failed: HTTP status 500 Internal Server Error"


def test_a_slow_download_says_how_far_it_is(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAY_EVERY_S", 0.0)
    said: list[str] = []
    fetch("mnist", tmp_path, say=said.append)
    assert said[0] == f"fetching {NAMES[0]}: 65,536 of {len(MNIST[NAMES[0]]):,} bytes"


@pytest.mark.parametrize("ending", ["", "/"])
def test_a_mirror_may_be_another_server(ending: str, mirror: Mirror, tmp_path: Path) -> None:
    with serving(MNIST) as other:
        other.misdeeds.extend(["500", "half"])
        fetch("mnist", tmp_path, mirror=other.address.rstrip("/") + ending, say=lambda _: None)
        assert len(other.served) == 6
    check_whole(tmp_path)
    assert mirror.served == []


def test_a_mirror_may_be_a_folder(mirror: Mirror, tmp_path: Path, no_network: None) -> None:
    raw = fill_raw(tmp_path / "elsewhere ü")
    fetch("mnist", tmp_path / "data", mirror=str(raw), say=lambda _: None)
    check_whole(tmp_path / "data")
    fetch("mnist", tmp_path / "url", mirror=raw.as_uri(), say=lambda _: None)
    check_whole(tmp_path / "url")


def test_a_folder_that_torchvision_filled_serves_as_it_is(mirror: Mirror, tmp_path: Path, no_network: None) -> None:
    fill_raw(tmp_path)
    fetch("mnist", tmp_path, missing="fail", say=lambda _: None)
    check_whole(tmp_path)


@pytest.mark.parametrize("lost", ["one", "all"])
def test_missing_fail_opens_no_socket(lost: str, mirror: Mirror, tmp_path: Path, no_network: None) -> None:
    raw = fill_raw(tmp_path)
    for name in NAMES if lost == "all" else NAMES[3:]:
        (raw / name).unlink()
    first = raw / (NAMES[0] if lost == "all" else NAMES[3])
    with pytest.raises(DownloadError, match="missing=fail forbids the network") as refused:
        fetch("mnist", tmp_path, missing="fail", mirror=mirror.address, say=pytest.fail)
    assert str(refused.value).startswith(f"there is no {first}")


def test_missing_fail_writes_nothing(mirror: Mirror, tmp_path: Path, no_network: None) -> None:
    raw = fill_raw(tmp_path)
    said: list[str] = []
    assert fetch("mnist", tmp_path, missing="fail", say=said.append) == "mnist"
    check_pixels(tmp_path)
    assert said == [f"mnist is read from {raw} at each start, since there is no {tmp_path}/mnist.safetensors"]
    assert find_place("mnist", tmp_path) == raw
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {raw / name for name in NAMES}
    with pytest.raises(DownloadError):
        fetch("mnist", tmp_path / "new", missing="fail", say=pytest.fail)
    assert not (tmp_path / "new").exists()


def test_missing_fail_draws_digits_without_writing_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "draw_digits", lambda count, seed: drawn(count // 1000, seed))
    said: list[str] = []
    assert fetch("synthetic", tmp_path / "new", missing="fail", say=said.append) == "synthetic"
    drawn_anew = load_dataset("synthetic", tmp_path / "new")
    assert [line.split(";")[0] for line in said] == ["drawing 70,000 digits at each start"]
    assert not (tmp_path / "new").exists()
    fetch("synthetic", tmp_path, say=said.append)
    assert load_dataset("synthetic", tmp_path).identity() == drawn_anew.identity()


def test_looking_up_draws_and_fetches_nothing(mirror: Mirror, tmp_path: Path, no_network: None) -> None:
    for dataset, lacking in (("synthetic", "synthetic.safetensors"), ("mnist", f"MNIST/raw/{NAMES[0]}")):
        with pytest.raises(DownloadError) as refused:
            look_up(dataset, tmp_path, "this fetches nothing; run {} first", pytest.fail)
        assert str(refused.value) == (
            f"there is no {tmp_path}/{lacking}, and this fetches nothing; run `mnist-dist fetch dataset={dataset} "
            f"data_dir={tmp_path}` first"
        )
        assert find_place(dataset, tmp_path) is None
    assert list(tmp_path.iterdir()) == []


PLACES = ["MNIST/raw", "MNIST", "raw", "", "mnist", "mnist/raw"]  # seen from data_dir
FORMS: dict[str, Callable[[str, bytes], tuple[str, bytes]]] = {
    "packed": lambda name, data: (name, data),
    "dotted": lambda name, data: (name.replace("-idx", ".idx"), data),
    "unpacked": lambda name, data: (name.removesuffix(".gz"), gzip.decompress(data)),
    "unpacked and dotted": lambda name, data: (name.removesuffix(".gz").replace("-idx", ".idx"), gzip.decompress(data)),
    "unpacked by the browser": lambda name, data: (name, gzip.decompress(data)),
    "packed again": lambda name, data: (name, gzip.compress(gzip.decompress(data), compresslevel=1, mtime=7)),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("form", FORMS)
def test_mnist_is_used_as_people_have_it(
    form: str, place: str, mirror: Mirror, tmp_path: Path, no_network: None
) -> None:
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for name, data in MNIST.items():
        name, data = FORMS[form](name, data)
        (tmp_path / place / name).write_bytes(data)
    if form.endswith("dotted"):
        (tmp_path / place / NAMES[0].removesuffix(".gz")).mkdir()  # Kaggle has a folder of that name beside the file
    assert fetch("mnist", tmp_path, missing="fail", say=lambda _: None) == "mnist"
    check_pixels(tmp_path)
    assert find_place("mnist", tmp_path) == tmp_path / place
    fetch("mnist", tmp_path, say=lambda _: None)
    assert dataset_file("mnist", tmp_path).exists()
    check_pixels(tmp_path)
    fetch("mnist", tmp_path / "own", mirror=str(tmp_path), say=lambda _: None)
    check_whole(tmp_path / "own")


@pytest.mark.parametrize("dataset", FAMILY)
def test_archives_that_lie_in_data_dir_itself_are_used(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    pretend(dataset, ["http://none.invalid/"], monkeypatch.setattr)
    for name, data in archives(dataset).items():
        (tmp_path / name).write_bytes(data)
    fetch(dataset, tmp_path, missing="fail", say=lambda _: None)
    check_pixels(tmp_path, dataset)


@pytest.mark.parametrize("dataset", FAMILY)
def test_the_archives_are_read_as_torchvision_reads_them(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(dataset, ["http://none.invalid/"], monkeypatch.setattr)
    raw = raw_folder(dataset, tmp_path)
    raw.mkdir(parents=True)
    for name, data in archives(dataset).items():
        (raw / name).write_bytes(data)
    ours = load_dataset(dataset, tmp_path)
    for train, split in ((True, ours.train), (False, ours.eval_split)):
        theirs = make_torchvisions(dataset, tmp_path, train)
        images = theirs.data.transpose(1, 2) if dataset == "emnist-digits" else theirs.data
        labels = theirs.targets[:, 0] if dataset == "qmnist" else theirs.targets
        assert torch.equal(split.images, images)
        assert torch.equal(split.labels, labels.long())


@pytest.mark.parametrize("form", FORMS)
def test_another_datasets_files_of_the_same_names_are_not_taken(
    form: str, mirror: Mirror, tmp_path: Path, no_network: None
) -> None:
    for name, values in zip(NAMES, (*drawn(NUM_TRAIN, seed=2), *drawn(NUM_TEST, seed=3)), strict=True):
        name, data = FORMS[form](name, packed(idx(values)))
        (tmp_path / name).write_bytes(data)
    with pytest.raises(
        DownloadError, match=rf"^{tmp_path}/train-images.*is damaged, or not mnist's \(its md5 sum is not"
    ):
        fetch("mnist", tmp_path, missing="fail", say=pytest.fail)


@pytest.mark.parametrize("form", ["dotted", "unpacked and dotted"])
def test_what_lacks_is_fetched_beside_what_is_there(form: str, mirror: Mirror, tmp_path: Path) -> None:
    for name in (NAMES[0], NAMES[3]):
        file, data = FORMS[form](name, MNIST[name])
        (tmp_path / file).write_bytes(data)
    fetch("mnist", tmp_path, say=lambda _: None)
    check_pixels(tmp_path)
    assert mirror.served == [f"whole {name}" for name in NAMES[1:3]]


def test_missing_synthetic_falls_back_loudly(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "draw_digits", lambda count, seed: drawn(count // 1000, seed))
    mirror.misdeeds.extend(["500"] * 100)
    said: list[str] = []
    assert fetch("mnist", tmp_path, missing="synthetic", say=said.append) == "synthetic"
    warnings = [line for line in said if line.startswith("WARNING: ")]
    assert warnings[0].startswith(f"WARNING: {NAMES[0]} could not be fetched")
    assert "trains on DRAWN DIGITS (dataset=synthetic)" in warnings[1]
    assert load_dataset("synthetic", tmp_path).name == "synthetic"
    mirror.misdeeds.clear()  # once the server works, the real thing is taken
    assert fetch("mnist", tmp_path, missing="synthetic", say=said.append) == "mnist"


def _fetch_small(address: str, change: Callable[[], None] | None, *arguments: Any) -> None:
    """In another process: fetch the small MNIST instead of the real one."""
    pretend("mnist", [address])
    locked = module._locked

    def announce(*arguments: Any) -> Any:
        print("at the lock", flush=True)
        return locked(*arguments)

    module._locked = announce
    if change:
        change()
    become(*arguments)


def test_two_processes_at_once_fetch_once(mirror: Mirror, tmp_path: Path) -> None:
    mirror.misdeeds.append("wait")
    log, target = tmp_path / "output.txt", functools.partial(_fetch_small, mirror.address, None)
    processes = [start_verb(["fetch", "data_dir=data"], log, target) for _ in range(2)]
    wait_for(lambda: log.exists() and log.read_text().count("at the lock") == 2)
    mirror.release.set()
    assert wait_ranks(processes, log).code == 0, log.read_text()
    assert mirror.served == [f"{misdeed} {name}" for misdeed, name in zip(["wait", *["whole"] * 3], NAMES, strict=True)]
    assert log.read_text().count("mnist is in data/mnist.safetensors") == 2
    check_whole(tmp_path / "data")


def test_a_wait_for_the_lock_says_what_it_waits_for(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".mnist.lock"
    said: list[str] = []
    now_s = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds
        if now_s > 12 and not lock.closed:
            lock.close()

    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: now_s))
        fetch("mnist", tmp_path, say=said.append)
    what = "waiting for another process that fetches mnist, since {} s (" + str(path) + ")"
    assert said == [*(what.format(age_s) for age_s in (1, 6, 11)), "unpacking mnist, once"]
    check_whole(tmp_path)


def test_a_signal_ends_a_wait_for_the_lock(tmp_path: Path) -> None:
    log = tmp_path / "output.txt"
    with (tmp_path / ".mnist.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        [process] = start_ranks([f"data_dir={tmp_path}", "run_dir=run"], log)
        wait_for(lambda: log.exists() and "waiting for another process that fetches mnist" in log.read_text())
        os.kill(process.pid or 0, signal.SIGTERM)
        result = wait_ranks([process], log)
    assert result.code == 3
    assert "stopped by SIGTERM while fetching the dataset; nothing is lost, start it again" in result.output


def test_a_file_system_without_locks_is_one_sentence(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    cause = f"data_dir={tmp_path} cannot be written (it has no file locks: No locks available)"
    with pytest.raises(RequestError) as refused:
        fetch("mnist", tmp_path, say=pytest.fail)
    assert str(refused.value) == f"{cause}; mend that, or give another folder"
    raw = fill_raw(tmp_path)
    said: list[str] = []
    fetch("mnist", tmp_path, say=said.append)
    check_pixels(tmp_path)
    assert said == [f"{cause}, so mnist is read from {raw} at each start"]
    assert mirror.served == []


def _die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_unpacking() -> None:
    module.read_archives = _die  # type: ignore[assignment]


def _die_writing() -> None:
    os.fsync = _die  # type: ignore[assignment]


@pytest.mark.parametrize("change", [None, _die_unpacking, _die_writing], ids=["fetching", "unpacking", "writing"])
def test_a_process_that_dies_leaves_nothing_that_a_later_one_trusts(
    change: Callable[[], None] | None, mirror: Mirror, tmp_path: Path
) -> None:
    if not change:
        mirror.misdeeds.append("wait")
    log, data_dir = tmp_path / "output.txt", tmp_path / "data"
    target = functools.partial(_fetch_small, mirror.address, change)
    process = start_verb(["fetch", "data_dir=data"], log, target)
    if not change:
        wait_for(lambda: any(path.stat().st_size for path in data_dir.rglob(f".{NAMES[0]}.*")))
        process.kill()
    assert wait_ranks([process], log).code == -signal.SIGKILL
    assert not dataset_file("mnist", data_dir).exists()
    if change is not _die_unpacking:  # which happens in memory
        with pytest.raises(AssertionError):
            check_tidy(data_dir)  # so it did die in the middle
    fetch("mnist", data_dir, say=lambda _: None)
    check_whole(data_dir)


def test_a_read_only_folder_that_has_the_dataset_serves(mirror: Mirror, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    write_dataset(dataset_file("mnist", data_dir), "mnist", TRAIN, TEST)
    with read_only(data_dir):
        assert fetch("mnist", data_dir, say=pytest.fail) == "mnist"
        check_whole(data_dir)
    assert mirror.served == []


@pytest.mark.parametrize("missing", ["download", "synthetic"])
def test_a_read_only_folder_of_archives_serves_as_it_is(missing: str, mirror: Mirror, tmp_path: Path) -> None:
    if os.geteuid() == 0 and not can_mount():
        skip("mount", "root may write anywhere, and may not mount anything read-only here")
    data_dir = tmp_path / "data"
    raw = fill_raw(data_dir)
    said: list[str] = []
    with read_only(data_dir):
        assert fetch("mnist", data_dir, missing=missing, say=said.append) == "mnist"
        check_whole(data_dir)
        assert find_place("mnist", data_dir) == raw
    [line] = said
    assert line.startswith(f"data_dir={data_dir} cannot be written (")
    assert line.endswith(f"), so mnist is read from {raw} at each start")
    assert mirror.served == []


def test_a_read_only_folder_without_all_archives_is_refused(mirror: Mirror, tmp_path: Path) -> None:
    if os.geteuid() == 0 and not can_mount():
        skip("mount", "root may write anywhere, and may not mount anything read-only here")
    (fill_raw(tmp_path / "data") / NAMES[2]).unlink()
    with (
        read_only(tmp_path / "data"),
        pytest.raises(
            RequestError, match=f"^data_dir={tmp_path}/data cannot be written .*; mend that, or give another"
        ),
    ):
        fetch("mnist", tmp_path / "data", say=pytest.fail)
    assert mirror.served == []


def test_a_full_disk_is_one_sentence_however_far_it_gets(mirror: Mirror, tmp_path: Path) -> None:
    if not can_mount():
        skip("mount", "nothing can be mounted here")
    num_refused = 0
    with small_disk(tmp_path / "data", 1) as data_dir:
        for num_pages in range(1, 1000, 10):
            resize(data_dir, num_pages)
            try:
                fetch("mnist", data_dir, missing="synthetic", say=lambda _: None)  # no reason to draw digits either
                break
            except StorageError as error:
                problem = str(error)
            assert problem == f"data_dir={data_dir} has no room for mnist: No space left on device"
            assert not dataset_file("mnist", data_dir).exists()
            check_tidy(data_dir)
            num_refused += 1
        check_whole(data_dir)
    assert num_refused > 10
    assert sorted(set(mirror.served)) == sorted(f"whole {name}" for name in NAMES)
    # What was whole was not fetched again; only the first two archives ever met a full disk.
    assert [mirror.served.count(f"whole {name}") for name in NAMES[2:]] == [1, 1]


def _file(data_dir: Path) -> str:
    data_dir.parent.mkdir()
    data_dir.write_text("")
    return f"{data_dir} is not a folder"


def _below_a_file(data_dir: Path) -> str:
    data_dir.parent.write_text("")
    return f"{data_dir.parent} is not a folder"


def _file_in_the_way(data_dir: Path) -> str:
    data_dir.mkdir(parents=True)
    (data_dir / "MNIST").write_text("")
    return f"{data_dir}/MNIST is not a folder"


def _folder_for_an_archive(data_dir: Path) -> str:
    path = data_dir / "MNIST/raw" / NAMES[0]
    path.mkdir(parents=True)
    return f"{path} is a folder, not a file"


def _link_to_itself(data_dir: Path) -> str:
    data_dir.parent.mkdir()
    data_dir.symlink_to(data_dir)
    return f"{data_dir} is a link that leads back to itself"


def _dead_link(data_dir: Path) -> str:
    data_dir.parent.mkdir()
    data_dir.symlink_to("/not/there")
    return f"{data_dir} is a link to /not/there, which is not there"


def _dead_link_above(data_dir: Path) -> str:
    data_dir.parent.symlink_to("elsewhere")
    return f"{data_dir.parent} is a link to elsewhere, which is not there"


def _dead_link_for_torchvisions_folder(data_dir: Path) -> str:
    data_dir.mkdir(parents=True)
    (data_dir / "MNIST").symlink_to("/not/there")
    return f"{data_dir}/MNIST is a link to /not/there, which is not there"


def _dead_link_for_an_archive(data_dir: Path) -> str:
    path = fill_raw(data_dir) / NAMES[0]
    path.unlink()
    path.symlink_to("/not/there")
    return f"{path} is a link to /not/there, which is not there"


def _folder_for_the_dataset(data_dir: Path) -> str:
    path = data_dir / "mnist.safetensors"
    path.mkdir(parents=True)
    return f"{path} is a folder, not a file"


def _dead_link_for_the_dataset(data_dir: Path) -> str:
    data_dir.mkdir(parents=True)
    path = data_dir / "mnist.safetensors"
    path.symlink_to("/not/there")
    return f"{path} is a link to /not/there, which is not there"


OBSTACLES = [
    *(_file, _below_a_file, _file_in_the_way, _folder_for_an_archive, _link_to_itself, _dead_link, _dead_link_above),
    *(_dead_link_for_torchvisions_folder, _dead_link_for_an_archive, _folder_for_the_dataset),
    _dead_link_for_the_dataset,
]


@pytest.mark.parametrize("missing", ["download", "fail", "synthetic"])
@pytest.mark.parametrize("spoil", OBSTACLES, ids=lambda spoil: spoil.__name__.strip("_"))
def test_what_is_in_the_way_of_a_data_dir_is_one_sentence(
    spoil: Callable[[Path], str], missing: str, mirror: Mirror, tmp_path: Path
) -> None:
    data_dir = tmp_path / "below/data"
    cause = spoil(data_dir)
    with pytest.raises(RequestError) as refused:
        fetch("mnist", data_dir, missing=missing, say=pytest.fail)
    assert cause in str(refused.value)
    assert "\n" not in str(refused.value)
    assert mirror.served == []
    with pytest.raises(RequestError) as refused:
        load_dataset("mnist", data_dir)
    assert cause in str(refused.value)


@pytest.mark.parametrize(
    ("closed", "cause"),
    [
        ("", "{closed}: Permission denied"),
        ("MNIST/raw", "{closed}: Permission denied"),
        (f"MNIST/raw/{NAMES[0]}", "{closed} cannot be read (Permission denied)"),
        ("mnist.safetensors", "{closed} cannot be read (Permission denied)"),
    ],
    ids=["data_dir", "raw", "archive", "dataset"],
)
@pytest.mark.parametrize("missing", ["download", "fail"])
def test_what_may_not_be_read_is_one_sentence(closed: str, cause: str, missing: str, mirror: Mirror) -> None:
    with folder_for_all() as data_dir:
        fill_raw(data_dir)
        if closed == "mnist.safetensors":
            write_dataset(data_dir / closed, "mnist", TRAIN, TEST)
        for path in data_dir.rglob("*"):
            path.chmod(0o777)
        (data_dir / closed).chmod(0)
        try:
            with another_user(), pytest.raises(RequestError) as refused:  # noqa: PT012
                fetch("mnist", data_dir, missing=missing, say=pytest.fail)
                load_dataset("mnist", data_dir)
        finally:
            (data_dir / closed).chmod(0o777)
        assert cause.format(closed=str(data_dir / closed).rstrip("/")) in str(refused.value)
        if closed == f"MNIST/raw/{NAMES[0]}":
            assert (data_dir / closed).read_bytes() == MNIST[NAMES[0]]
    assert mirror.served == []


def test_a_folder_that_may_not_be_written_is_no_fault_of_the_network(mirror: Mirror) -> None:
    with folder_for_all() as data_dir:
        raw = data_dir / "MNIST/raw"
        raw.mkdir(parents=True)
        raw.chmod(0o555)
        with another_user(), pytest.raises(RequestError) as refused:
            fetch("mnist", data_dir, say=pytest.fail)
        assert str(refused.value).startswith(f"data_dir={data_dir} cannot be written ({raw}/.{NAMES[0]}.part-")
        assert "Permission denied" in str(refused.value)
    assert mirror.served == []


@pytest.mark.parametrize("writable", [True, False])
def test_a_folder_that_another_user_made_serves(writable: bool, mirror: Mirror) -> None:
    said: list[str] = []
    with folder_for_all() as data_dir:
        fill_raw(data_dir)
        (data_dir / ".mnist.lock").touch(0o644)
        (data_dir / ".mnist.safetensors.0").touch(0o644)  # of a process that died
        data_dir.chmod(0o1777 if writable else 0o755)
        with another_user():
            fetch("mnist", data_dir, say=said.append)
            check_pixels(data_dir)
        assert dataset_file("mnist", data_dir).exists() == writable
    assert said == (
        ["unpacking mnist, once"]
        if writable
        else [
            f"data_dir={data_dir} cannot be written (Permission denied), so mnist is read from {data_dir}/MNIST/raw "
            "at each start"
        ]
    )
    assert mirror.served == []


@contextmanager
def folder_for_all() -> Iterator[Path]:
    """A folder that every user may enter, which tmp_path is not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@contextmanager
def another_user() -> Iterator[None]:
    """Be somebody who may not read and write everything, where one is root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_name_that_no_file_system_takes_is_one_sentence() -> None:
    with pytest.raises(RequestError, match="File name too long"):
        fetch("mnist", Path("x" * 300))


@pytest.mark.real_data
@pytest.mark.parametrize("form", FORMS)
def test_the_real_mnist_is_used_as_people_have_it(
    form: str, raw_mnist: Path, mnist_dir: Path, tmp_path: Path, no_network: None
) -> None:
    for name in NAMES:
        file, data = FORMS[form](name, (raw_mnist / name).read_bytes())
        (tmp_path / file).write_bytes(data)
    fetch("mnist", tmp_path, missing="fail", say=lambda _: None)
    known = "e391470432e167b5416c7d25cec3274e66c40a8f3399c39cce3f4e1bb9fccf47"  # by which old checkpoints know it
    assert load_dataset("mnist", tmp_path).fingerprint == load_dataset("mnist", mnist_dir).fingerprint == known
    with pytest.raises(DownloadError, match="not fashion-mnist's"):
        fetch("fashion-mnist", tmp_path, missing="fail", say=pytest.fail)


@pytest.mark.real_data
def test_the_real_mnist_is_that_of_torchvision(raw_mnist: Path, mnist_dir: Path, tmp_path: Path) -> None:
    ours = load_dataset("mnist", mnist_dir)
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for path in raw_mnist.glob("*.gz"):
        shutil.copy(path, raw)
    expected = {
        True: (60_000, [5, 0, 4, 1, 9, 2, 1, 3, 1, 4], [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]),
        False: (10_000, [7, 2, 1, 0, 4, 1, 4, 9, 5, 9], [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]),
    }
    for train, split in ((True, ours.train), (False, ours.eval_split)):
        theirs = datasets.MNIST(str(tmp_path), train=train, download=True)  # unpacks only
        count, first_labels, counts = expected[train]
        assert split.images.shape == (count, 28, 28)
        assert split.labels[:10].tolist() == first_labels
        assert split.labels.bincount().tolist() == counts
        pixels = [hashlib.md5(images.numpy().tobytes()).hexdigest() for images in (split.images, theirs.data)]
        assert pixels[0] == pixels[1]
        assert torch.equal(split.labels, theirs.targets)
