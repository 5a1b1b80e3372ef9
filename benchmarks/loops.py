"""One epoch of training the way others do it: what the job is compared with.

    python -m benchmarks.loops LOOP MODEL PRECISION DATA_DIR      prints one JSON object

Same network, batch size, optimizer and data for all; each loop is written as its own documentation writes it. The
seconds are those of the training loop alone, without imports, set-up and evaluation. DATA_DIR holds the dataset as
`mnist-dist fetch` leaves it, with torchvision's own files beside it.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCH_SIZE = {"mlp": 64, "cnn": 32}
LR = {"mlp": 1e-3, "cnn": 1e-4}


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


def _loader(model: str, data_dir: str, *, normalise: bool) -> Any:
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    steps: list[Any] = [transforms.ToTensor()]
    if normalise:
        steps.append(transforms.Normalize((0.1307,), (0.3081,)))
    images = datasets.MNIST(data_dir, train=True, download=True, transform=transforms.Compose(steps))  # only unpacks
    return DataLoader(images, batch_size=BATCH_SIZE[model], shuffle=True)


def tutorial(model: str, _precision: str, data_dir: str) -> float:
    """The tutorials' own loop."""
    from torch import nn, optim

    network, criterion = _network(model), nn.CrossEntropyLoss()
    optimizer = optim.Adam(network.parameters(), lr=LR[model])
    loader = _loader(model, data_dir, normalise=False)
    began_s, running = time.perf_counter(), 0.0
    for images, labels in loader:
        optimizer.zero_grad()
        loss = criterion(network(images), labels)
        loss.backward()
        optimizer.step()
        running += loss.item()
    return time.perf_counter() - began_s


def example(model: str, _precision: str, data_dir: str) -> float:
    """As PyTorch's basic MNIST example: DataLoader, normalised pixels, a loss printed every ten batches."""
    import torch.nn.functional as F
    from torch import optim

    network = _network(model)
    optimizer = optim.Adam(network.parameters(), lr=LR[model])
    loader = _loader(model, data_dir, normalise=True)
    network.train()
    began_s = time.perf_counter()
    for index, (images, target) in enumerate(loader):
        images, target = images.to("cpu"), target.to("cpu")
        optimizer.zero_grad()
        loss = F.nll_loss(F.log_softmax(network(images), dim=1), target)
        loss.backward()
        optimizer.step()
        if index % 10 == 0:
            print(f"{index} {loss.item():.6f}", file=sys.stderr)
    return time.perf_counter() - began_s


def accelerate(model: str, precision: str, data_dir: str) -> float:
    """As Accelerate's examples: model, optimizer and loader prepared."""
    from accelerate import Accelerator
    from torch import nn, optim

    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    network, criterion = _network(model), nn.CrossEntropyLoss()
    optimizer = optim.Adam(network.parameters(), lr=LR[model])
    network, optimizer, loader = accelerator.prepare(network, optimizer, _loader(model, data_dir, normalise=True))
    network.train()
    began_s = time.perf_counter()
    for images, labels in loader:
        loss = criterion(network(images), labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - began_s


def lightning(model: str, precision: str, data_dir: str) -> float:
    """Lightning's Trainer, without checkpoints, logger and progress bar."""
    import lightning as pl
    from torch import nn, optim

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network, self.criterion = _network(model), nn.CrossEntropyLoss()

        def training_step(self, batch: Any, _index: int) -> Any:
            return self.criterion(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return optim.Adam(self.parameters(), lr=LR[model])

        def on_train_start(self) -> None:
            self.began_s = time.perf_counter()

        def on_train_end(self) -> None:
            self.seconds = time.perf_counter() - self.began_s

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", precision="bf16-mixed" if precision == "bf16" else "32-true", **quiet
    )
    module = Module()
    trainer.fit(module, _loader(model, data_dir, normalise=True))
    return float(module.seconds)


def _keras(backend: str, model: str, data_dir: str) -> float:
    os.environ["KERAS_BACKEND"] = backend
    import keras
    import numpy as np

    from mnist_dist.data.dataset import load_dataset

    train = load_dataset("mnist", Path(data_dir)).train
    images = train.images.numpy().astype(np.float32)[..., None] / 255
    labels = train.labels.numpy()
    layers = keras.layers
    if model == "mlp":
        inner = [layers.Flatten(), layers.Dense(512, "relu"), layers.Dense(256, "relu")]
    else:
        inner = []
        for channels in (32, 64, 128):
            inner += [layers.Conv2D(channels, 3, padding="same", activation="relu"), layers.MaxPooling2D(2)]
        inner.append(layers.Flatten())
    network = keras.Sequential([keras.Input((28, 28, 1)), *inner, layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile(optimizer=keras.optimizers.Adam(LR[model]), loss=loss)
    size = BATCH_SIZE[model]
    network.fit(images[: 10 * size], labels[: 10 * size], batch_size=size, verbose=0)  # compiles, outside the clock
    began_s = time.perf_counter()
    network.fit(images, labels, batch_size=size, epochs=1, verbose=0)
    return time.perf_counter() - began_s


def keras_torch(model: str, _precision: str, data_dir: str) -> float:
    """Keras 3 on torch, data in memory, `fit`."""
    return _keras("torch", model, data_dir)


def keras_jax(model: str, _precision: str, data_dir: str) -> float:
    """Keras 3 on JAX, data in memory, the whole step compiled."""
    return _keras("jax", model, data_dir)


def bare(model: str, precision: str, data_dir: str) -> float:
    """No framework: resident tensors, the same operations, no Accelerate, no logging, nothing to stop it."""
    import contextlib

    import torch
    import torch.nn.functional as F

    from mnist_dist.data.dataset import load_dataset
    from mnist_dist.models import build_model

    train = load_dataset("mnist", Path(data_dir)).train
    network, size = build_model(model, seed=0), BATCH_SIZE[model]
    optimizer = torch.optim.Adam(network.parameters(), lr=LR[model], fused=True)
    began_s = time.perf_counter()
    order = torch.randperm(len(train.labels))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        images, labels = train.images.index_select(0, rows) / 255, train.labels.index_select(0, rows)
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext():
            logits = network(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - began_s


def bare_tuned(model: str, precision: str, data_dir: str) -> float:
    """The bare loop, with the two settings of the process that the job makes."""
    from mnist_dist.distributed.device import tune_cpu

    tune_cpu()
    return bare(model, precision, data_dir)


LOOPS: dict[str, Callable[[str, str, str], float]] = {
    f.__name__: f for f in (tutorial, example, accelerate, lightning, keras_torch, keras_jax, bare, bare_tuned)
}


def main() -> None:
    """Run one loop for one epoch."""
    loop, model, precision, data_dir = sys.argv[1:]
    seconds = LOOPS[loop](model, precision, data_dir)
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
