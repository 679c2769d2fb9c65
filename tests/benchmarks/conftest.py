import numpy as np
import pytest


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    """Weights of a small mask decoder, drawn at random."""
    draw = np.random.default_rng(0)
    shapes = {"_vq_vae._embedding": (128, 8), "decoder.0.weight": (16, 8, 1, 1), "decoder.12.weight": (1, 1, 1, 1)}
    for block in (2, 3):
        shapes |= {
            f"decoder.{block}.net.{layer}.weight": (16, 16, kernel, kernel)
            for layer, kernel in ((0, 3), (2, 3), (4, 1))
        }
    channels = (16, 16, 8, 4, 2)
    shapes |= {f"decoder.{4 + 2 * step}.weight": (channels[step], channels[step + 1], 4, 4) for step in range(4)}
    shapes["decoder.12.weight"] = (1, 2, 1, 1)
    arrays = {name: draw.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        if name.endswith("weight"):
            outputs = shape[1] if name.split(".")[1] in ("4", "6", "8", "10") else shape[0]
            arrays[name.replace("weight", "bias")] = draw.normal(0, 0.1, outputs).astype(np.float32)
    return arrays
