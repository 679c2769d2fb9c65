"""Fingerprint of a data folder: the names and sizes of all files, and the content of a sample of them."""

import hashlib
import os
from pathlib import Path

from parcelray.errors import UserError

_SAMPLED_FILES = 64
_SAMPLED_BYTES = 64 * 1024
"""Bytes at the start and at the end of a sampled file that are read."""


def folder_digest(path: str | Path) -> str:
    """Returns `sha256:DIGEST` of a data folder or file; it does not depend on where the folder is.

    All names and sizes count, and the first and last 64 KiB of 64 files, spread evenly over the sorted names. So a
    folder of terabytes takes seconds, and a copy that lacks a file or was cut off is recognised.

    Raises:
        UserError: there is no such folder or file on this host.
    """
    root = Path(path)
    if not root.exists():
        raise UserError(
            f"The data {root} do not exist on the host {os.uname().nodename}; correct the path, and copy them to the"
            " same path on every host or to a shared disk."
        )
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        name = "" if file == root else file.relative_to(root).as_posix()
        digest.update(f"{name}\0{file.stat().st_size}\n".encode())
    for index in range(min(_SAMPLED_FILES, len(files))):
        digest.update(_ends(files[index * len(files) // min(_SAMPLED_FILES, len(files))]))
    return f"sha256:{digest.hexdigest()}"


def _ends(path: Path) -> bytes:
    with path.open("rb") as file:
        first = file.read(_SAMPLED_BYTES)
        file.seek(max(len(first), path.stat().st_size - _SAMPLED_BYTES))
        return first + file.read()
