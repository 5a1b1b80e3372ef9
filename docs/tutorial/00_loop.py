"""Stage 0: the training loop of a single-GPU tutorial, on MNIST."""

import os
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

DATA = os.environ.get("DATA", "data")  # folder of the images
LIMIT = int(os.environ.get("LIMIT", 60_000))  # training images to use
EPOCHS = int(os.environ.get("EPOCHS", 2))
BATCH_SIZE = 64


def main() -> None:
    """Train, and evaluate after each epoch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_set = MNIST(DATA, train=True, download=True, transform=ToTensor())
    test_set = MNIST(DATA, train=False, download=True, transform=ToTensor())
    train_loader = DataLoader(Subset(train_set, range(LIMIT)), batch_size=BATCH_SIZE, shuffle=True)
    test_loader = DataLoader(test_set, batch_size=BATCH_SIZE)
    torch.manual_seed(0)
    layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)]
    network = nn.Sequential(nn.Flatten(), *layers).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)

    for epoch in range(EPOCHS):
        began_s, num_images, loss_sum = time.perf_counter(), 0, 0.0
        for images, labels in train_loader:
            images, labels = images.to(device), labels.to(device)
            loss = F.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            num_images += len(labels)
            loss_sum += loss.item() * len(labels)
        seconds = time.perf_counter() - began_s

        num_correct = num_tested = 0
        with torch.inference_mode():
            for images, labels in test_loader:
                num_correct += (network(images.to(device)).argmax(1) == labels.to(device)).sum().item()
                num_tested += len(labels)
        print(
            f"epoch {epoch}: {len(train_loader)} steps, {num_images:,.0f} images in {seconds:.1f} s, "
            f"loss {loss_sum / num_images:.4f}; test: {num_correct:,.0f} of {num_tested:,.0f} right"
        )


if __name__ == "__main__":
    main()
