"""The live view and the saved plot in Colab's kernel: Python 3.13, IPython 7.34, ipykernel 6.17.1; without
torch, from a log.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from simulate import ROOT, find_python

pytestmark = pytest.mark.environments
# ipykernel 6.17 fails on newer clients, so these are pinned as well.
COLAB_KERNEL = [
    "ipython==7.34.0",
    "ipykernel==6.17.1",
    "ipywidgets==7.7.1",
    "jupyter_client==7.4.9",
    "jupyter_core==5.9.1",
    "traitlets==5.7.1",
    "tornado==6.5.7",
    "pyzmq==26.2.1",
    "nbclient==0.10.4",
    "nbformat==5.11.1",
    "matplotlib-inline==0.2.2",
    "matplotlib==3.10.0",
    "numpy==2.1.3",
    "matplotlib-fontja>=1.1,<2",
    "psutil==5.9.5",
    "debugpy==1.8.15",
    "nest-asyncio==1.6.0",
]


@pytest.fixture(scope="module")
def colab_kernel(tmp_path_factory):
    """The interpreter of a venv with the kernel's exact versions."""
    folder = tmp_path_factory.mktemp("kernel")
    subprocess.run([find_python("3.13"), "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *COLAB_KERNEL], check=True
    )
    return python


def make_log(steps):
    entries = [
        {
            "step": step,
            "loss": 0.7 - 0.01 * step,
            "rewards/accuracies": 0.8,
            "rewards/margins": 0.1 * step,
            "rewards/chosen": -0.1 * step,
            "rewards/rejected": -0.2 * step,
        }
        for step in range(1, steps + 1)
    ]
    return [
        line
        for entry in entries
        for line in (
            entry,
            {f"eval_{k}": v for k, v in entry.items() if k != "step"} | {"step": entry["step"]},
        )
    ]


def test_the_view_changes_in_place_and_the_plot_is_shown_once(colab_kernel, tmp_path):
    log = tmp_path / "log_history.json"
    log.write_text(json.dumps(make_log(20)))
    script = Path(__file__).with_name("replay_live_view.py")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JUPYTER_PATH": "",
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }
    done = subprocess.run(
        [colab_kernel, script, log],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    kinds, names = zip(*result["sent"], strict=True)
    assert kinds[0] == "display_data" and set(kinds[1:]) == {"update_display_data"} and len(set(names)) == 1
    [view] = result["view"]
    assert (
        "ステップ 20 / 20" in view["text/plain"]
        and view["text/html"].count("<svg") == 1
        and "終わりました" in view["text/html"]
    )
    assert result["plot"] == [["image/png", "text/plain"]] and result["streams"] == []
    assert result["seconds"][0]["median"] < 0.1
