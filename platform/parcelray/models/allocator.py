"""Settings of glibc's allocator for models on a CPU. They have no effect if the C library is not glibc."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Makes the process keep freed memory blocks instead of returning them to the kernel after every operation.

    A training step frees and allocates the same large blocks repeatedly. By default, glibc maps each block again, and
    the page faults cost more than the arithmetic (measured on 2 virtual cores: elementwise operations are 3 times as
    fast with this setting).
    """
    _set(mmap_threshold=1 << 30, trim_threshold=(1 << 31) - 1, top_pad=1 << 28)


def return_freed_memory() -> None:
    """Makes the process return every freed block of 128 KiB or more to the kernel at once.

    The process then holds no more than its live tensors. In the heap, the gaps that freed tensors leave are often too
    small for the next one: a step with activation checkpointing held up to 3.6 times its live tensors. The page faults
    cost time, the less the larger the model is.
    """
    _set(mmap_threshold=1 << 17, trim_threshold=1 << 17, top_pad=1 << 17)


def _set(*, mmap_threshold: int, trim_threshold: int, top_pad: int) -> None:
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, mmap_threshold)
        mallopt(_M_TRIM_THRESHOLD, trim_threshold)
        mallopt(_M_TOP_PAD, top_pad)
