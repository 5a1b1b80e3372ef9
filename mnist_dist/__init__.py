"""A distributed training job for two classic MNIST networks, built on Accelerate."""
