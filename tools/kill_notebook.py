"""Kill the kernel of the executing main notebook during DPO, run the notebook again, and compare with the
demo that ran through.

    python tools/kill_notebook.py DEMO_FOLDER WORK_FOLDER

DEMO_FOLDER holds the run of `make demo`. Ends with 1 where the second execution does not go on from the
newest checkpoint or ends with another adapter.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

from dpo_helpers.folders import verify_folder
from dpo_helpers.keep.checkpoints import list_checkpoints


def start(folder: Path) -> subprocess.Popen:
    command = [
        "colab_dpo_training.ipynb",
        str(folder / "executed.ipynb"),
        "-f",
        "tests/demo_parameters.yaml",
        "--cwd",
        str(folder),
    ]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "papermill",
            *command,
            "-k",
            "python3",
            "--no-progress-bar",
            "--execution-timeout",
            "300",
        ]
    )


def find_newest_step(folder: Path) -> int:
    found = [
        verify_folder(path)
        for path in list_checkpoints(folder / "run.checkpoints")
        if path.name.startswith("dpo")
    ]
    return max([0, *(manifest["step"] for manifest in found if manifest)])


def main(demo: Path, folder: Path) -> int:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    papermill = start(folder)
    while find_newest_step(folder) < 50:
        if papermill.poll() is not None:
            sys.exit("the notebook ended before its kernel could be killed")
        time.sleep(0.05)
    kernels = [
        child
        for child in psutil.Process(papermill.pid).children(recursive=True)
        if "ipykernel_launcher" in " ".join(child.cmdline())
    ]
    for kernel in kernels:
        kernel.kill()
    died = papermill.wait() != 0
    step = find_newest_step(folder)
    again = start(folder).wait()
    metrics = json.loads((folder / "run" / "metrics.json").read_text(encoding="utf-8"))
    adapters = [(place / "run" / "adapter_model.safetensors").read_bytes() for place in (demo, folder)]
    checks = {
        f"one kernel was killed at step {step}, and the notebook failed": len(kernels) == 1 and died,
        "the second execution went through": again == 0,
        f"it went on at {metrics['resumed_at']}": metrics["resumed_at"] == [step],
        f"it executed {metrics['steps_executed']}": metrics["steps_executed"]
        == {"sft": 0, "dpo": metrics["steps"] - step},
        "its adapter is that of the demo, byte by byte": adapters[0] == adapters[1],
    }
    for text, passed in checks.items():
        print(("ok    " if passed else "FAILED"), text)
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
