"""Stage 3: the batch size counts the images of a step over all ranks, so the steps are the same on any number."""

import os
import time

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchvision.datasets import MNIST

DATA = os.environ.get("DATA", "data")  # folder of the images
LIMIT = int(os.environ.get("LIMIT", 60_000))  # training images to use
EPOCHS = int(os.environ.get("EPOCHS", 2))
BATCH_SIZE = 64  # images of one optimizer step, over all ranks


def main() -> None:
    """Train, and evaluate after each epoch."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    device, rank, num_ranks = accelerator.device, accelerator.process_index, accelerator.num_processes
    with accelerator.local_main_process_first():  # the others wait, and find the files
        train, test = MNIST(DATA, train=True, download=True), MNIST(DATA, train=False, download=True)
    train_images, train_labels = train.data[:LIMIT].to(device), train.targets[:LIMIT].to(device)
    test_loader = DataLoader(TensorDataset(test.data, test.targets), BATCH_SIZE)
    torch.manual_seed(0)
    layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)]
    network = nn.Sequential(nn.Flatten(), *layers).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    model, optimizer, test_loader = accelerator.prepare(network, optimizer, test_loader)
    sampler = DistributedSampler(train_labels, num_ranks, rank)
    num_steps = -(-len(train_labels) // BATCH_SIZE)
    if BATCH_SIZE % num_ranks:
        raise SystemExit(f"a batch of {BATCH_SIZE} images cannot be shared equally by {num_ranks} ranks")
    share = BATCH_SIZE // num_ranks

    for epoch in range(EPOCHS):
        began_s, num_images, loss_sum = time.perf_counter(), 0, 0.0
        order = torch.tensor(list(sampler))
        accelerator.print(f"epoch {epoch}: the first images are {order[:5].tolist()}")
        for step in range(num_steps):
            rows = order[step * share : (step + 1) * share]
            images, labels = train_images[rows] / 255, train_labels[rows]
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            num_images += len(labels)
            loss_sum += loss.item() * len(labels)
        seconds = time.perf_counter() - began_s

        num_correct = num_tested = 0
        with torch.inference_mode():
            for images, labels in test_loader:
                num_correct += (network(images.to(device) / 255).argmax(1) == labels.to(device)).sum().item()
                num_tested += len(labels)
        sums = torch.tensor([num_images, loss_sum, num_correct, num_tested], dtype=torch.float64, device=device)
        num_images, loss_sum, num_correct, num_tested = accelerator.reduce(sums).tolist()  # collective
        accelerator.print(
            f"epoch {epoch}: {num_steps} steps, {num_images:,.0f} images in {seconds:.1f} s, "
            f"loss {loss_sum / num_images:.4f}; test: {num_correct:,.0f} of {num_tested:,.0f} right"
        )


if __name__ == "__main__":
    main()
