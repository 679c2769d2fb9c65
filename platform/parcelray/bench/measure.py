"""Reports of benches, alternate timing of two callables, and peak memory."""

import gc
import json
import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from rich.table import Table

_GOALS: dict[str, Callable[[float, float], bool]] = {
    "<=": lambda value, bound: value <= bound,
    ">=": lambda value, bound: value >= bound,
}


@dataclass(frozen=True, slots=True)
class Measure:
    """One measured number.

    Raises:
        ValueError: the goal does not have the form `<= 3` or `>= 0.5`.
    """

    name: str
    value: float
    unit: str
    spread: float | None = None
    """Interquartile range of the repeats, in the unit of the value; None: exact, or measured once."""
    goal: str | None = None
    """Goal in the unit of the value, such as `<= 3` or `>= 0.5`; None: no goal."""
    against: str | None = None
    """Baseline that the value is compared with."""

    def __post_init__(self) -> None:
        if self.goal is not None:
            _parse_goal(self.goal)

    @property
    def missed(self) -> bool:
        """Whether the value does not reach its goal. NaN never reaches a goal; without a goal this is False."""
        if self.goal is None:
            return False
        relation, bound = _parse_goal(self.goal)
        return not _GOALS[relation](self.value, bound)


@dataclass(frozen=True, slots=True)
class Report:
    """All measures of one bench, and the machine on which they were taken."""

    measures: tuple[Measure, ...]
    machine: dict[str, str | int] = field(default_factory=lambda: machine_info())
    """Output of `machine_info`, plus the settings of the bench (batch size, device, dtype)."""

    def to_dict(self) -> dict[str, Any]:
        """Returns `{"measures": [{"name", "value", "unit", "spread", "goal", "against"}], "machine": {...}}`."""
        return {"measures": [asdict(measure) for measure in self.measures], "machine": dict(self.machine)}

    def to_json(self) -> str:
        """Returns `to_dict` as one line of JSON. NaN becomes null, because JSON has no NaN."""
        content = self.to_dict()
        for measure in content["measures"]:
            measure["value"] = _finite(measure["value"])
            measure["spread"] = _finite(measure["spread"])
        return json.dumps(content, allow_nan=False)

    def to_rich(self) -> "Table":
        """Returns the table for the console, with `met` or `MISSED` after each goal."""
        from rich.table import Table

        table = Table(
            "measure",
            "value",
            "unit",
            "spread",
            "goal",
            "against",
            caption=", ".join(f"{key} {value}" for key, value in self.machine.items()),
        )
        for measure in self.measures:
            goal = "" if measure.goal is None else f"{measure.goal} {'MISSED' if measure.missed else 'met'}"
            spread = "" if measure.spread is None else f"{measure.spread:.3g}"
            table.add_row(measure.name, f"{measure.value:.4g}", measure.unit, spread, goal, measure.against or "")
        return table


def machine_info() -> dict[str, str | int]:
    """Describes the machine: processor, cores for this process, system, Python, torch and its threads, GPU."""
    info: dict[str, str | int] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
        info["gpus"] = torch.cuda.device_count()
    return info


class PairTiming(NamedTuple):
    """Times in seconds of two callables that ran alternately. The spreads are interquartile ranges."""

    median_a: float
    median_b: float
    ratio: float
    """Median over the rounds of time of `a` / time of `b`."""
    spread_a: float
    spread_b: float
    spread_ratio: float


def time_pairs(
    a: Callable[[], object],
    b: Callable[[], object],
    repeats: int,
    warmup: int = 1,
    synchronize: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> PairTiming:
    """Times two callables alternately (a b a b ...), so that changes of the machine's speed affect both equally.

    Args:
        a: the first callable.
        b: the second callable, the baseline.
        repeats: number of timed rounds.
        warmup: number of rounds before them that are not timed.
        synchronize: waits for the device, such as `torch.cuda.synchronize`; None if calls are synchronous.
        clock: returns the current time in seconds.

    Raises:
        ValueError: `repeats` is below 1 or `warmup` is below 0.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats {repeats} must be at least 1 and warmup {warmup} at least 0")
    for _ in range(warmup):
        _seconds(a, synchronize, clock)
        _seconds(b, synchronize, clock)
    rounds = [(_seconds(a, synchronize, clock), _seconds(b, synchronize, clock)) for _ in range(repeats)]
    times_a, times_b = [pair[0] for pair in rounds], [pair[1] for pair in rounds]
    ratios = [time_a / time_b for time_a, time_b in rounds]
    return PairTiming(
        statistics.median(times_a),
        statistics.median(times_b),
        statistics.median(ratios),
        interquartile_range(times_a),
        interquartile_range(times_b),
        interquartile_range(ratios),
    )


def interquartile_range(values: list[float]) -> float:
    """Returns the distance between the first and third quartile (linear interpolation); 0 for a single value."""
    if len(values) < 2:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first


def _seconds(call: Callable[[], object], synchronize: Callable[[], None] | None, clock: Callable[[], float]) -> float:
    if synchronize is not None:
        synchronize()
    start = clock()
    call()
    if synchronize is not None:
        synchronize()
    return clock() - start


def _parse_goal(goal: str) -> tuple[str, float]:
    relation, _, bound = goal.partition(" ")
    if relation not in _GOALS:
        raise ValueError(f"goal {goal!r} must be '<= NUMBER' or '>= NUMBER'")
    return relation, float(bound)


def _finite(value: float | None) -> float | None:
    return value if value is not None and abs(value) < float("inf") else None


def _cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Returns the peak memory of `call` in bytes, beyond what was allocated before.

    On CUDA this is the count of the caching allocator, including workspaces. On the CPU it is the sum over the live
    results of tensor operations; scratch memory inside one operation, such as a fused attention kernel, is not counted.

    Args:
        call: runs on `device`; its result counts as allocated.
        device: device of its tensors.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        before: int = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        peak: int = torch.cuda.max_memory_allocated(device)
        return peak - before
    live = _LiveTensors()
    with live:
        call()
    return live.peak_bytes


class _LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks the storages that tensor operations create until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._live_bytes = 0
        self._tracked: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._track(leaf, is_new=False)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._track(leaf, is_new=True)
        return result

    def _track(self, tensor: Tensor, *, is_new: bool) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._tracked:
            return
        # A view shares the storage of its base, and inputs existed before. Both appear as arguments first and add 0.
        self._tracked.add(key)
        num_bytes = storage.nbytes() if is_new else 0
        self._live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        weakref.finalize(storage, self._untrack, key, num_bytes)

    def _untrack(self, key: int, num_bytes: int) -> None:
        self._tracked.discard(key)
        self._live_bytes -= num_bytes
