"""The samples of a step: a pure function of seed and step that reads every sample once per epoch."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from parcelray.datasets.sample import Sample
from parcelray.datasets.source import SampleGroup
from parcelray.errors import UserError
from parcelray.training.batches.schedule import BatchSchedule


@dataclass(frozen=True)
class Source:
    """A source without samples, since a schedule uses only the sizes of the groups."""

    groups: tuple[SampleGroup, ...]

    def get(self, group: str, index: int) -> Sample:
        """Fail: a schedule reads no sample."""
        raise NotImplementedError


FINITE = Source((SampleGroup("single", 1, 0.5, 24), SampleGroup("pair", 2, 0.3, 10), SampleGroup("video", 4, 0.2, 7)))
ENDLESS = Source((SampleGroup("single", 1, 0.75, None), SampleGroup("video", 4, 0.25, None)))


def _schedule(
    source: Source = FINITE, *, num_steps: int = 200, images_per_step: int = 8, seed: int = 0
) -> BatchSchedule:
    return BatchSchedule(source, num_steps=num_steps, images_per_step=images_per_step, seed=seed)


def test_a_step_reads_one_group_and_as_many_images_as_fit() -> None:
    schedule = _schedule(images_per_step=9)
    sizes = {
        plan.group: (plan.num_images, len(plan.indices))
        for plan in (schedule.plan(step) for step in range(len(schedule)))
    }
    assert sizes == {"single": (1, 9), "pair": (2, 4), "video": (4, 2)}


@pytest.mark.parametrize("group", FINITE.groups, ids=lambda group: group.name)
def test_an_epoch_of_a_finite_group_reads_each_sample_once(group: SampleGroup) -> None:
    schedule = _schedule()
    read = [
        index
        for step in range(len(schedule))
        for index in schedule.plan(step).indices
        if schedule.plan(step).group == group.name
    ]
    assert group.size is not None
    epochs = [read[start : start + group.size] for start in range(0, len(read) - group.size + 1, group.size)]
    assert len(epochs) > 3
    assert all(sorted(epoch) == list(range(group.size)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_an_endless_group_is_read_in_order() -> None:
    schedule = _schedule(ENDLESS)
    for name in ("single", "video"):
        plans = [schedule.plan(step) for step in range(len(schedule))]
        read = [index for plan in plans if plan.group == name for index in plan.indices]
        assert read == list(range(len(read)))


def test_groups_are_drawn_by_their_weights() -> None:
    counts = Counter(_schedule(ENDLESS, num_steps=4000).plan(step).group for step in range(4000))
    # Four standard deviations of a binomial with p = 1/4 are 110 of 4000.
    assert counts["video"] == pytest.approx(1000, abs=110)


def test_a_plan_depends_only_on_seed_and_step() -> None:
    forward = [_schedule().plan(step) for step in range(60)]
    once = _schedule()
    assert [once.plan(step) for step in reversed(range(60))] == forward[::-1]
    assert [_schedule(seed=1).plan(step) for step in range(60)] != forward


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_the_shares_of_the_ranks_cover_the_step(world_size: int) -> None:
    plan = _schedule(ENDLESS).plan(0)
    shares = [plan.share(rank, world_size) for rank in range(world_size)]
    assert sorted(index for share in shares for index in share) == sorted(plan.indices)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def _long_tailed(size: int) -> Source:
    """A group whose texts are as uneven as answers in conversations are."""
    lengths = np.random.default_rng(0).lognormal(5.0, 1.0, size).astype(np.int32)
    return Source((SampleGroup("images-1", 1, 1.0, size, lengths),))


def _lengths(schedule: BatchSchedule, source: Source) -> list[np.ndarray]:
    lengths = source.groups[0].num_characters
    assert lengths is not None
    return [lengths[list(schedule.plan(step).indices)] for step in range(len(schedule))]


# The sizes are no multiples of a step, so the epochs begin in the middle of one; 40 samples are less than are sorted.
@pytest.mark.parametrize("size", [40, 1001])
def test_grouping_by_tokens_reads_each_sample_once_per_epoch(size: int) -> None:
    source, steps = _long_tailed(size), 3 * size // 8
    schedule = BatchSchedule(source, num_steps=steps, images_per_step=8, seed=0, by_tokens=True)
    read = [index for step in range(steps) for index in schedule.plan(step).indices]
    epochs = [read[start : start + size] for start in range(0, len(read) - size + 1, size)]
    assert len(epochs) >= 2
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    again = BatchSchedule(source, num_steps=steps, images_per_step=8, seed=0, by_tokens=True)
    assert [again.plan(step) for step in reversed(range(steps))] == [schedule.plan(step) for step in range(steps)][::-1]


def test_grouping_by_tokens_saves_padding_and_balances_the_ranks() -> None:
    source = _long_tailed(4096)
    grouped, mixed = (
        BatchSchedule(source, num_steps=128, images_per_step=32, seed=0, by_tokens=by_tokens)
        for by_tokens in (True, False)
    )

    def padding(schedule: BatchSchedule) -> float:
        padded = sum(each.max() * len(each) for each in _lengths(schedule, source))
        return float(1 - sum(each.sum() for each in _lengths(schedule, source)) / padded)

    assert padding(mixed) > 0.6
    assert padding(grouped) < 0.15
    # Steps of equal length do not follow each other: a run would see short texts first.
    first = [each.mean() for each in _lengths(grouped, source)]
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.3

    def imbalance(schedule: BatchSchedule) -> float:
        shares = [[each[rank::4].sum() for rank in range(4)] for each in _lengths(schedule, source)]
        return float(np.mean([max(share) / np.mean(share) - 1 for share in shares]))

    assert imbalance(mixed) > 0.25
    assert imbalance(grouped) < 0.05


def test_a_step_smaller_than_a_sample_is_refused() -> None:
    with pytest.raises(UserError, match=r"training.images_per_step is 3, but a sample of video has 4 images; raise it"):
        _schedule(images_per_step=3)
