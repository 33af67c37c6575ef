import re
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from dpo_helpers.config import RunConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README_COLAB.md").read_text(encoding="utf-8")


def test_the_settings_table_is_runconfig():
    table = dict(re.findall(r"^\| `([a-z_]+)` \| `([^`]+)` \| .+ \|$", README, re.MULTILINE))
    assert table == {name: str(value) for name, value in asdict(RunConfig()).items()}
    assert all(item.metadata["note"] in README for item in fields(RunConfig))


def test_no_figure_is_left_open():
    assert not re.findall(r"@[A-Z]+@|TODO|未記入", README)


def test_every_file_and_command_that_it_names_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"make ([a-z][a-z0-9-]+)", README))
    assert {"demo", "test", "real-run"} <= targets
    assert [name for name in targets if not re.search(rf"^[^\t]*\b{name}\b.*:", makefile, re.MULTILINE)] == []
    for name in (
        "colab_dpo_training.ipynb",
        "dpo_training_experiment.ipynb",
        "LICENSE",
        "tests/demo_parameters.yaml",
    ):
        assert name in README and (ROOT / name).is_file()


@pytest.mark.versions
def test_the_local_example_answers_from_the_saved_folder(finished_run, tmp_path):
    (code,) = (
        block for block in re.findall(r"```python\n(.+?)```", README, re.DOTALL) if "PeftModel" in block
    )
    code = code.replace('Path("run")', f"Path({str(finished_run[0])!r})")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-1500:]

    from dpo_helpers.keep.result import load_run
    from dpo_helpers.model.answer import generate_response

    model, tokenizer, _ = load_run(finished_run[0])
    assert done.stdout.strip() == generate_response(model, tokenizer, "質問: AIとは何ですか？")
