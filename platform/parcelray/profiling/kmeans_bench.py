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

SIDE, PATCH = 24, 14
_HIDDEN = 1024
_IMAGES_FOR_OTHERS = 4
"""The others are timed on so many images, one after the other where they know no batches; a larger batch takes them proportionally longer."""
_ROUNDS_OF_OTHERS = 3
_IMAGES_FOR_INERTIA = 2
_SEEDS = 10
_ITERATIONS = 100

Clusterer = Callable[[NDArray[np.float32], int, int], object]
"""Clusters images [B, N, D] into k clusters each under a seed."""


class _Setting(NamedTuple):
    width: int
    num_clusters: int
    batch_size: int

    def __str__(self) -> str:
        return f"{SIDE * SIDE} x {self.width}, k {self.num_clusters}, batch {self.batch_size}"


def bench_kmeans(*, widths: list[int], clusters: list[int], batch_sizes: list[int], repeats: int) -> Report:
    """Time and inertia for every width, number of clusters and batch size.

    Args:
        widths: of the tokens.
        clusters: k.
        batch_sizes: images at a time.
        repeats: timed rounds of ours; the others run at least once per image.
    """
    others = _others()
    measures: list[Measure] = []
    for width in widths:
        tokens = photograph_tokens(max(*batch_sizes, _IMAGES_FOR_OTHERS), width)
        for num_clusters in clusters:
            measures += _quality(tokens, width, num_clusters)
            each = {name: _seconds_per_image(call, tokens, num_clusters) for name, call in others.items()}
            for batch_size in batch_sizes:
                measures += _speed(tokens[:batch_size], _Setting(width, num_clusters, batch_size), each, repeats)
    modules = ("fast_pytorch_kmeans", "torch_kmeans", "faiss")
    missing: dict[str, str | int] = {name: "not installed" for name in modules if importlib.util.find_spec(name) is None}
    return Report(tuple(measures), machine_info() | missing)


def photograph_tokens(count: int, width: int, seed: int = 0) -> Tensor:
    """Tokens of crops of photographs: [count, 576, width]."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(3 * PATCH * PATCH, _HIDDEN, generator=generator) / (3 * PATCH * PATCH) ** 0.5
    second = torch.randn(_HIDDEN, width, generator=generator) / _HIDDEN**0.5
    places = 0.3 * torch.randn(SIDE * SIDE, _HIDDEN, generator=generator)
    pictures = load_sample_images().images
    tokens = []
    for _ in range(count):
        picture = pictures[rng.integers(len(pictures))]
        top, left = rng.integers(picture.shape[0] - SIDE * PATCH), rng.integers(picture.shape[1] - SIDE * PATCH)
        crop = torch.tensor(picture[top : top + SIDE * PATCH, left : left + SIDE * PATCH] / 127.5 - 1, dtype=torch.float32)
        patches = crop.view(SIDE, PATCH, SIDE, PATCH, 3).permute(0, 2, 1, 3, 4).reshape(SIDE * SIDE, -1)
        tokens.append(F.gelu(patches @ first + places) @ second)
    return torch.stack(tokens)


def _quality(tokens: Tensor, width: int, num_clusters: int) -> Iterator[Measure]:
    """Mean inertia over seeds beside scikit-learn's."""
    images = tokens[:_IMAGES_FOR_INERTIA]
    ours = np.mean([kmeans(images, num_clusters, seed=seed, max_iterations=_ITERATIONS).inertia_B.numpy() for seed in range(_SEEDS)])
    theirs = np.mean([_scikit_learn(images.numpy(), num_clusters, seed) for seed in range(_SEEDS)])
    name = f"inertia, {SIDE * SIDE} x {width}, k {num_clusters}"
    yield Measure(name, float(ours / theirs), "ratio", goal="<= 1.005", against=f"scikit-learn, n_init 1, mean of {_SEEDS} seeds")


def _speed(tokens: Tensor, setting: _Setting, each: Mapping[str, list[float]], repeats: int) -> Iterator[Measure]:
    kmeans(tokens, setting.num_clusters, max_iterations=_ITERATIONS)
    times = []
    for seed in range(repeats):
        began = time.perf_counter()
        kmeans(tokens, setting.num_clusters, seed=seed, max_iterations=_ITERATIONS)
        times.append(time.perf_counter() - began)
    own = statistics.median(times)
    yield Measure(f"ours, {setting}", 1000 * own, "ms", 1000 * interquartile_range(times))
    medians = {name: setting.batch_size * statistics.median(values) for name, values in each.items()}
    yield Measure(f"times faster, {setting}", medians["scikit-learn"] / own, "ratio", goal=">= 10", against="scikit-learn")
    rest = {name: value for name, value in medians.items() if name != "scikit-learn"}
    if rest:
        best = min(rest, key=lambda name: rest[name])
        yield Measure(f"times faster, {setting}", rest[best] / own, "ratio", goal=">= 5", against=f"{best}, the fastest other")


def _seconds_per_image(call: Clusterer, tokens: Tensor, num_clusters: int) -> list[float]:
    images = tokens[:_IMAGES_FOR_OTHERS].numpy()
    call(images[:1], num_clusters, 0)
    times = []
    for seed in range(_ROUNDS_OF_OTHERS):
        began = time.perf_counter()
        call(images, num_clusters, seed)
        times.append((time.perf_counter() - began) / len(images))
    return times


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


def _fast_pytorch_kmeans(images: NDArray[np.float32], num_clusters: int, seed: int) -> object:
    from fast_pytorch_kmeans import KMeans

    torch.manual_seed(seed)
    return [KMeans(num_clusters, max_iter=_ITERATIONS, init_method="kmeans++").fit_predict(torch.from_numpy(image)) for image in images]


def _torch_kmeans(images: NDArray[np.float32], num_clusters: int, seed: int) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch_kmeans import KMeans

        model = KMeans(init_method="k-means++", num_init=1, max_iter=_ITERATIONS, n_clusters=num_clusters, seed=seed, verbose=False)
        return model(torch.from_numpy(images))


def _faiss(images: NDArray[np.float32], num_clusters: int, seed: int) -> object:
    import faiss

    # Seeded at random: it knows no k-means++, so its inertia is higher.
    return [faiss.Kmeans(image.shape[1], num_clusters, niter=20, nredo=1, seed=seed, min_points_per_centroid=1).train(image) for image in images]
