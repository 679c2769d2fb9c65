"""Writes the mini suite as parquet, for readers that want files: `python pipelines/export_mini_suite.py FOLDER [SAMPLES]`.

SAMPLES are per family and split (1000 if left out). The folder is then the `data.path` of a job with `data.type:
parquet`.
"""

import sys
from pathlib import Path

from parcelray.datasets.mini.export import write_parquet
from parcelray.datasets.mini.scenes import SPLITS


def main() -> int:
    """Writes all splits and says where."""
    arguments = sys.argv[1:]
    if not 1 <= len(arguments) <= 2 or (len(arguments) == 2 and not arguments[1].isdecimal()):
        sys.stderr.write(
            f"error: {' '.join(arguments) or 'no argument'} is not understood; give a folder, and how many samples per"
            " family and split.\n"
        )
        return 2
    folder, count = Path(arguments[0]), int(arguments[1]) if len(arguments) == 2 else 1000
    files = [file for split in SPLITS for file in write_parquet(folder, split, count=count)]
    sys.stdout.write(f"{len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB, in {folder}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
