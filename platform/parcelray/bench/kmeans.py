"""`parcelray bench kmeans`: compares our clustering of visual tokens with scikit-learn and three other libraries.

The tokens have the structure of photographs: 14 x 14 patches of crops from scikit-learn's two sample pictures. A random
two-layer network maps them to the width of CLIP's features (1024) or of LLaVA-1.5's projected tokens (4096). No trained
weights are needed.

Speed is compared at equal inertia. Every other library may use 1, 2 or 4 starts until its inertia is within 0.5 % of
scikit-learn's single start. If 4 starts do not suffice, the library is timed with the last number of starts. It would
need more time for equal inertia, so the ratio is then a lower bound.
"""

import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from parcelray.bench.measure import Measure, Report, interquartile_range, machine_info
from parcelray.bench.workload import photographs
from parcelray.errors import UserError
from parcelray.models.token_reduction.kmeans import kmeans

SIDE, PATCH = 24, 14
_HIDDEN = 1024
_IMAGES_FOR_OTHERS = 2
"""Number of images on which other libraries are timed; their time is proportional to the number of images."""
_IMAGES_FOR_INERTIA = 4
_SEEDS = 10
_SEEDS_FOR_OTHERS = 3
_ITERATIONS = 100
_STARTS = (1, 2, 4)
_PATIENCE_SECONDS = 10.0
"""A library gets no more starts after an attempt that took longer than this."""
_SETTLE_SECONDS = 0.3
_EQUAL = 1.005
"""Largest ratio to scikit-learn's inertia that counts as equal."""
_TORCH_KMEANS_NUMBERS = 2**26
"""Largest size for torch-kmeans, which computes all N x k x D differences at once.

Beyond this size it takes most of a minute per image, and is left out.
"""

Clusterer = Callable[[Tensor, int, int, int], list[Any]]
"""Clusters images [B, N, D] into k clusters each and returns the labels of each image.

Arguments: images, k, seed, number of starts (the best one counts).
"""
_REFERENCE = "scikit-learn"


class _Setting(NamedTuple):
    width: int
    num_clusters: int

    def __str__(self) -> str:
        return f"{SIDE * SIDE} x {self.width}, k {self.num_clusters}"


class _Other(NamedTuple):
    """Another library with a number of starts."""

    name: str
    starts: int
    inertia: float
    """Mean inertia as a ratio to scikit-learn's single start."""

    def __str__(self) -> str:
        return f"{self.name}, {self.starts} {'start' if self.starts == 1 else 'starts'}"


def bench_kmeans(
    *,
    widths: list[int],
    clusters: list[int],
    batch_sizes: list[int],
    repeats: int,
    device: str = "cpu",
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Measures time and inertia for every token width, number of clusters and batch size.

    Args:
        widths: widths of the tokens.
        clusters: numbers of clusters k.
        batch_sizes: numbers of images per batch.
        repeats: number of timed rounds; each round runs every library once.
        device: `cpu` or `cuda`, for our clustering and for the libraries that support it.
        say: called with each setting when it starts; the whole bench takes six minutes.

    Raises:
        UserError: the device is unknown or missing.
    """
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(
            f"--device {device} is not available; choose"
            f" cpu{', or a machine with a CUDA device' if device == 'cuda' else ' or cuda'}."
        )
    known = _clusterers()
    skipped: dict[str, str | int] = {
        name: "not installed" for name, (module, _) in known.items() if importlib.util.find_spec(module) is None
    }
    measures: list[Measure] = []
    for width in widths:
        tokens = photograph_tokens(max(*batch_sizes, _IMAGES_FOR_OTHERS, _IMAGES_FOR_INERTIA), width).to(device)
        for num_clusters in clusters:
            setting = _Setting(width, num_clusters)
            say(str(setting))
            calls = {name: call for name, (_, call) in known.items() if name not in skipped}
            if (
                num_clusters * SIDE * SIDE * width > _TORCH_KMEANS_NUMBERS
                and calls.pop("torch-kmeans", None) is not None
            ):
                skipped[f"torch-kmeans at {setting}"] = (
                    f"left out: more than {_TORCH_KMEANS_NUMBERS} differences at once"
                )
            measures.append(_quality(tokens, setting))
            others = list(_attempts(calls, tokens, setting))
            measures += _speed(calls, others, tokens, setting, batch_sizes, repeats)
    return Report(tuple(measures), machine_info() | {"device": device} | skipped)


def photograph_tokens(count: int, width: int, seed: int = 0) -> Tensor:
    """Returns tokens of crops of photographs: [count, 576, width]."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(3 * PATCH * PATCH, _HIDDEN, generator=generator) / (3 * PATCH * PATCH) ** 0.5
    second = torch.randn(_HIDDEN, width, generator=generator) / _HIDDEN**0.5
    positions = 0.3 * torch.randn(SIDE * SIDE, _HIDDEN, generator=generator)
    crops = photographs(count, SIDE * PATCH, seed).permute(0, 2, 3, 1)
    patches = (
        crops.reshape(count, SIDE, PATCH, SIDE, PATCH, 3).permute(0, 1, 3, 2, 4, 5).reshape(count, SIDE * SIDE, -1)
    )
    tokens: Tensor = F.gelu(patches @ first + positions) @ second
    return tokens


def _quality(tokens: Tensor, setting: _Setting) -> Measure:
    """Measures the mean inertia over seeds as a ratio to scikit-learn's."""
    images = tokens[:_IMAGES_FOR_INERTIA]
    ours = fmean(
        float(kmeans(images, setting.num_clusters, seed=seed, max_iterations=_ITERATIONS).inertia_B.mean())
        for seed in range(_SEEDS)
    )
    theirs = fmean(
        _mean_inertia(images, _scikit_learn(images, setting.num_clusters, seed, 1)) for seed in range(_SEEDS)
    )
    against = f"scikit-learn, n_init 1, mean of {len(images)} images and {_SEEDS} seeds"
    return Measure(f"inertia, {setting}", ours / theirs, "ratio", goal=f"<= {_EQUAL}", against=against)


def _attempts(calls: dict[str, Clusterer], tokens: Tensor, setting: _Setting) -> Iterator[_Other]:
    """Yields each library with a single start, and with the starts it needs for equal inertia (or the most tried)."""
    images = tokens[:_IMAGES_FOR_OTHERS]
    base = 1.0
    for name, call in calls.items():
        attempts: list[_Other] = []
        for starts in _STARTS:
            started = time.perf_counter()
            inertia = fmean(
                _mean_inertia(images, call(images, setting.num_clusters, seed, starts))
                for seed in range(_SEEDS_FOR_OTHERS)
            )
            # The reference is the first library.
            base = inertia if name == _REFERENCE else base
            attempts.append(_Other(name, starts, inertia / base))
            if attempts[-1].inertia <= _EQUAL or time.perf_counter() - started > _PATIENCE_SECONDS:
                break
        yield attempts[0]
        if len(attempts) > 1:
            yield attempts[-1]


def _speed(
    calls: dict[str, Clusterer],
    others: list[_Other],
    tokens: Tensor,
    setting: _Setting,
    batch_sizes: list[int],
    repeats: int,
) -> Iterator[Measure]:
    images = tokens[:_IMAGES_FOR_OTHERS]
    turns: dict[int | _Other, Callable[[int], object]] = {
        size: partial(_ours, tokens[:size], setting.num_clusters) for size in batch_sizes
    }
    turns |= {
        other: partial(_theirs, calls[other.name], images, setting.num_clusters, other.starts) for other in others
    }
    for turn in turns.values():
        turn(0)
    rounds = [{key: _seconds(partial(turn, seed)) for key, turn in turns.items()} for seed in range(repeats)]
    for other in others:
        times = [1000 * each[other] / len(images) for each in rounds]
        yield Measure(f"{other}, {setting}: an image", median(times), "ms", interquartile_range(times))
        yield Measure(f"{other}, {setting}: inertia", other.inertia, "ratio", against="scikit-learn, n_init 1")
    for size in batch_sizes:
        label = f"{setting}, batch {size}"
        times = [1000 * each[size] for each in rounds]
        yield Measure(f"ours, {label}", median(times), "ms", interquartile_range(times))

        def faster(other: _Other, goal: str, against: str, size: int = size, label: str = label) -> Measure:
            ratios = [each[other] / len(images) * size / each[size] for each in rounds]
            return Measure(
                f"times faster, {label}",
                median(ratios),
                "ratio",
                interquartile_range(ratios),
                goal=goal,
                against=against,
            )

        yield faster(next(each for each in others if each.name == _REFERENCE), ">= 10", _REFERENCE)
        baselines = sorted(
            (each for each in others if each.name != _REFERENCE),
            key=lambda other: median(each[other] for each in rounds),
        )
        equal = [each for each in baselines if each.inertia <= _EQUAL]
        if equal:
            yield faster(equal[0], ">= 5", f"{equal[0]}, the fastest other of equal inertia")
        elif baselines:
            # Only the largest number of starts gives a bound on the time for equal inertia.
            last = [
                each
                for each in baselines
                if each.starts == max(other.starts for other in baselines if other.name == each.name)
            ]
            yield faster(
                last[0],
                ">= 5",
                f"{last[0]}: no other library reaches equal inertia; this is the fastest with its most starts"
                f" ({last[0].inertia:.3f}), so the ratio is a lower bound",
            )
        if baselines:
            against = f"{baselines[0]}, the fastest other at any inertia ({baselines[0].inertia:.3f})"
            yield faster(baselines[0], ">= 5", against)


def _ours(tokens: Tensor, num_clusters: int, seed: int) -> None:
    # Copying the sizes to the CPU waits for all work on the device.
    kmeans(tokens, num_clusters, seed=seed, max_iterations=_ITERATIONS).sizes_BK.cpu()


def _theirs(call: Clusterer, images: Tensor, num_clusters: int, starts: int, seed: int) -> None:
    call(images, num_clusters, seed, starts)


def _seconds(call: Callable[[], object]) -> float:
    # The threads of the previous library keep spinning on the cores for a fifth of a second.
    time.sleep(_SETTLE_SECONDS)
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _clusterers() -> dict[str, tuple[str, Clusterer]]:
    """Returns the module and the clustering function of each library by name; scikit-learn is the first."""
    return {
        _REFERENCE: ("sklearn", _scikit_learn),
        "fast-pytorch-kmeans": ("fast_pytorch_kmeans", _fast_pytorch_kmeans),
        "torch-kmeans": ("torch_kmeans", _torch_kmeans),
        "faiss": ("faiss", partial(_faiss, seeded=False)),
        "faiss with k-means++": ("faiss", partial(_faiss, seeded=True)),
    }


def _scikit_learn(images: Tensor, num_clusters: int, seed: int, starts: int) -> list[Any]:
    from sklearn.cluster import KMeans

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            KMeans(num_clusters, n_init=starts, random_state=seed, max_iter=_ITERATIONS).fit(image).labels_
            for image in images.cpu().numpy()
        ]


def _fast_pytorch_kmeans(images: Tensor, num_clusters: int, seed: int, starts: int) -> list[Any]:
    from fast_pytorch_kmeans import KMeans

    torch.manual_seed(seed)
    labels = []
    for image in images:
        # This library has no restarts.
        attempts = [
            KMeans(num_clusters, max_iter=_ITERATIONS, init_method="kmeans++").fit_predict(image).cpu().numpy()
            for _ in range(starts)
        ]
        labels.append(attempts[0] if starts == 1 else min(attempts, key=partial(_inertia, image.cpu().numpy())))
    return labels


def _torch_kmeans(images: Tensor, num_clusters: int, seed: int, starts: int) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch_kmeans import KMeans

        model = KMeans(
            init_method="k-means++",
            num_init=starts,
            max_iter=_ITERATIONS,
            n_clusters=num_clusters,
            seed=seed,
            verbose=False,
        )
        return list(model(images).labels.cpu().numpy())


def _faiss(images: Tensor, num_clusters: int, seed: int, starts: int, *, seeded: bool) -> list[Any]:
    import faiss

    method = faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS if seeded else faiss.ClusteringInitMethod_RANDOM
    labels = []
    for image in images.cpu().numpy():
        model = faiss.Kmeans(
            image.shape[1],
            num_clusters,
            niter=20,
            nredo=starts,
            seed=seed,
            min_points_per_centroid=1,
            init_method=method,
        )
        model.train(image)
        labels.append(model.index.search(image, 1)[1][:, 0])
    return labels


def _mean_inertia(images: Tensor, labels: list[Any]) -> float:
    return fmean(_inertia(image, each) for image, each in zip(images.cpu().numpy(), labels, strict=True))


def _inertia(tokens: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    return float(
        sum(((tokens[labels == label] - tokens[labels == label].mean(0)) ** 2).sum() for label in np.unique(labels))
    )
