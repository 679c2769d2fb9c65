"""Speed of the machine that a plan is made on."""

import time

import torch


def matmul_flops_per_second(size: int = 512, repeats: int = 8) -> float:
    """Measure the speed of float32 products of two `size` x `size` matrices, in FLOPs per second."""
    matrix = torch.randn(size, size)
    matrix @ matrix
    started = time.perf_counter()
    for _ in range(repeats):
        matrix @ matrix
    return 2 * size**3 * repeats / (time.perf_counter() - started)
