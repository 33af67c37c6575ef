"""What `make demo` must leave behind: a model that learned, and notebooks without an error or a warning."""

import json
from pathlib import Path

import nbformat
import pytest

pytestmark = pytest.mark.demo

DEMO = Path(__file__).parent.parent / "outputs" / "demo"
MAIN, AGAIN, EXPERIMENT = "colab_dpo_training.ipynb", "again.ipynb", "dpo_training_experiment.ipynb"
LIMIT_SECONDS = 300  # making the embedded model included, on two cores


@pytest.fixture(scope="module")
def metrics():
    found = json.loads((DEMO / "run" / "metrics.json").read_text(encoding="utf-8"))
    print("\n", json.dumps(found["seconds"]), found["pairs_per_second"], "pairs/s on", found["device"])
    return found


@pytest.mark.parametrize("name", [MAIN, AGAIN, EXPERIMENT])
def test_every_cell_ran_without_an_error_or_a_word_on_standard_error(name):
    cells = [cell for cell in nbformat.read(DEMO / name, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    outputs = [output for cell in cells for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error"] == []
    assert "".join(output.text for output in outputs if output.get("name") == "stderr") == ""


def test_the_model_learned(metrics):
    assert metrics["first_loss"] == pytest.approx(0.693147, abs=0.001)
    assert metrics["held_out"]["loss"] <= 0.35 and metrics["held_out"]["accuracy"] >= 0.80
    assert metrics["verdict"]["label"] == "learned"


def test_it_stays_within_time_and_memory(metrics):
    notebook = nbformat.read(DEMO / MAIN, as_version=4)
    assert notebook.metadata.papermill.duration <= LIMIT_SECONDS
    assert metrics["peak_memory_bytes"] <= 2 * 2**30


def test_the_second_execution_trained_nothing_again(metrics):
    text = (DEMO / AGAIN).read_text(encoding="utf-8")
    assert "この学習は終わっています" in json.loads(json.dumps(text)) and metrics["resumed_at"] == []
    assert metrics["steps_executed"] == {"sft": 0, "dpo": 0}
