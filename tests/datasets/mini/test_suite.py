"""The mini suite: reproducibility, balance, disjoint splits, groups and errors."""

import io
import pickle
import subprocess
import sys
from collections import Counter, defaultdict
from hashlib import sha256

import numpy as np
import pytest
from PIL import Image

from parcelray.datasets.mini import FAMILIES, TASKS, MiniSuite, family_samples
from parcelray.datasets.mini.dense import DENSE_TASKS
from parcelray.datasets.mini.digits import digit_images
from parcelray.datasets.mini.scenes import SPLITS, split_of
from parcelray.datasets.sample import Sample
from parcelray.errors import UserError

_DIGEST = """
import hashlib, sys
from parcelray.datasets.mini import MiniSuite
digest = hashlib.sha256()
for group in ("single", "pair", "video"):
    for index in (7, 3, 11):
        digest.update(repr(MiniSuite("train", seed=5).get(group, index)).encode())
sys.stdout.write(digest.hexdigest())
"""

# Largest fraction of the samples of a task that may have the most frequent answer.
MAJORITY_BOUND = {
    "relation": 0.56,
    "pair_both": 0.56,
    "pair_more": 0.40,
    "direction": 0.31,
    "count": 0.27,
    "digit_frames": 0.27,
    "shape_of_color": 0.27,
    "order": 0.27,
    "color_of_shape": 0.24,
    "pair_color": 0.24,
    "bar_tallest": 0.24,
    "color_change": 0.24,
    "bar_height": 0.18,
}


@pytest.fixture(scope="module")
def evaluation() -> dict[str, list[Sample]]:
    return {
        split: [sample for family in FAMILIES for sample in family_samples(split, family, 400)]
        for split in ("train", "validation", "test")
    }


def test_samples_do_not_depend_on_process_and_order():
    suite = MiniSuite("train", seed=5)
    shuffled = {
        (group, index): suite.get(group, index) for group in ("video", "single", "pair") for index in (11, 7, 3)
    }
    digest = sha256()
    for group in ("single", "pair", "video"):
        for index in (7, 3, 11):
            digest.update(repr(shuffled[group, index]).encode())
    child = subprocess.run(
        [sys.executable, "-c", _DIGEST], capture_output=True, text=True, check=True, env=_environment()
    )
    assert child.stdout == digest.hexdigest()


def _environment() -> dict[str, str]:
    return {"PYTHONPATH": ":".join(path for path in sys.path if path), "PYTHONHASHSEED": "12345"}


def test_seed_and_split_and_index_change_the_sample():
    samples = [
        MiniSuite("train").get("single", 0),
        MiniSuite("train", seed=1).get("single", 0),
        MiniSuite("test").get("single", 0),
        MiniSuite("train").get("single", 1),
    ]
    assert len({sample.images for sample in samples}) == 4
    assert len({sample.id for sample in samples}) == 4


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_belong_to_their_split(split, evaluation):
    assert all(split_of(sample.scene) == split for sample in evaluation[split])


def test_splits_share_no_scene(evaluation):
    stream = [
        MiniSuite("train").get(group, index).scene for group in ("single", "pair", "video") for index in range(250)
    ]
    train = {sample.scene for sample in evaluation["train"]} | set(stream)
    validation, test = ({sample.scene for sample in evaluation[split]} for split in ("validation", "test"))
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_digit_images_are_disjoint_and_complete():
    rows = {split: {image.row for pool in digit_images(split) for image in pool} for split in SPLITS}
    assert sum(len(of_split) for of_split in rows.values()) == len(set.union(*rows.values())) == 1797
    assert all(len(pool) >= 15 for split in SPLITS for pool in digit_images(split))


def test_no_digit_picture_occurs_in_two_splits():
    pixels = {split: {image.mask.tobytes() for pool in digit_images(split) for image in pool} for split in SPLITS}
    assert not pixels["train"] & (pixels["validation"] | pixels["test"])


@pytest.mark.parametrize("split", ["train", "validation"])
def test_answers_are_balanced(split, evaluation):
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for sample in evaluation[split]:
        answers[sample.task][sample.answers[0]] += 1
    for task, counter in answers.items():
        share = counter.most_common(1)[0][1] / counter.total()
        # Plus three standard errors of the fraction, as the smallest task has only 50 samples here.
        bound = MAJORITY_BOUND.get(task, 0.10)
        assert share <= bound + 3 * (bound * (1 - bound) / counter.total()) ** 0.5, (task, counter.most_common(3))


def test_the_majority_baseline_is_weak(evaluation):
    """The most frequent training answer of each task has a low exact-match score on the validation split."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for sample in evaluation["train"]:
        counts[sample.task][sample.answers[0]] += 1
    hits: defaultdict[str, list[bool]] = defaultdict(list)
    for sample in evaluation["validation"]:
        most = counts[sample.task].most_common(1)
        hits[sample.task].append(bool(most) and most[0][0] in sample.answers)
    scores = {task: sum(values) / len(values) for task, values in hits.items()}
    assert set(scores) == {task for tasks in TASKS.values() for task in tasks}
    assert max(scores.values()) < 0.65
    assert sum(scores.values()) / len(scores) < 0.22


def test_family_samples_cycle_through_all_tasks_without_dense_supervision(evaluation):
    for family in FAMILIES:
        samples = [sample for sample in evaluation["test"] if sample.family == family]
        counts = Counter(sample.task for sample in samples)
        assert set(counts) == set(TASKS[family])
        assert max(counts.values()) - min(counts.values()) <= 1
        assert not any(sample.metadata["dense"] for sample in samples)
        assert {sample.metric for sample in samples} == {"box_iou" if family == "grounding" else "exact_match"}


def test_ids_are_unique(evaluation):
    ids = [sample.id for samples in evaluation.values() for sample in samples]
    ids += [MiniSuite("validation").get("single", index).id for index in range(100)]
    assert len(ids) == len(set(ids))


def test_the_first_samples_do_not_depend_on_the_count():
    assert family_samples("test", "general", 20)[:8] == family_samples("test", "general", 8)


@pytest.mark.parametrize(
    ("families", "expected"),
    [
        (FAMILIES, {"single": 0.7, "pair": 0.12, "video": 0.18}),
        (("video",), {"video": 1.0}),
        (("resolution", "grounding"), {"single": 1.0}),
        (("general", "grounding"), {"single": 0.7 / 0.82, "pair": 0.12 / 0.82}),
    ],
)
def test_groups_and_weights(families, expected):
    groups = MiniSuite("train", families=families).groups
    assert {group.name: group.weight for group in groups} == pytest.approx(expected)
    assert all(group.size is None for group in groups)
    assert {group.size for group in MiniSuite("test", families=families).groups} == {4000}


def test_groups_contain_the_expected_numbers_of_images_and_families():
    for split in SPLITS:
        suite = MiniSuite(split, families=("general", "video"))
        for group in suite.groups:
            samples = [suite.get(group.name, index) for index in range(30)]
            assert {len(sample.images) for sample in samples} == {group.num_images}
            assert {sample.family for sample in samples} == {"video" if group.name == "video" else "general"}


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_dense_fraction(fraction):
    suite = MiniSuite("train", dense_fraction=fraction)
    dense = [suite.get("single", index).metadata["dense"] for index in range(400)]
    assert sum(dense) / len(dense) == pytest.approx(fraction, abs=0.08 if fraction == 0.5 else 0)


def test_every_dense_task_occurs_in_training_only():
    suite = MiniSuite("train", dense_fraction=1.0)
    tasks = {suite.get(group.name, index).task for group in suite.groups for index in range(120)}
    assert tasks == {task for generators in DENSE_TASKS.values() for task in generators}
    assert MiniSuite("validation", dense_fraction=1.0) == MiniSuite("validation", dense_fraction=0.0)
    assert not any(MiniSuite("validation").get("single", index).metadata["dense"] for index in range(50))


@pytest.mark.parametrize("image_size", [64, 96, 224])
def test_image_size(image_size):
    sample = MiniSuite("train", image_size=image_size).get("pair", 2)
    for image in sample.images:
        decoded = Image.open(io.BytesIO(image))
        assert (decoded.format, decoded.mode, decoded.size) == ("PNG", "RGB", (image_size, image_size))
        assert np.asarray(decoded).std() > 2


def test_suite_is_picklable_and_small():
    suite = MiniSuite("train", families=("video",))
    suite.get("video", 0)
    state = pickle.dumps(suite)
    assert len(state) < 500
    assert pickle.loads(state).get("video", 1) == suite.get("video", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "'dev'.*train, validation, test"),
        ({"split": "train", "families": ("chess",)}, "chess.*general"),
        ({"split": "train", "families": ()}, "at least one of"),
        ({"split": "train", "dense_fraction": 1.5}, "1.5"),
        ({"split": "train", "image_size": 32}, "32.*64"),
    ],
)
def test_illegal_arguments_are_rejected(arguments, message):
    with pytest.raises(UserError, match=message):
        MiniSuite(**arguments)


def test_unknown_groups_and_illegal_indices_are_rejected():
    with pytest.raises(UserError, match=r"'pair'.*video"):
        MiniSuite("train", families=("video",)).get("pair", 0)
    with pytest.raises(UserError, match="'sound'"):
        family_samples("test", "sound", 1)
    with pytest.raises(IndexError):
        MiniSuite("test").get("single", 4000)
    with pytest.raises(IndexError):
        MiniSuite("train").get("single", -1)
