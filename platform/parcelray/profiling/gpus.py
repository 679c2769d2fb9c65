"""Memory and peak speed of GPUs by name, for estimates on machines that have none."""

from typing import NamedTuple

from parcelray.errors import UserError


class Gpu(NamedTuple):
    """One type of GPU, from the data sheet of its vendor (SXM variants; dense products)."""

    memory_gib: int
    half_tflops: float
    """Peak of bf16 and fp16 products, TFLOP/s."""
    single_tflops: float
    """Peak of fp32 products outside the tensor cores, TFLOP/s."""

    def flops_per_second(self, precision: str) -> float:
        """Returns the peak speed of products for a value of `training.precision`."""
        return 1e12 * (self.single_tflops if precision == "fp32" else self.half_tflops)


GPUS = {
    "a10": Gpu(24, 125, 31.2),
    "a100": Gpu(80, 312, 19.5),
    "a100-40gb": Gpu(40, 312, 19.5),
    "h100": Gpu(80, 989, 67),
    "h200": Gpu(141, 989, 67),
    "l4": Gpu(24, 121, 30.3),
    "l40s": Gpu(48, 362, 91.6),
}


def gpu_of(name: str) -> Gpu:
    """Returns a type of GPU by its name.

    Raises:
        UserError: the name is unknown.
    """
    if name not in GPUS:
        raise UserError(f"--gpu is {name!r}; legal: {', '.join(GPUS)}.")
    return GPUS[name]
