"""Speed of this machine, for the time estimates of plans."""

import time

import torch


def matmul_flops_per_second(size: int = 512, repeats: int = 8, dtype: torch.dtype = torch.float32) -> float:
    """Measures the speed of products of two `size` x `size` matrices, in FLOPs per second."""
    matrix = torch.randn(size, size).to(dtype)
    matrix @ matrix
    started = time.perf_counter()
    for _ in range(repeats):
        matrix @ matrix
    return 2 * size**3 * repeats / (time.perf_counter() - started)
