"""Check what `make demo` left behind against what the project promises; print the figures. Standard
library only.
"""

import json
import sys
from pathlib import Path


def main(folder: Path) -> int:
    notebook = json.loads((folder / "colab_dpo_training.ipynb").read_text(encoding="utf-8"))
    metrics = json.loads((folder / "run" / "metrics.json").read_text(encoding="utf-8"))
    seconds = notebook["metadata"]["papermill"]["duration"]
    errors = [
        out for cell in notebook["cells"] for out in cell.get("outputs", []) if out["output_type"] == "error"
    ]
    stderr = "".join(
        "".join(out["text"])
        for cell in notebook["cells"]
        for out in cell.get("outputs", [])
        if out.get("name") == "stderr"
    )
    held_out = metrics["held_out"]
    checks = {
        f"first loss {metrics['first_loss']:.5f} is ln 2": abs(metrics["first_loss"] - 0.693147) <= 0.001,
        f"held-out loss {held_out['loss']:.4f} <= 0.35": held_out["loss"] <= 0.35,
        f"held-out accuracy {held_out['accuracy']:.4f} >= 0.80": held_out["accuracy"] >= 0.80,
        f"verdict {metrics['verdict']['label']} is learned": metrics["verdict"]["label"] == "learned",
        f"notebook {seconds:.0f} s <= {LIMIT_SECONDS} s": seconds <= LIMIT_SECONDS,
        f"peak memory {metrics['peak_memory_bytes'] / 2**30:.2f} GiB <= 2": metrics["peak_memory_bytes"]
        <= 2 * 2**30,
        "no cell failed": not errors,
        "every code cell was run": all(
            cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"
        ),
        "nothing on standard error": not stderr,
    }
    for text, passed in checks.items():
        print(("ok    " if passed else "FAILED"), text)
    if stderr:
        print(stderr[:2000])
    print(json.dumps(metrics["seconds"]), metrics["pairs_per_second"], "pairs/s on", metrics["device"])
    return 0 if all(checks.values()) else 1


LIMIT_SECONDS = 120

if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
