import base64
import io

import pandas as pd
import pytest
from PIL import Image

from parcelray.config.connector import ParcelConnectorConfig
from parcelray.config.model import MiniModelConfig
from parcelray.errors import UserError
from parcelray.evaluation.predict import PYFUNC_FILE
from parcelray.models.manifest import write_manifest
from parcelray.models.mini import build_config, build_model, build_processor, save_checkpoint
from parcelray.tracking.mlflow_tracker import start_run
from parcelray.tracking.registry import register_model, resolve_registry

from ...stores import new_store

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload``:DeprecationWarning")

SMALL = MiniModelConfig(
    image_size=64,
    vision_width=16,
    vision_layers=1,
    vision_heads=2,
    vision_mlp_width=16,
    text_width=16,
    text_layers=1,
    text_heads=2,
    text_mlp_width=16,
)


@pytest.fixture(scope="module")
def model_uri(tmp_path_factory):
    """A registered mini model with random weights and the PARCEL connector, as a folder that MLflow loads."""
    root = tmp_path_factory.mktemp("pyfunc")
    processor = build_processor(SMALL, ["How many red circles are there? 3", "What is in the image?"])
    config = build_config(SMALL, processor)
    config.connector = ParcelConnectorConfig(num_heads=2).model_dump(mode="json")
    save_checkpoint(build_model(config, seed=0), processor, root / "checkpoint")
    write_manifest(root / "checkpoint", config={}, git_commit=None, data={}, seed=0)
    uri = new_store(root)
    run_id = start_run(uri, "pyfunc", "train-a-00000000", params={})
    version = register_model(uri, root / "checkpoint", "parcel", run_id, pyfunc_file=PYFUNC_FILE)
    folder, _ = resolve_registry(f"models:/parcel/{version}", uri)
    return str(folder.parent.parent)


@pytest.fixture
def model(model_uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "False")
    import mlflow.pyfunc

    return mlflow.pyfunc.load_model(model_uri)


def png(color):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), color).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_registered_model_answers_each_row_at_its_budget(model):
    rows = pd.DataFrame(
        {
            "prompt": ["What is in the image?"] * 3,
            "image": [png("red"), png("blue"), png("red")],
            "num_visual_tokens": [64, 16, 64],
        }
    )
    answers = model.predict(rows)
    assert list(answers.columns) == ["answer"]
    assert [type(answer) for answer in answers["answer"]] == [str] * 3
    assert answers["answer"][0] == answers["answer"][2]
    assert len(model.predict(model.input_example)) == 1


def test_a_prompt_may_name_control_tokens(model):
    rows = pd.DataFrame({"prompt": ["<image> and <eos>"], "image": [png("red")], "num_visual_tokens": [16]})
    assert len(model.predict(rows)) == 1


def test_inputs_that_violate_the_signature_are_refused(model):
    with pytest.raises(UserError, match="image of row 0 is not base64"):
        model.predict(
            pd.DataFrame({"prompt": ["x"], "image": ["data:image/png;base64,AAAA"], "num_visual_tokens": [64]})
        )
    with pytest.raises(UserError, match="7 visual tokens"):
        model.predict(pd.DataFrame({"prompt": ["x"], "image": [png("red")], "num_visual_tokens": [7]}))
    with pytest.raises(Exception, match="num_visual_tokens"):
        model.predict(pd.DataFrame({"prompt": ["x"], "image": [png("red")]}))
