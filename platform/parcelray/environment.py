"""Environment variables of this process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def restored_environment(*names: str) -> Iterator[None]:
    """Restores environment variables on exit, whatever was done to them inside."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
