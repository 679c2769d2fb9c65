"""Writes the mini suite as parquet files.

    python pipelines/export_mini_suite.py FOLDER [SAMPLES]

SAMPLES is the number of samples per family and split (default: 1000). Use the folder as `data.path` of a job with
`data.type: parquet`.
"""

import sys
from pathlib import Path

from parcelray.datasets.mini.export import write_parquet
from parcelray.datasets.mini.scenes import SPLITS


def main() -> int:
    """Writes all splits and prints their size and folder."""
    arguments = sys.argv[1:]
    if not 1 <= len(arguments) <= 2 or (len(arguments) == 2 and not arguments[1].isdecimal()):
        sys.stderr.write(
            f"error: the arguments are {' '.join(arguments) or 'empty'}; give a folder and, optionally, the number of"
            " samples per family and split.\n"
        )
        return 2
    folder, count = Path(arguments[0]), int(arguments[1]) if len(arguments) == 2 else 1000
    files = [file for split in SPLITS for file in write_parquet(folder, split, count=count)]
    sys.stdout.write(f"{len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB, in {folder}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
