"""A `SampleSource` that draws from several sources in given shares."""

from dataclasses import dataclass

from parcelray.config.data import MixtureDataConfig
from parcelray.datasets.sample import Sample
from parcelray.datasets.source import SampleGroup, SampleSource


@dataclass(frozen=True)
class MixtureSource:
    """Draws from several sources; its groups are theirs, named `<number of the source>/<group>`."""

    config: MixtureDataConfig
    sources: tuple[SampleSource, ...]

    @property
    def groups(self) -> tuple[SampleGroup, ...]:
        """The groups of all sources, with the shares of the configuration."""
        groups = [list(source.groups) for source in self.sources]
        shares = [
            self._share(number, sum((group.size or 0) * max(1, group.num_images) for group in members))
            for number, members in enumerate(groups)
        ]
        return tuple(
            group._replace(
                name=f"{number}/{group.name}",
                weight=shares[number] / sum(shares) * group.weight / sum(each.weight for each in members),
            )
            for number, members in enumerate(groups)
            for group in members
        )

    @property
    def max_skipped(self) -> int:
        """Largest number of rows that may be skipped, over all sources."""
        return sum(getattr(source, "max_skipped", 0) for source in self.sources)

    def get(self, group: str, index: int) -> Sample:
        """Reads sample `index` of a group."""
        number, _, name = group.partition("/")
        return self.sources[int(number)].get(name, index)

    def _share(self, number: int, num_images: int) -> float:
        member = self.config.sources[number]
        if member.weight is not None:
            return member.weight
        if member.epochs is not None:
            return member.epochs * num_images
        return float(num_images ** (1 / self.config.temperature))
