"""Planners: propose the points of a search as a function of its seed and the finished trials.

A resumed search replays the proposals and skips the points whose trials are finished. The interface is Optuna's
"ask and tell": `ask` returns the next point, `tell` passes a finished trial back.
"""

import json
import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from parcelray.config.objectives import Objective
from parcelray.config.search_space import Assignment, ChoiceDomain, Domain, IntegerDomain, SearchSpace
from parcelray.config.tune import OptunaAlgorithm, PbtAlgorithm, RandomAlgorithm, SearchAlgorithm
from parcelray.tuning.trial_record import FinishedTrial, TrialRecord, point_key

optuna.logging.set_verbosity(optuna.logging.ERROR)

_MAX_PROPOSALS = 100
"""Number of illegal or repeated proposals after which a random point is used instead."""
_MAX_LISTED = 100_000
"""Size of the largest space whose points are listed and shuffled; the points of a larger one are drawn at random."""


class Planner(ABC):
    """Proposes points and receives finished trials.

    Args:
        record: the finished trials of earlier sessions; their points are skipped.
    """

    def __init__(self, record: TrialRecord) -> None:
        self._record = record
        self._pending: set[str] = set()

    @property
    @abstractmethod
    def num_points(self) -> int:
        """Number of points of the whole search, including those with finished trials."""

    def ask(self) -> Assignment | None:
        """Returns the next point; None if none is available now (see `is_finished`)."""
        point = self._next()
        if point is not None:
            self._pending.add(point_key(point))
        return point

    @property
    @abstractmethod
    def is_finished(self) -> bool:
        """Whether all points have been proposed."""

    @property
    def is_done(self) -> bool:
        """Whether all points have been proposed and all their trials are finished."""
        return self.is_finished and not self._pending

    def tell(self, trial: FinishedTrial) -> None:
        """Receives a trial that has been added to the record."""
        self._pending.discard(trial.key)

    @abstractmethod
    def _next(self) -> Assignment | None: ...


class ListPlanner(Planner):
    """A list of points that is fixed before the search: a grid, random points, or a population.

    Args:
        points: all points of the search.
        record: see `Planner`.
        together: whether all points are run again unless all their trials are finished. Members of a population are
            compared with each other, so a smaller population would be a different search.
    """

    def __init__(self, points: Sequence[Assignment], record: TrialRecord, *, together: bool = False) -> None:
        super().__init__(record)
        self._num_points = len(points)
        self._waiting = [point for point in points if record.get(point_key(point)) is None]
        if together and self._waiting:
            self._waiting = list(points)
        self._waiting.reverse()

    @property
    def num_points(self) -> int:
        """See `Planner`."""
        return self._num_points

    def _next(self) -> Assignment | None:
        return self._waiting.pop() if self._waiting else None

    @property
    def is_finished(self) -> bool:
        """See `Planner`."""
        return not self._waiting


class OptunaPlanner(Planner):
    """Batches of points proposed by Optuna's TPE, each from the results of the earlier batches.

    The sampler gets a new seed for every proposal, so a proposal depends only on the seed of the search and the
    results. A resumed search therefore makes the same proposals and takes their results from the record.
    """

    def __init__(
        self,
        space: SearchSpace,
        algorithm: OptunaAlgorithm,
        objectives: Sequence[Objective],
        seed: int,
        record: TrialRecord,
    ) -> None:
        super().__init__(record)
        self._space = space
        self._algorithm = algorithm
        self._objectives = objectives
        self._seed = seed
        size = space.size
        self._num_points = algorithm.trials if size is None else min(size, algorithm.trials)
        self._study = optuna.create_study(
            directions=["maximize" if objective.mode == "max" else "minimize" for objective in objectives]
        )
        self._proposed: dict[str, optuna.Trial] = {}
        self._order: list[str] = []
        self._num_told = 0
        self._batch: list[Assignment] = []
        self._results: dict[str, FinishedTrial] = {}
        self._num_proposals = 0

    @property
    def num_points(self) -> int:
        """See `Planner`."""
        return self._num_points

    @property
    def is_finished(self) -> bool:
        """See `Planner`."""
        self._advance()
        return not self._batch and len(self._order) >= self._num_points

    def _next(self) -> Assignment | None:
        self._advance()
        return self._batch.pop(0) if self._batch else None

    def tell(self, trial: FinishedTrial) -> None:
        """See `Planner`."""
        super().tell(trial)
        self._results[trial.key] = trial

    def _advance(self) -> None:
        """Proposes the next batch once the previous one is finished; repeats this while the record has all results."""
        while (
            not self._batch and len(self._order) < self._num_points and all(key in self._results for key in self._order)
        ):
            # Results are passed on in the order of the proposals, not in the order in which the trials finished.
            for key in self._order[self._num_told :]:
                self._tell_study(key)
            self._num_told = len(self._order)
            for _ in range(min(self._algorithm.batch, self._num_points - len(self._order))):
                point = self._propose()
                key = point_key(point)
                self._order.append(key)
                recorded = self._record.get(key)
                if recorded is not None:
                    self._results[key] = recorded
                else:
                    self._batch.append(point)

    def _tell_study(self, key: str) -> None:
        trial = self._results[key]
        values = [trial.metrics.get(objective.metric) for objective in self._objectives]
        if trial.error is not None or any(value is None for value in values):
            self._study.tell(self._proposed[key], state=TrialState.FAIL)
        else:
            self._study.tell(self._proposed[key], [float(value) for value in values if value is not None])

    def _propose(self) -> Assignment:
        """Returns a legal point that was not proposed before."""
        for _ in range(_MAX_PROPOSALS):
            self._study.sampler = _sampler(self._next_seed(), self._algorithm.startup_trials)
            trial = self._study.ask()
            point = self._suggested(trial)
            if self._space.allows(point) and point_key(point) not in self._proposed:
                self._proposed[point_key(point)] = trial
                return point
            self._study.tell(trial, state=TrialState.FAIL)
        # The sampler repeats itself, so a random point is used. One is left, since num_points is at most the size of
        # the space.
        points = _without_repeats(self._space, random.Random(self._next_seed()))
        point = next(point for point in points if point_key(point) not in self._proposed)
        self._study.enqueue_trial(optuna_params(self._space, point))
        trial = self._study.ask()
        self._suggested(trial)
        self._proposed[point_key(point)] = trial
        return point

    def _next_seed(self) -> int:
        self._num_proposals += 1
        return (self._seed * 1_000_003 + self._num_proposals) % 2**32

    def _suggested(self, trial: optuna.Trial) -> Assignment:
        """Returns a point whose parameters are suggested in order, leaving out inactive ones."""
        chosen: Assignment = {}
        for name, domain in self._space.parameters.items():
            if all(other in chosen and chosen[other] in legal for other, legal in domain.when.items()):
                chosen[name] = _from_optuna(domain, _suggest(trial, name, distribution_of(domain)))
        return chosen


def make_planner(
    space: SearchSpace, algorithm: SearchAlgorithm, objectives: Sequence[Objective], seed: int, record: TrialRecord
) -> Planner:
    """Returns the planner of a search algorithm; a population starts from random points."""
    if isinstance(algorithm, OptunaAlgorithm):
        return OptunaPlanner(space, algorithm, objectives, seed, record)
    if isinstance(algorithm, RandomAlgorithm | PbtAlgorithm):
        size, wanted = space.size, algorithm.trials if isinstance(algorithm, RandomAlgorithm) else algorithm.population
        count = wanted if size is None else min(size, wanted)
        points = _without_repeats(space, random.Random(seed))
        return ListPlanner([next(points) for _ in range(count)], record, together=isinstance(algorithm, PbtAlgorithm))
    return ListPlanner(list(space.grid()), record)


def distribution_of(domain: Domain) -> BaseDistribution:
    """Returns Optuna's distribution of a domain.

    Choices become indices; for choices that are ascending numbers, the sampler can use their order.
    """
    if isinstance(domain, ChoiceDomain):
        return (
            IntDistribution(0, len(domain.values) - 1)
            if _ascends(domain.values)
            else CategoricalDistribution(tuple(range(len(domain.values))))
        )
    if isinstance(domain, IntegerDomain):
        # Optuna supports no step on a logarithmic scale; its proposal is rounded down to a step.
        return IntDistribution(domain.low, domain.high, log=domain.log, step=1 if domain.log else domain.step)
    return FloatDistribution(domain.low, domain.high, log=domain.log)


def _sampler(seed: int, startup_trials: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        # The option `group`, which models parameters that are active together jointly, is marked as experimental.
        # Without it, TPE models each parameter independently.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=startup_trials, multivariate=True, group=True, constant_liar=True
        )


def _suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(
            name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
        )
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)


def optuna_params(space: SearchSpace, assignment: Assignment) -> dict[str, Any]:
    """Converts a point to Optuna's values."""
    return {name: _to_optuna(space.parameters[name], value) for name, value in assignment.items()}


def _from_optuna(domain: Domain, value: Any) -> Any:
    if isinstance(domain, ChoiceDomain):
        return domain.values[value]
    if isinstance(domain, IntegerDomain):
        return domain.low + (int(value) - domain.low) // domain.step * domain.step
    return float(value)


def _to_optuna(domain: Domain, value: Any) -> Any:
    return domain.values.index(value) if isinstance(domain, ChoiceDomain) else value


def _ascends(values: Sequence[Any]) -> bool:
    numbers = [value[0] if isinstance(value, list | tuple) and len(value) == 1 else value for value in values]
    return all(
        isinstance(number, int | float) and not isinstance(number, bool) for number in numbers
    ) and numbers == sorted(numbers)


def _without_repeats(space: SearchSpace, rng: random.Random) -> Iterator[Assignment]:
    """Yields different random points; for a small space, finally all of them."""
    if space.size is not None and space.size <= _MAX_LISTED:
        points = list(space.grid())
        rng.shuffle(points)
        yield from points
        return
    seen: set[str] = set()
    while True:
        point = space.sample(rng)
        key = json.dumps(point, sort_keys=True)
        if key not in seen:
            seen.add(key)
            yield point


def importance(
    space: SearchSpace, trials: Sequence[FinishedTrial], objective: Objective, seed: int = 0
) -> Mapping[str, float]:
    """Returns the share of an objective's variance that each parameter explains (fANOVA, Hutter et al., ICML 2014).

    Only parameters that are active in every trial are included. The result is empty if there are fewer than four
    trials, or if all of them are equally good.
    """
    measured = [trial for trial in trials if trial.error is None and objective.metric in trial.metrics]
    if len(measured) < 4 or len({trial.metrics[objective.metric] for trial in measured}) < 2:
        return {}
    study = optuna.create_study(direction="maximize" if objective.mode == "max" else "minimize")
    for trial in measured:
        distributions = {name: distribution_of(space.parameters[name]) for name in trial.assignment}
        study.add_trial(
            optuna.trial.create_trial(
                params=optuna_params(space, trial.assignment),
                distributions=distributions,
                value=trial.metrics[objective.metric],
            )
        )
    shares = optuna.importance.get_param_importances(
        study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=seed)
    )
    return {name: float(value) for name, value in shares.items()}
