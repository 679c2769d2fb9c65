"""The shipped elastic models are intact, small, of the systems that they are named after, and answer questions."""

import pytest

from parcelray.datasets.mini.suite import family_samples
from parcelray.evaluation.predict.predictor import Predictor
from parcelray.evaluation.scoring.split_scores import score
from parcelray.models.checkpoint import resolve_checkpoint
from parcelray.models.manifest import verify_manifest
from parcelray.models.vlm import connector_of, load_processor, load_vlm
from parcelray.studies.elastic.ship import SHIPPED

_SETS = {"mini_parcel": range(16, 257, 2), "mini_m3": (4, 16, 64, 256), "mini_mqt": range(2, 257, 2)}


@pytest.mark.parametrize("name", SHIPPED.values())
def test_a_shipped_model_is_intact_and_has_its_budgets(name: str) -> None:
    folder = resolve_checkpoint(name).path
    manifest = verify_manifest(folder)
    assert sum(entry.bytes for entry in manifest.files.values()) < 8_000_000
    connector = connector_of(folder)
    assert connector.name == {"mini_vanilla": "identity"}.get(name, name.removeprefix("mini_"))
    assert set(_SETS.get(name, (256,))) <= set(connector.supported_budgets)


def test_the_shipped_parcel_answers_at_every_budget() -> None:
    folder = resolve_checkpoint("mini_parcel").path
    model, processor = load_vlm(folder).eval(), load_processor(folder)
    samples = family_samples("test", "resolution", 60, image_size=processor.image_size)
    predictions = Predictor(model, processor).generate_budgets(samples, (16, 64, 256))
    for budget in (16, 64, 256):
        values = score(samples, predictions[budget])
        # 71 to 76 % of 500 questions; 7 % is the majority class.
        assert sum(values) / len(values) > 0.45
