"""Export of the mini suite to parquet shards, for Ray Data, other tools or a fixed copy."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from parcelray.datasets.mini.scenes import Split
from parcelray.datasets.mini.suite import FAMILIES, family_samples
from parcelray.datasets.parquet import to_table

ROWS_PER_SHARD = 1000


def write_parquet(
    folder: Path, split: Split, families: Sequence[str] = FAMILIES, count: int = 1000, seed: int = 0
) -> list[Path]:
    """Writes the first `count` evaluation samples of each family as shards `<split>/<family>-<shard>.parquet`.

    Samples of the training split have no dense supervision. A folder with all three splits is a valid `data.path` of a
    job with `data.type: parquet`.

    Args:
        folder: folder to write to.
        split: split to export.
        families: families to export.
        count: number of samples per family.
        seed: seed of the scenes.

    Returns:
        The written files, in order.
    """
    target = folder / split
    target.mkdir(parents=True, exist_ok=True)
    files = []
    for family in families:
        samples = family_samples(split, family, count, seed)
        for shard, start in enumerate(range(0, count, ROWS_PER_SHARD)):
            files.append(target / f"{family}-{shard:05d}.parquet")
            pq.write_table(to_table(samples[start : start + ROWS_PER_SHARD]), files[-1])
    return files
