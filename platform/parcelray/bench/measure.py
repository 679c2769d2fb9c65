"""The shape that every bench reports in, and how two things are timed fairly against each other."""

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
        ValueError: a goal that is not written as `<= 3` or `>= 0.5`.
    """

    name: str
    value: float
    unit: str
    spread: float | None = None
    """Interquartile range of the repeats, in the same unit; None: exact, or measured once."""
    goal: str | None = None
    """`<= 3` or `>= 0.5`, in the same unit; None: nothing was promised."""
    against: str | None = None
    """What the number is compared with."""

    def __post_init__(self) -> None:
        if self.goal is not None:
            _parse_goal(self.goal)

    @property
    def missed(self) -> bool:
        """Whether there is a goal and the value does not reach it (NaN never does)."""
        if self.goal is None:
            return False
        relation, bound = _parse_goal(self.goal)
        return not _GOALS[relation](self.value, bound)


@dataclass(frozen=True, slots=True)
class Report:
    """All measures of one bench, and the machine that they hold for."""

    measures: tuple[Measure, ...]
    machine: dict[str, str | int] = field(default_factory=lambda: machine_info())
    """As from `machine_info`, plus what else fixes the setting (batch size, device, dtype)."""

    def to_dict(self) -> dict[str, Any]:
        """`{"measures": [{"name", "value", "unit", "spread", "goal", "against"}], "machine": {...}}`."""
        return {"measures": [asdict(measure) for measure in self.measures], "machine": dict(self.machine)}

    def to_json(self) -> str:
        """`to_dict` as one line of JSON; a NaN is written as null, which JSON has and NaN is not."""
        content = self.to_dict()
        for measure in content["measures"]:
            measure["value"] = _finite(measure["value"])
            measure["spread"] = _finite(measure["spread"])
        return json.dumps(content, allow_nan=False)

    def to_rich(self) -> "Table":
        """The table that the command line prints; a missed goal says so."""
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
    """What a time depends on: processor, cores that this process may use, Python, torch and its threads, GPU."""
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
    """Times of two callables that ran in turn, in seconds; the spreads are interquartile ranges."""

    median_a: float
    median_b: float
    ratio: float
    """Median over the rounds of (time of a) / (time of b)."""
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
    """Times two callables alternately (a b a b ...), so that a drift of the machine (clock, other load) falls on both alike.

    Args:
        a: the first callable.
        b: the second, what `a` is compared with.
        repeats: timed rounds.
        warmup: rounds before them that are not timed.
        synchronize: waits for the device, such as `torch.cuda.synchronize`; None where calls return when they are done.
        clock: current time in seconds.

    Raises:
        ValueError: `repeats` below 1 or `warmup` below 0.
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
    """Distance between the first and third quartile (linear interpolation); 0 for a single value."""
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
    """Largest number of bytes that `call` holds at one time beyond what was there before.

    On CUDA it is the caching allocator's own count, workspaces included. On the CPU it is the sum over the live results
    of tensor operations; the scratch memory inside one operation (a fused attention kernel's) is not seen.

    Args:
        call: runs on `device`; what it returns counts as held.
        device: where its tensors are.
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
    """Follows the storages that operations create until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._live_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._meet(leaf, is_new=False)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._meet(leaf, is_new=True)
        return result

    def _meet(self, tensor: Tensor, *, is_new: bool) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        # A view shares its base's storage, and an input was there before: both are met as arguments first.
        self._known.add(key)
        num_bytes = storage.nbytes() if is_new else 0
        self._live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        weakref.finalize(storage, self._forget, key, num_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self._live_bytes -= num_bytes
