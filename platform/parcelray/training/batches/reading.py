"""Training batches, one rank's share of one step at a time."""

from collections.abc import Iterator

from parcelray.datasets.collator import Batch, Collator
from parcelray.datasets.source import SampleSource
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.training.batches.schedule import BatchSchedule


class StepReader:
    """Reads one rank's share of a step; callable in a Ray task and in-process.

    Args:
        source: the samples.
        schedule: which samples each step reads.
        processor: tokenizer and image size.
        rank: this rank.
        world_size: number of ranks.
        label_patches: whether batches carry labels of the patches, see `Collator`.
    """

    def __init__(
        self,
        source: SampleSource,
        schedule: BatchSchedule,
        processor: ElasticProcessor,
        rank: int,
        world_size: int,
        *,
        label_patches: bool = False,
    ) -> None:
        self._source = source
        self._schedule = schedule
        self._collator = Collator(processor, label_patches=label_patches)
        self._rank = rank
        self._world_size = world_size

    @property
    def num_images(self) -> int:
        """Images in this rank's share of a step, at most."""
        return -(-self._schedule.images_per_step // self._world_size)

    def read(self, step: int) -> Batch:
        """The collated batch of a step."""
        plan = self._schedule.plan(step)
        return self._collator(
            [self._source.get(plan.group, index) for index in plan.share(self._rank, self._world_size)]
        )


def in_process_batches(reader: StepReader, first_step: int, num_steps: int) -> Iterator[Batch]:
    """The batches of the steps from `first_step` on, made in this process when they are asked for."""
    for step in range(first_step, num_steps):
        yield reader.read(step)
