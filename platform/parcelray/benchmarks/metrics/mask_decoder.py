"""Decoder of PaliGemma's 16 segmentation tokens into a mask, a small VQ-VAE (Ning et al., arXiv 2301.02229).

Layers: a codebook of 128 vectors on a 4 x 4 grid, a 1 x 1 convolution, two residual blocks, four transposed
convolutions that double the side, and a 1 x 1 convolution to one channel. The mask has 64 x 64 pixels. The weights are
a local .npz file with the key names of big_vision's vae-oid.npz (a PyTorch checkpoint: `_vq_vae._embedding`,
`decoder.N.weight`, `decoder.N.bias`). Its encoder is not read.
"""

import functools
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from parcelray.errors import UserError

CODES = 128
GRID = 4
SIDE = 64
_FIRST, _LAST = "decoder.0", "decoder.12"
_RESIDUAL = ("decoder.2.net", "decoder.3.net")
_UPSAMPLING = ("decoder.4", "decoder.6", "decoder.8", "decoder.10")
_CODEBOOK = "_vq_vae._embedding"
_KERNELS = {
    _FIRST: 1,
    _LAST: 1,
    **{f"{block}.{layer}": kernel for block in _RESIDUAL for layer, kernel in ((0, 3), (2, 3), (4, 1))},
    **dict.fromkeys(_UPSAMPLING, 4),
}


class MaskDecoder:
    """Decodes segmentation tokens into masks.

    Args:
        weights: arrays by name, as in the module's docstring.
        source: path of the weights, for error messages.

    Raises:
        UserError: an array is missing, or its shape does not fit the architecture.
    """

    def __init__(self, weights: Mapping[str, NDArray[np.float32]], source: str) -> None:
        _check(weights, source)
        self._weights = {name: torch.from_numpy(np.asarray(weights[name], dtype=np.float32)) for name in _names()}

    def __call__(self, codes_B16: NDArray[np.int64]) -> NDArray[np.float32]:
        """Returns masks of shape (batch, 64, 64), with values from about -1 (background) to 1 (foreground)."""
        with torch.inference_mode():
            grid = self._weights[_CODEBOOK][torch.from_numpy(codes_B16)].reshape(len(codes_B16), GRID, GRID, -1)
            features = functional.relu(self._convolution(grid.permute(0, 3, 1, 2), _FIRST))
            for block in _RESIDUAL:
                inner = functional.relu(self._convolution(features, f"{block}.0", padding=1))
                inner = functional.relu(self._convolution(inner, f"{block}.2", padding=1))
                features = features + self._convolution(inner, f"{block}.4")
            for layer in _UPSAMPLING:
                weight, bias = self._weights[f"{layer}.weight"], self._weights[f"{layer}.bias"]
                features = functional.relu(functional.conv_transpose2d(features, weight, bias, stride=2, padding=1))
            masks: NDArray[np.float32] = self._convolution(features, _LAST)[:, 0].numpy()
        return masks

    def _convolution(self, features: torch.Tensor, name: str, padding: int = 0) -> torch.Tensor:
        return functional.conv2d(
            features, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"], padding=padding
        )


@functools.lru_cache(maxsize=2)
def load_mask_decoder(path: Path) -> MaskDecoder:
    """Loads the decoder from a local .npz file. Pickled arrays are refused.

    Raises:
        UserError: the file is missing, is not an .npz file, or contains another model.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in _names() if name in file.files}
    except FileNotFoundError:
        raise UserError(
            f"There is no mask decoder at {path}; download PaliGemma's vae-oid.npz and give its path with mask_decoder."
        ) from None
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError):
        raise UserError(
            f"{path} is not an .npz file of plain arrays; download PaliGemma's vae-oid.npz again."
        ) from None
    return MaskDecoder(arrays, str(path))


def _names() -> list[str]:
    return [_CODEBOOK, *(f"{layer}.{part}" for layer in _KERNELS for part in ("weight", "bias"))]


def _check(weights: Mapping[str, NDArray[np.float32]], source: str) -> None:
    missing = [name for name in _names() if name not in weights]
    if missing:
        raise UserError(
            f"{source} lacks {', '.join(missing[:3])} ({len(missing)} arrays in total); it must be PaliGemma's mask"
            " decoder, vae-oid.npz."
        )
    codebook = weights[_CODEBOOK]
    if codebook.ndim != 2 or len(codebook) != CODES:
        raise UserError(f"{source}: {_CODEBOOK} has shape {codebook.shape}, but the codebook must have {CODES} rows.")
    for layer, inputs, outputs in _channels(weights, codebook.shape[1]):
        kernel = _KERNELS[layer]
        # A transposed convolution stores its inputs first.
        shape = ((inputs, outputs) if layer in _UPSAMPLING else (outputs, inputs)) + (kernel, kernel)
        if weights[f"{layer}.weight"].shape != shape or weights[f"{layer}.bias"].shape != (outputs,):
            raise UserError(
                f"{source}: {layer}.weight has shape {weights[f'{layer}.weight'].shape}, but the mask decoder needs"
                f" {shape}."
            )


def _channels(weights: Mapping[str, NDArray[np.float32]], embedding: int) -> list[tuple[str, int, int]]:
    """Returns the input and output channels of each layer. Only the width of the first layer is free."""
    width = len(weights[f"{_FIRST}.bias"])
    layers = [
        (_FIRST, embedding, width),
        *((f"{block}.{layer}", width, width) for block in _RESIDUAL for layer in (0, 2, 4)),
    ]
    sizes = [width, *(width >> step for step in range(len(_UPSAMPLING)))]
    layers += [(layer, sizes[step], sizes[step + 1]) for step, layer in enumerate(_UPSAMPLING)]
    return [*layers, (_LAST, sizes[-1], 1)]
