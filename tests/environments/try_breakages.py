"""Every breakage on every image, once: python tests/environments/try_breakages.py OUT.json [IMAGE ...]

CI runs six of them on one image instead (test_breakages.py). What is checked is what `check_repair` says.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import breakages
from simulate import difference, doctor, find_python, make_environment, set_up


def check_repair(python: str) -> dict:
    """Diagnose, repair, repair again: what was announced, what moved, and what is worse than before."""
    before, complaints = breakages.look(python)
    start = time.monotonic()
    first, report, said = doctor(python, "--metadata-only")
    looked = time.monotonic() - start
    untouched = breakages.look(python)[0] == before
    second, repaired, _ = doctor(python, "--metadata-only", "--fix")
    after, left = breakages.look(python)
    third, _, quiet = doctor(python, "--metadata-only", "--fix")
    moved = {name: new for name, (_, new) in difference(before, after).items()}
    # What was half gone is installed again: its folder says the same before and after, or nothing.
    unseen = set(report["incomplete"]) & ({*before} - {*moved} | {*moved} - {*before})
    return {
        "found": [line for line in said.splitlines() if line.startswith("・")],
        "announced": report["plan"],
        "moved": moved,
        "as announced": {n: v for n, v in report["plan"].items() if n not in unseen}
        == {n: v for n, v in moved.items() if n not in unseen},
        "codes": [first, second, third],
        "untouched by looking": untouched,
        "quiet": "何も変更しませんでした" in quiet and breakages.look(python)[0] == after,
        "new complaints": sorted(left - complaints),
        "torch replaced": repaired["torch_replaced"] if second else False,
        "seconds": round(looked, 1),
    }


def make_template(folder: Path, python: str, pip: str) -> str:
    subprocess.run([find_python(python), "-m", "venv", str(folder)], check=True)
    wanted = "pip" if pip == "newest" else f"pip=={pip}"
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--upgrade"]
    subprocess.run([*command, wanted, "packaging==26.3"], check=True)
    return str(folder / "bin" / "python")


def main(out: str, *names: str) -> None:
    rows = []
    for image, (packages, python, pip) in breakages.make_images().items():
        if names and image not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            template = make_template(Path(folder, "template"), python, pip)
            base = make_environment(Path(folder, "base"), template, packages)
            before, complaints = breakages.look(base)
            start = time.monotonic()
            set_up(base)
            seconds, after = time.monotonic() - start, breakages.look(base)
            moved = {n: f"{old} → {new}" for n, (old, new) in difference(before, after[0]).items()}
            rows.append({"image": image, "breakage": "set-up", "moved": moved, "seconds": round(seconds, 1)})
            rows[-1]["new complaints"] = sorted(after[1] - complaints)
            for breakage in (lambda python: None, *breakages.CURABLE, breakages.replace_torch):
                copy = breakages.copy_environment(base, Path(folder, "copy"))
                name = breakage.__name__.replace("<lambda>", "healthy")
                try:
                    breakage(copy)
                    row = check_repair(copy)
                except AssertionError as error:
                    row = {"failed": str(error)[-600:]}
                rows.append({"image": image, "breakage": name, **row})
                print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
                subprocess.run(["rm", "-r", str(Path(folder, "copy"))], check=True)
        Path(out).write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
