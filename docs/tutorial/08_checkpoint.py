"""Stage 8: checkpoints that are whole or not there; the next start goes on exactly where the last one stands."""

import copy
import hashlib
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DistributedSampler
from torchvision.datasets import MNIST

DATA = os.environ.get("DATA", "data")  # folder of the images
LIMIT = int(os.environ.get("LIMIT", 60_000))  # training images to use
EPOCHS = int(os.environ.get("EPOCHS", 2))
PRECISION = os.environ.get("PRECISION", "no")  # or bf16; or fp16, on GPUs
BATCH_SIZE = 64  # images of one optimizer step, over all ranks
CHECKPOINT = Path(os.environ.get("CHECKPOINT", "checkpoint.pt"))


def save(state: dict[str, Any]) -> None:
    """Write a checkpoint that is whole or not there, whatever happens meanwhile."""
    temporary = CHECKPOINT.with_suffix(".tmp")
    torch.save(state, temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(CHECKPOINT)


def main() -> None:
    """Train, and evaluate after each epoch."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=PRECISION)
    device, rank, num_ranks = accelerator.device, accelerator.process_index, accelerator.num_processes
    if PRECISION == "fp16" and device.type == "cpu":
        raise SystemExit("PRECISION=fp16 needs a GPU: on a CPU Accelerate trains in fp32 and does not say so")
    with accelerator.local_main_process_first():  # the others wait, and find the files
        train, test = MNIST(DATA, train=True, download=True), MNIST(DATA, train=False, download=True)
    train_images, train_labels = train.data[:LIMIT].to(device), train.targets[:LIMIT].to(device)
    test_images, test_labels = test.data.to(device), test.targets.to(device)
    torch.manual_seed(0)
    layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)]
    network = nn.Sequential(nn.Flatten(), *layers).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    bare_network = copy.deepcopy(network)  # prepare() changes the network's own forward, too
    model, optimizer = accelerator.prepare(network, optimizer)
    sampler = DistributedSampler(train_labels, num_ranks, rank)
    num_steps = -(-len(train_labels) // BATCH_SIZE)
    if BATCH_SIZE % num_ranks:
        raise SystemExit(f"a batch of {BATCH_SIZE} images cannot be shared equally by {num_ranks} ranks")
    share = BATCH_SIZE // num_ranks
    first_epoch = first_step = 0
    if CHECKPOINT.exists():
        saved = torch.load(CHECKPOINT, map_location="cpu", weights_only=True)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        first_epoch, first_step = divmod(saved["step"], num_steps)
        accelerator.print(f"going on at epoch {first_epoch}, step {first_step}")

    for epoch in range(first_epoch, EPOCHS):
        began_s, num_images, loss_sum = time.perf_counter(), 0, 0.0
        sampler.set_epoch(epoch)
        order = torch.tensor(list(sampler))[: len(train_labels[rank::num_ranks])]  # without the repeats
        accelerator.print(f"epoch {epoch}: the first images are {order[:5].tolist()}")
        for step in range(first_step, num_steps):
            rows = order[step * share : (step + 1) * share]
            images, labels = train_images[rows] / 255, train_labels[rows]
            batch_size = min(BATCH_SIZE, len(train_labels) - step * BATCH_SIZE)
            loss = F.cross_entropy(model(images), labels, reduction="sum")
            optimizer.zero_grad()
            accelerator.backward(loss * num_ranks / batch_size)  # DDP divides by num_ranks
            optimizer.step()
            num_images += len(labels)
            loss_sum += loss.item()
            if accelerator.is_main_process and (step % 100 == 99 or step + 1 == num_steps):
                done = {"step": epoch * num_steps + step + 1, "network": network.state_dict()}
                save(done | {"optimizer": optimizer.state_dict()})
        first_step = 0
        seconds = time.perf_counter() - began_s

        num_correct = num_tested = 0
        if accelerator.is_main_process:  # the others wait in the next collective
            bare_network.load_state_dict(network.state_dict())
            with torch.inference_mode():
                logits = bare_network(test_images / 255)
            num_correct, num_tested = (logits.argmax(1) == test_labels).sum().item(), len(test_labels)
            weights = hashlib.sha256(b"".join(p.numpy(force=True).tobytes() for p in network.parameters())).hexdigest()
            test_loss = F.cross_entropy(logits, test_labels)
            print(f"epoch {epoch}: weights {weights[:8]} have test loss {test_loss:.6f}")
        sums = torch.tensor([num_images, loss_sum, num_correct, num_tested], dtype=torch.float64, device=device)
        num_images, loss_sum, num_correct, num_tested = accelerator.reduce(sums).tolist()  # collective
        accelerator.print(
            f"epoch {epoch}: {num_steps} steps, {num_images:,.0f} images in {seconds:.1f} s, "
            f"loss {loss_sum / num_images:.4f}; test: {num_correct:,.0f} of {num_tested:,.0f} right"
        )


if __name__ == "__main__":
    main()
