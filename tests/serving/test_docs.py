"""What docs/serving.md shows works as it stands."""

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from tests.serving.local import endpoint
from tests.serving.test_api import data_url

pytestmark = pytest.mark.serving
TEXT = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def _example(language: str, containing: str) -> str:
    examples: list[str] = re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)
    return next(code for code in examples if containing in code)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_curl_example(model: ElasticVLM, processor: ElasticProcessor, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "image.png")
    with endpoint(model, processor) as (url, _, _):
        script = _example("", "curl").replace("http://127.0.0.1:8000", url)
        found = subprocess.run(["bash", "-euc", script], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=True).stdout
    assert found.startswith("HTTP/1.1 200")
    assert "x-visual-tokens: 64" in found


def test_the_python_example(model: ElasticVLM, processor: ElasticProcessor) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    with endpoint(model, processor) as (url, _, _):
        code = _example("python", "OpenAI").replace("http://127.0.0.1:8000", url)
        script = f"image = {data_url(buffer.getvalue())!r}\n{code}\nassert answer.usage.visual_tokens == 64"
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
