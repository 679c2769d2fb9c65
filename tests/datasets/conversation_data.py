"""Conversations about generated images, in every format that a training reads."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CASES = Path(__file__).parents[1] / "fixtures" / "cases"


def picture(seed: int, side: int = 24) -> bytes:
    """An image of seeded noise as PNG."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def rows_of(count: int) -> list[dict[str, Any]]:
    """Rows in LLaVA's format: every fourth has two turns, every fifth has two images."""
    rows = []
    for number in range(count):
        turns = [("human", f"<image>\nwhat is {number}?"), ("gpt", f"number {number}")]
        if number % 4 == 0:
            turns += [("human", "and then?"), ("gpt", f"{number + 1}")]
        images: Any = f"{number}.png"
        if number % 5 == 0:
            images = [images, f"{number}b.png"]
            turns[0] = ("human", "<image><image>\ncompare")
        rows.append(
            {
                "id": f"r{number}",
                "image": images,
                "conversations": [{"from": role, "value": text} for role, text in turns],
            }
        )
    return rows


def names_of(row: dict[str, Any]) -> list[str]:
    """Names of the images of a row."""
    return row["image"] if isinstance(row["image"], list) else [row["image"]]


def write_folder(folder: Path, count: int) -> Path:
    """Writes rows as JSON, with their images in a folder; returns the JSON file."""
    (folder / "images").mkdir(parents=True)
    rows = rows_of(count)
    for row in rows:
        for name in names_of(row):
            (folder / "images" / name).write_bytes(picture(len(name) + int(row["id"][1:])))
    (folder / "rows.json").write_text(json.dumps(rows, indent=1))
    return folder / "rows.json"


def write_shards(folder: Path, count: int, per_shard: int = 5) -> str:
    """Writes rows and images as WebDataset shards; returns the pattern of their names."""
    folder.mkdir(parents=True)
    for shard in range(-(-count // per_shard)):
        with tarfile.open(folder / f"part-{shard:03}.tar", "w") as archive:
            for row in rows_of(count)[shard * per_shard : (shard + 1) * per_shard]:
                members = [(f"{row['id']}.json", json.dumps({**row, "image": "other-name.jpg"}).encode())]
                for number, name in enumerate(names_of(row)):
                    members.append((f"{row['id']}.{number}.png", picture(len(name) + int(row["id"][1:]))))
                for name, content in members:
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return str(folder / f"part-{{000..{-(-count // per_shard) - 1:03}}}.tar")
