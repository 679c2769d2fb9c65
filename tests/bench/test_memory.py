"""Peak memory on the CPU."""

import torch

from parcelray.bench.memory import peak_memory_bytes

CPU = torch.device("cpu")
KIB = 1024


def test_results_that_live_together_add_up() -> None:
    def call() -> torch.Tensor:
        first = torch.zeros(KIB, dtype=torch.uint8)
        second = first + 1
        return second + 1

    assert peak_memory_bytes(call, CPU) == 3 * KIB


def test_freed_results_do_not_count() -> None:
    def call() -> torch.Tensor:
        x = torch.zeros(KIB, dtype=torch.uint8)
        for _ in range(5):
            x = x + 1
        return x

    assert peak_memory_bytes(call, CPU) == 2 * KIB


def test_inputs_views_and_in_place_work_cost_nothing() -> None:
    given = torch.zeros(KIB, dtype=torch.uint8)
    assert peak_memory_bytes(lambda: given.view(32, 32).t().add_(1), CPU) == 0
