"""One epoch of training the way others do it: what the job is compared with.

    python -m benchmarks.loops LOOP MODEL[,MODEL] PRECISION[,...] DATA_DIR [BATCH_SIZE[,...] [STEPS]]

prints one JSON object for each combination. Same network, batch size, optimizer, data and device for all: the GPU where
there is one, unless ACCELERATE_USE_CPU=true. Each loop is written as its own documentation writes it. The seconds are
those of the training loop alone, without imports, set-up and evaluation, and on a GPU after ten steps that are not
timed. DATA_DIR holds the dataset as `mnist-dist fetch` leaves it, with torchvision's own files beside it.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

BATCH_SIZE = {"mlp": 64, "cnn": 32}
LR = {"mlp": 1e-3, "cnn": 1e-4}
NUM_IMAGES = 60_000


@dataclass(frozen=True)
class Job:
    """What a loop is to train."""

    model: str
    precision: str
    data_dir: str
    batch_size: int
    steps: int | None  # or one epoch
    device: str  # cuda or cpu

    def seconds_since(self, began_s: float) -> float:
        """Until the device has done all that was launched."""
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began_s


def _network(model: str) -> Any:
    """The network as the tutorials write it."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    torch.manual_seed(0)
    if model == "mlp":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)
        )

    class CNN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
            self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
            self.conv3 = nn.Conv2d(64, 128, 3, padding=1)
            self.pool = nn.MaxPool2d(2, 2)
            self.fc1 = nn.Linear(128 * 3 * 3, 10)

        def forward(self, x: Any) -> Any:
            x = self.pool(F.relu(self.conv1(x)))
            x = self.pool(F.relu(self.conv2(x)))
            x = self.pool(F.relu(self.conv3(x)))
            return self.fc1(x.view(-1, 128 * 3 * 3))

    return CNN()


def _loader(job: Job, *, normalise: bool) -> Any:
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    steps: list[Any] = [transforms.ToTensor()]
    if normalise:
        steps.append(transforms.Normalize((0.1307,), (0.3081,)))
    images = datasets.MNIST(
        job.data_dir, train=True, download=True, transform=transforms.Compose(steps)
    )  # only unpacks
    return DataLoader(images, batch_size=job.batch_size, shuffle=True)


def tutorial(job: Job) -> float:
    """The tutorials' own loop."""
    from torch import nn, optim

    network, criterion = _network(job.model).to(job.device), nn.CrossEntropyLoss()
    optimizer = optim.Adam(network.parameters(), lr=LR[job.model])
    loader = _loader(job, normalise=False)
    began_s, running = time.perf_counter(), 0.0
    for images, labels in itertools.islice(loader, job.steps):
        images, labels = images.to(job.device), labels.to(job.device)
        optimizer.zero_grad()
        loss = criterion(network(images), labels)
        loss.backward()
        optimizer.step()
        running += loss.item()
    return job.seconds_since(began_s)


def example(job: Job) -> float:
    """As PyTorch's basic MNIST example: DataLoader, normalised pixels, a loss printed every ten batches."""
    import torch.nn.functional as F
    from torch import optim

    network = _network(job.model).to(job.device)
    optimizer = optim.Adam(network.parameters(), lr=LR[job.model])
    loader = _loader(job, normalise=True)
    network.train()
    began_s = time.perf_counter()
    for index, (images, target) in enumerate(itertools.islice(loader, job.steps)):
        images, target = images.to(job.device), target.to(job.device)
        optimizer.zero_grad()
        loss = F.nll_loss(F.log_softmax(network(images), dim=1), target)
        loss.backward()
        optimizer.step()
        if index % 10 == 0:
            print(f"{index} {loss.item():.6f}", file=sys.stderr)
    return job.seconds_since(began_s)


def accelerate(job: Job) -> float:
    """As Accelerate's examples: model, optimizer and loader prepared."""
    from accelerate import Accelerator
    from torch import nn, optim

    accelerator = Accelerator(cpu=job.device == "cpu", mixed_precision="bf16" if job.precision == "bf16" else "no")
    network, criterion = _network(job.model), nn.CrossEntropyLoss()
    optimizer = optim.Adam(network.parameters(), lr=LR[job.model])
    network, optimizer, loader = accelerator.prepare(network, optimizer, _loader(job, normalise=True))
    network.train()
    began_s = time.perf_counter()
    for images, labels in itertools.islice(loader, job.steps):
        loss = criterion(network(images), labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return job.seconds_since(began_s)


def lightning(job: Job) -> float:
    """Lightning's Trainer, without checkpoints, logger and progress bar."""
    import lightning as pl
    from torch import nn, optim

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network, self.criterion = _network(job.model), nn.CrossEntropyLoss()

        def training_step(self, batch: Any, _index: int) -> Any:
            return self.criterion(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return optim.Adam(self.parameters(), lr=LR[job.model])

        def on_train_start(self) -> None:
            self.began_s = time.perf_counter()

        def on_train_end(self) -> None:
            self.seconds = job.seconds_since(self.began_s)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    length: dict[str, Any] = {"max_epochs": 1, "limit_train_batches": job.steps}
    trainer = pl.Trainer(
        accelerator="gpu" if job.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if job.precision == "bf16" else "32-true",
        **length,
        **quiet,
    )
    module = Module()
    trainer.fit(module, _loader(job, normalise=True))
    return float(module.seconds)


def _keras(backend: str, job: Job) -> float:
    os.environ["KERAS_BACKEND"] = backend
    import keras
    import numpy as np

    from mnist_dist.data.dataset import load_dataset

    train = load_dataset("mnist", Path(job.data_dir)).train
    images = train.images.numpy().astype(np.float32)[..., None] / 255
    labels = train.labels.numpy()
    layers = keras.layers
    if job.model == "mlp":
        inner = [layers.Flatten(), layers.Dense(512, "relu"), layers.Dense(256, "relu")]
    else:
        inner = []
        for channels in (32, 64, 128):
            inner += [layers.Conv2D(channels, 3, padding="same", activation="relu"), layers.MaxPooling2D(2)]
        inner.append(layers.Flatten())
    network = keras.Sequential([keras.Input((28, 28, 1)), *inner, layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile(optimizer=keras.optimizers.Adam(LR[job.model]), loss=loss)
    size = job.batch_size
    network.fit(images[: 10 * size], labels[: 10 * size], batch_size=size, verbose=0)  # compiles, outside the clock
    num_images = job.steps * size if job.steps else len(images)
    began_s = time.perf_counter()
    network.fit(images[:num_images], labels[:num_images], batch_size=size, epochs=1, verbose=0)
    return job.seconds_since(began_s)


def keras_torch(job: Job) -> float:
    """Keras 3 on torch, data in memory, `fit`."""
    return _keras("torch", job)


def keras_jax(job: Job) -> float:
    """Keras 3 on JAX, data in memory, the whole step compiled."""
    return _keras("jax", job)


def bare(job: Job) -> float:
    """No framework: resident tensors, the same operations, no Accelerate, no logging, nothing to stop it."""
    import contextlib

    import torch
    import torch.nn.functional as F

    from mnist_dist.data.dataset import load_dataset
    from mnist_dist.models import build_model

    train = load_dataset("mnist", Path(job.data_dir)).train.to(torch.device(job.device))
    network, size = build_model(job.model, seed=0).to(job.device), job.batch_size
    optimizer = torch.optim.Adam(network.parameters(), lr=LR[job.model], fused=True)
    began_s = time.perf_counter()
    order = torch.randperm(len(train.labels), device=job.device)
    for start in itertools.islice(range(0, len(order), size), job.steps):
        rows = order[start : start + size]
        images, labels = train.images.index_select(0, rows) / 255, train.labels.index_select(0, rows)
        with torch.autocast(job.device, torch.bfloat16) if job.precision == "bf16" else contextlib.nullcontext():
            logits = network(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return job.seconds_since(began_s)


def bare_tuned(job: Job) -> float:
    """The bare loop, with the two settings of the process that the job makes."""
    from mnist_dist.distributed.device import tune_cpu

    tune_cpu()
    return bare(job)


LOOPS: dict[str, Callable[[Job], float]] = {
    f.__name__: f for f in (tutorial, example, accelerate, lightning, keras_torch, keras_jax, bare, bare_tuned)
}


def main() -> None:
    """Run one loop, for each network, precision and batch size that is named."""
    loop, models, precisions, data_dir, *rest = sys.argv[1:]
    sizes = [int(size) for size in rest[0].split(",")] if rest else [0]  # 0: the tutorial's
    steps = int(rest[1]) if len(rest) > 1 else None
    from mnist_dist.distributed.device import choose_device, set_arithmetic
    from mnist_dist.distributed.launch_env import read_launch_env

    device = choose_device(read_launch_env(os.environ)).type
    for model, precision, size in itertools.product(models.split(","), precisions.split(","), sizes):
        batch_size = size or BATCH_SIZE[model]
        job = Job(model, precision, data_dir, batch_size, steps, device)
        if device == "cuda":
            set_arithmetic(precision, bit_exact=False)
            LOOPS[loop](replace(job, steps=10))
        seconds = LOOPS[loop](job)
        num_steps = steps and min(steps, -(-NUM_IMAGES // batch_size))
        images = min(num_steps * batch_size, NUM_IMAGES) if num_steps else NUM_IMAGES
        case = {"model": model, "precision": precision, "batch_size": batch_size, "device": job.device}
        figures = {"seconds": seconds, "images": images, "images_per_s": images / seconds}
        print(json.dumps(case | figures), flush=True)


if __name__ == "__main__":
    main()
