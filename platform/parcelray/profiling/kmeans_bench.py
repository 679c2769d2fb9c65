"""`parcelray bench kmeans`: our clustering of visual tokens beside scikit-learn's and three other libraries', in one run.

The tokens have the structure of photographs: 14 x 14 patches of crops from scikit-learn's two sample pictures, through a random two-layer
network to the width of CLIP's features (1024) and of LLaVA-1.5's projected tokens (4096). No trained weights are needed.
"""

import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from parcelray.models.token_reduction.kmeans import kmeans
from parcelray.profiling.measure import Measure, Report, interquartile_range, machine_info
from parcelray.profiling.photographs import photographs

SIDE, PATCH = 24, 14
_HIDDEN = 1024
_IMAGES_FOR_OTHERS = 4
"""The others are timed on so many images, one after the other where they know no batches; a larger batch takes them proportionally longer."""
_ROUNDS_OF_OTHERS = 3
_IMAGES_FOR_INERTIA = 2
_SEEDS = 10
_ITERATIONS = 100

_EQUAL = 1.005
"""Largest inertia beside scikit-learn's that counts as equal."""
_TORCH_KMEANS_NUMBERS = 2**26
"""torch-kmeans forms all differences N x k x D at once; beyond so many numbers it takes most of a minute an image and is left out."""

Clusterer = Callable[[NDArray[np.float32], int, int], list[float]]
"""Clusters images [B, N, D] into k clusters each under a seed; returns the inertia of each image."""


class _Setting(NamedTuple):
    width: int
    num_clusters: int
    batch_size: int

    def __str__(self) -> str:
        return f"{SIDE * SIDE} x {self.width}, k {self.num_clusters}, batch {self.batch_size}"


class _Other(NamedTuple):
    """What another library takes and gives for a width and a number of clusters."""

    seconds: float
    """An image."""
    inertia: float
    """Mean, beside scikit-learn's."""


def bench_kmeans(*, widths: list[int], clusters: list[int], batch_sizes: list[int], repeats: int) -> Report:
    """Time and inertia for every width, number of clusters and batch size.

    Args:
        widths: of the tokens.
        clusters: k.
        batch_sizes: images at a time.
        repeats: timed rounds of ours.
    """
    measures: list[Measure] = []
    for width in widths:
        tokens = photograph_tokens(max(*batch_sizes, _IMAGES_FOR_OTHERS), width)
        for num_clusters in clusters:
            measures += _quality(tokens, width, num_clusters)
            others = _measured(tokens, num_clusters)
            for name, other in others.items():
                label = f"{name}, {SIDE * SIDE} x {width}, k {num_clusters}"
                inertia = Measure(f"{label}: inertia", other.inertia, "ratio", against="scikit-learn")
                measures += [Measure(f"{label}: an image", 1000 * other.seconds, "ms"), inertia]
            for batch_size in batch_sizes:
                measures += _speed(tokens[:batch_size], _Setting(width, num_clusters, batch_size), others, repeats)
    modules = ("fast_pytorch_kmeans", "torch_kmeans", "faiss")
    missing: dict[str, str | int] = {name: "not installed" for name in modules if importlib.util.find_spec(name) is None}
    return Report(tuple(measures), machine_info() | missing)


def photograph_tokens(count: int, width: int, seed: int = 0) -> Tensor:
    """Tokens of crops of photographs: [count, 576, width]."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(3 * PATCH * PATCH, _HIDDEN, generator=generator) / (3 * PATCH * PATCH) ** 0.5
    second = torch.randn(_HIDDEN, width, generator=generator) / _HIDDEN**0.5
    places = 0.3 * torch.randn(SIDE * SIDE, _HIDDEN, generator=generator)
    crops = photographs(count, SIDE * PATCH, seed).permute(0, 2, 3, 1)
    patches = crops.reshape(count, SIDE, PATCH, SIDE, PATCH, 3).permute(0, 1, 3, 2, 4, 5).reshape(count, SIDE * SIDE, -1)
    tokens: Tensor = F.gelu(patches @ first + places) @ second
    return tokens


def _quality(tokens: Tensor, width: int, num_clusters: int) -> Iterator[Measure]:
    """Mean inertia over seeds beside scikit-learn's."""
    images = tokens[:_IMAGES_FOR_INERTIA]
    ours = np.mean([kmeans(images, num_clusters, seed=seed, max_iterations=_ITERATIONS).inertia_B.numpy() for seed in range(_SEEDS)])
    theirs = np.mean([_scikit_learn(images.numpy(), num_clusters, seed) for seed in range(_SEEDS)])
    name = f"inertia, {SIDE * SIDE} x {width}, k {num_clusters}"
    yield Measure(name, float(ours / theirs), "ratio", goal="<= 1.005", against=f"scikit-learn, n_init 1, mean of {_SEEDS} seeds")


def _speed(tokens: Tensor, setting: _Setting, others: Mapping[str, _Other], repeats: int) -> Iterator[Measure]:
    kmeans(tokens, setting.num_clusters, max_iterations=_ITERATIONS)
    times = []
    for seed in range(repeats):
        began = time.perf_counter()
        kmeans(tokens, setting.num_clusters, seed=seed, max_iterations=_ITERATIONS)
        times.append(time.perf_counter() - began)
    own = statistics.median(times)
    yield Measure(f"ours, {setting}", 1000 * own, "ms", 1000 * interquartile_range(times))
    yield Measure(f"times faster, {setting}", setting.batch_size * others["scikit-learn"].seconds / own, "ratio", goal=">= 10", against="scikit-learn")
    equal = {name: other.seconds for name, other in others.items() if name != "scikit-learn" and other.inertia <= _EQUAL}
    if equal:
        best = min(equal, key=lambda name: equal[name])
        against = f"{best}, the fastest other of equal inertia"
        yield Measure(f"times faster, {setting}", setting.batch_size * equal[best] / own, "ratio", goal=">= 5", against=against)


def _measured(tokens: Tensor, num_clusters: int) -> dict[str, _Other]:
    """Every library on the same images, after a warm-up; all take one image after the other."""
    images = tokens[:_IMAGES_FOR_OTHERS].numpy()
    found: dict[str, tuple[float, float]] = {}
    for name, call in _others().items():
        if name == "torch-kmeans" and num_clusters * images[0].size > _TORCH_KMEANS_NUMBERS:
            continue
        call(images[:1], num_clusters, 0)
        times, inertias = [], []
        for seed in range(_ROUNDS_OF_OTHERS):
            began = time.perf_counter()
            inertias += call(images, num_clusters, seed)
            times.append((time.perf_counter() - began) / len(images))
        found[name] = (statistics.median(times), statistics.fmean(inertias))
    base = found["scikit-learn"][1]
    return {name: _Other(seconds, inertia / base) for name, (seconds, inertia) in found.items()}


def _others() -> dict[str, Clusterer]:
    known: dict[str, tuple[str, Clusterer]] = {
        "fast-pytorch-kmeans": ("fast_pytorch_kmeans", _fast_pytorch_kmeans),
        "torch-kmeans": ("torch_kmeans", _torch_kmeans),
        "faiss": ("faiss", _faiss),
    }
    return {"scikit-learn": _scikit_learn} | {name: call for name, (module, call) in known.items() if importlib.util.find_spec(module) is not None}


def _scikit_learn(images: NDArray[np.float32], num_clusters: int, seed: int) -> list[float]:
    """The inertia of each image."""
    from sklearn.cluster import KMeans

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [float(KMeans(num_clusters, n_init=1, random_state=seed, max_iter=_ITERATIONS).fit(image).inertia_) for image in images]


def _fast_pytorch_kmeans(images: NDArray[np.float32], num_clusters: int, seed: int) -> list[float]:
    from fast_pytorch_kmeans import KMeans

    torch.manual_seed(seed)
    found = []
    for image in images:
        labels = KMeans(num_clusters, max_iter=_ITERATIONS, init_method="kmeans++").fit_predict(torch.from_numpy(image))
        found.append(_inertia(image, labels.numpy()))
    return found


def _torch_kmeans(images: NDArray[np.float32], num_clusters: int, seed: int) -> list[float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch_kmeans import KMeans

        model = KMeans(init_method="k-means++", num_init=1, max_iter=_ITERATIONS, n_clusters=num_clusters, seed=seed, verbose=False)
        return [_inertia(image, model(torch.from_numpy(image[None])).labels[0].numpy()) for image in images]


def _faiss(images: NDArray[np.float32], num_clusters: int, seed: int) -> list[float]:
    import faiss

    found = []
    for image in images:
        # Seeded at random: it knows no k-means++.
        model = faiss.Kmeans(image.shape[1], num_clusters, niter=20, nredo=1, seed=seed, min_points_per_centroid=1)
        model.train(image)
        found.append(_inertia(image, model.index.search(image, 1)[1][:, 0]))
    return found


def _inertia(tokens: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    return float(sum(((tokens[labels == label] - tokens[labels == label].mean(0)) ** 2).sum() for label in np.unique(labels)))
