"""What two ranks that download at once do to each other: python docs/tutorial/race.py FILE [TRIES]

Plays a mirror of MNIST on this machine, from the archives in DATA, and starts FILE on two ranks with an empty folder.
"""

import contextlib
import hashlib
import os
import runpy
import subprocess
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from torchvision.datasets import MNIST

RAW = Path(os.environ.get("DATA", "data"), "MNIST/raw").absolute()
sent: list[str] = []


class Mirror(BaseHTTPRequestHandler):
    """Sends an archive at about 10 MB/s."""

    def do_GET(self) -> None:
        """Send it, and note it where all of it was taken: torchvision asks twice, and breaks the first off."""
        data = (RAW / Path(self.path).name).read_bytes()
        with contextlib.suppress(ConnectionError):
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            for start in range(0, len(data), 50_000):
                self.wfile.write(data[start : start + 50_000])
                time.sleep(0.005)
            sent.append(self.path)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def main(file: str, num_tries: int) -> None:
    """Start `file` so many times, and say how each ended."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    Thread(target=server.serve_forever, daemon=True).start()
    md5 = " ".join(hashlib.md5((RAW / name).read_bytes()).hexdigest() for name, _ in MNIST.resources)
    environment = os.environ | {"LIMIT": "64", "EPOCHS": "1", "MD5": md5, "MIRROR": str(server.server_port)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__, "rank", file]
    for attempt in range(num_tries):
        sent.clear()
        with tempfile.TemporaryDirectory() as folder:
            ended = subprocess.run(torchrun, env=environment | {"DATA": folder}, capture_output=True, check=False)
        count = sent.count("/train-images-idx3-ubyte.gz")
        print(f"try {attempt}: training images downloaded {count} times, exit code {ended.returncode}", flush=True)


if __name__ == "__main__" and sys.argv[1] == "rank":
    MNIST.mirrors = [f"http://127.0.0.1:{os.environ['MIRROR']}/"]
    MNIST.resources = [(name, md5) for (name, _), md5 in zip(MNIST.resources, os.environ["MD5"].split(), strict=True)]
    runpy.run_path(sys.argv[2], run_name="__main__")
elif __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1)
