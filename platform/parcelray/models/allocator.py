"""Settings of glibc's allocator for training on a CPU."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Makes the process keep freed memory blocks instead of returning them to the kernel after every operation.

    A training step frees and allocates the same large blocks repeatedly. By default, glibc maps each block again, and
    the page faults cost more than the arithmetic (measured on 2 virtual cores: elementwise operations are 3 times as
    fast with this setting). It has no effect if the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_M_TOP_PAD, 1 << 28)
