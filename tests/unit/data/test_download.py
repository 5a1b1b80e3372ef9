"""A dataset comes whole or not at all: damaged archives, bad servers, two at once, a death in the middle."""

import dataclasses
import functools
import gzip
import hashlib
import io
import os
import shutil
import signal
import socket
import struct
import threading
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
from mnist_dist.data import download as module
from mnist_dist.data.dataset import load_dataset
from mnist_dist.data.download import dataset_file, fetch, write_dataset
from mnist_dist.errors import DownloadError, RequestError, StorageError
from tests.conftest import become, skip, start_verb, wait_for, wait_ranks
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
    cls: Any = module._torchvision_class(dataset)[0]
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


@dataclasses.dataclass
class Mirror:
    """A server on this machine that misbehaves as told, a word for each request and "whole" after the last."""

    address: str
    misdeeds: deque[str] = dataclasses.field(default_factory=deque)
    served: list[str] = dataclasses.field(default_factory=list)  # "MISDEED NAME", in the order of the requests
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
            if misdeed == "500":
                self.send_error(500)
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
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda _: None))  # between the rounds
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
    found = load_dataset(dataset, data_dir)
    for split, (images, labels) in ((found.train, TRAIN), (found.eval_split, TEST)):
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        assert torch.equal(split.images, images)
        assert torch.equal(split.labels, labels)
    check_tidy(data_dir, dataset)


def check_tidy(data_dir: Path, dataset: str = "mnist") -> None:
    names = {str(path.relative_to(data_dir)) for path in data_dir.rglob("*") if not path.is_dir()}
    raw = f"{module._torchvision_class(dataset)[0].__name__}/raw"
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


@pytest.mark.parametrize("dataset", FAMILY)
def test_the_names_and_sums_are_those_that_torchvision_itself_would_fetch(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = []

    def note(url: str, download_root: str, filename: str | None = None, md5: str | None = None) -> None:
        assert Path(download_root) == module._raw_folder(dataset, tmp_path)
        wanted.append((filename or Path(url).name, md5, url))
        if dataset == "emnist-digits":  # which lists what it unpacked
            Path(download_root, "gzip").mkdir(exist_ok=True)

    monkeypatch.setattr(datasets.mnist, "download_and_extract_archive", note)
    cls, options = module._torchvision_class(dataset)
    for train in (True, False):
        with pytest.raises(RuntimeError, match="Dataset not found"):
            cls(tmp_path, train=train, download=True, **options)
    ours = module._archives(dataset)
    assert {(name, md5) for name, md5, _ in ours} == {(name, md5) for name, md5, _ in wanted}
    assert all(url in addresses for name, _, url in wanted for other, _, addresses in ours if other == name)
    assert len({name for name, _, _ in ours}) == len(ours) == (1 if dataset == "emnist-digits" else 4)


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
    assert said[0] == f"{one}Internal Server Error"
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


def test_missing_synthetic_falls_back_loudly(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "draw_digits", lambda count, seed: drawn(count // 1000, seed))
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
    locked = module.FileLock

    def announce(path: Path) -> Any:
        print("at the lock", flush=True)
        return locked(path)

    module.FileLock = announce  # type: ignore[assignment, misc]
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


def _die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_unpacking() -> None:
    datasets.mnist.MNIST._load_data = _die  # type: ignore[method-assign]


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


def test_a_read_only_folder_of_archives_serves_as_a_mirror(mirror: Mirror, tmp_path: Path) -> None:
    if os.geteuid() == 0 and not can_mount():
        skip("mount", "root may write anywhere, and may not mount anything read-only here")
    data_dir = tmp_path / "data"
    raw = fill_raw(data_dir)
    with read_only(data_dir):
        with pytest.raises(RequestError, match=f"data_dir={data_dir} cannot be written") as refused:
            fetch("mnist", data_dir, say=pytest.fail)
        assert f"mirror={raw}" in str(refused.value)
        fetch("mnist", tmp_path / "own", mirror=str(raw), say=lambda _: None)
    check_whole(tmp_path / "own")
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
    data_dir.write_text("")
    return "File exists"


def _below_a_file(data_dir: Path) -> str:
    data_dir.parent.write_text("")
    return "Not a directory"


def _file_in_the_way(data_dir: Path) -> str:
    data_dir.mkdir(parents=True)
    (data_dir / "MNIST").write_text("")
    return f"{data_dir}/MNIST/raw: Not a directory"


def _folder_for_an_archive(data_dir: Path) -> str:
    path = data_dir / "MNIST/raw" / NAMES[0]
    path.mkdir(parents=True)
    return f"{path}: Is a directory"


def _link_to_itself(data_dir: Path) -> str:
    data_dir.parent.mkdir()
    data_dir.symlink_to(data_dir)
    return "File exists"


@pytest.mark.parametrize(
    "spoil",
    [_file, _below_a_file, _file_in_the_way, _folder_for_an_archive, _link_to_itself],
    ids=lambda spoil: spoil.__name__.strip("_"),
)
def test_a_data_dir_that_is_no_folder_is_one_sentence(
    spoil: Callable[[Path], str], mirror: Mirror, tmp_path: Path
) -> None:
    data_dir = tmp_path / "below/data"
    if spoil is _file:
        data_dir.parent.mkdir()
    cause = spoil(data_dir)
    with pytest.raises(RequestError) as refused:
        fetch("mnist", data_dir, say=lambda _: None)
    assert str(refused.value).startswith(f"data_dir={data_dir} cannot be written ({cause})")
    assert mirror.served == []


def test_a_name_that_no_file_system_takes_is_one_sentence() -> None:
    with pytest.raises(RequestError, match="File name too long"):
        fetch("mnist", Path("x" * 300))


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
