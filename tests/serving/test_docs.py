"""The requests in docs/serving.md and README.md work as printed, from the root of the repository."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from tests.serving.local import PATIENCE_S, endpoint

pytestmark = pytest.mark.serving
ROOT = Path(__file__).resolve().parents[2]
# File -> the section with its example requests.
SECTIONS = {"docs/serving.md": "## Requests", "README.md": "## Serve"}


def _example(file: str, language: str, containing: str) -> str:
    """Returns the only example in one language that contains a text; it must name the address of a local endpoint."""
    text = (ROOT / file).read_text(encoding="utf-8")
    section = re.split(r"^## ", text.partition(f"{SECTIONS[file]}\n")[2], flags=re.MULTILINE)[0]
    (found,) = [
        code
        for code in re.findall(rf"^```{language}\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)
        if containing in code
    ]
    assert "http://127.0.0.1:8000" in found
    return str(found)


@pytest.fixture(scope="module")
def url(model: ElasticVLM, processor: ElasticProcessor) -> Iterator[str]:
    with endpoint(model, processor) as (url, _, _):
        yield url


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("file", SECTIONS)
def test_the_curl_example(url: str, file: str) -> None:
    script = _example(file, "", "curl").replace("http://127.0.0.1:8000", url)
    found = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    ).stdout
    assert found.startswith("HTTP/1.1 200")
    assert "x-visual-tokens: 64" in found
    assert '"content":"blue"' in found


def test_the_python_example(url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    script = (
        _example("docs/serving.md", "python", "OpenAI").replace("http://127.0.0.1:8000", url)
        + "\nassert answer.usage.visual_tokens == 64"
    )
    exec(compile(script, "docs/serving.md", "exec"), {})
    assert capsys.readouterr().out == "blue\n"
