"""Write the package, readable, into the collapsed cell of both notebooks, so that the one .ipynb is enough.

    python tools/embed_helpers.py            # rewrite the notebooks
    python tools/embed_helpers.py --check    # exit 1 if a notebook and the package differ

It also keeps the notebooks clean: no outputs, no counts, minimal metadata. Standard library only.
"""

import base64
import bz2
import hashlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ("colab_dpo_training.ipynb", "dpo_training_experiment.ipynb")
TAG = "helpers"
LIMIT = 300_000  # bytes of one cell
# Not what the notebook teaches: data, reading other people's files, repairing environments, sharing; the experiments as well.
PACKED = {
    "topics.json", "own_data.py", "row_sources.py", "row_checks.py", "token_report.py", "run_lock.py",
    "conflicts.py", "packages.py", "quick_fix.py", "runtime.py", "sharing.py", "model_menu.py", "quantization.py",
}  # fmt: skip

LOADER = """\
#@title 補助パッケージ dpo_helpers を用意します（実行するだけで構いません）
# このセルは tools/embed_helpers.py が作ります。中身を直すときは dpo_helpers/ のファイルを直してください。
import base64, bz2, hashlib, importlib, importlib.util, json, pathlib, sys

FILES = {{}}
{files}

FILES.update(json.loads(bz2.decompress(base64.b85decode("".join(PACKED.split())))))

def package_hash(files):
    return hashlib.sha256("".join(f"{{name}}\\n{{files[name]}}\\n" for name in sorted(files)).encode()).hexdigest()

def install_package():
    ours, stamp_name = package_hash(FILES), ".written_by_notebook"
    if "" not in sys.path and str(pathlib.Path.cwd()) not in sys.path:
        sys.path.insert(0, "")
    importlib.invalidate_caches()
    found = importlib.util.find_spec("dpo_helpers")
    folder = pathlib.Path(found.origin).parent if found and found.origin else pathlib.Path.cwd() / "dpo_helpers"
    if folder.exists():
        there = package_hash({{p.name: p.read_text(encoding="utf-8") for p in folder.iterdir() if p.suffix in (".py", ".json")}})
        stamp = folder / stamp_name
        if there == ours:
            return f"{{folder}} はこのノートブックと同じ内容なので、そのまま使います。"
        if not (stamp.is_file() and stamp.read_text().strip() == there):
            return f"⚠️ {{folder}} はこのノートブックの内容と違います（変更されています）。あなたの変更を優先して、そのまま使います。"
        old = folder.with_name(f"dpo_helpers_old_{{there[:8]}}")
        number = 2
        while old.exists():
            old = folder.with_name(f"dpo_helpers_old_{{there[:8]}}_{{number}}")
            number += 1
        folder.rename(old)
        message = f"前のノートブックが作った {{folder}} を新しくしました。古いものは {{old.name}} に残しています。"
    else:
        message = f"{{folder}} を作りました。"
    aside = folder.with_name("dpo_helpers_writing")
    aside.mkdir(exist_ok=True)
    for name, text in FILES.items():
        (aside / name).write_text(text, encoding="utf-8", newline="\\n")
    (aside / stamp_name).write_text(ours)
    aside.rename(folder)
    for name in [name for name in sys.modules if name.split(".")[0] == "dpo_helpers"]:
        del sys.modules[name]
    importlib.invalidate_caches()
    return message

print(install_package())
"""


def read_package() -> dict[str, str]:
    """Return {file name: text}, the code first and the topic data last."""
    folder = ROOT / "dpo_helpers"
    paths = sorted(folder.glob("*.py")) + sorted(folder.glob("*.json"))
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


def hash_package(files: dict[str, str]) -> str:
    """The same sum as package_hash in the generated cell."""
    return hashlib.sha256("".join(f"{name}\n{files[name]}\n" for name in sorted(files)).encode()).hexdigest()


def make_cell_source(files: dict[str, str]) -> str:
    """Return the cell: the modules that do the training as they are, to be read, and the rest packed behind them.

    What is packed is read in the folder that the cell writes. Of bz2 every version gives the same bytes.
    """
    blocks, packed = [], {}
    for name, text in files.items():
        if "'''" in text or text.endswith("\\") or not text.endswith("\n"):
            raise SystemExit(f"{name}: a file must end in a newline and hold no triple single quotes to stand in a raw string")
        if name in PACKED or name.startswith("experiment"):
            packed[name] = text
        else:
            blocks.append(f"FILES[{name!r}] = r'''\n{text}'''[1:]\n")
    coded = base64.b85encode(bz2.compress(json.dumps(packed, ensure_ascii=False).encode())).decode()
    lines = "\n".join(coded[start : start + 140] for start in range(0, len(coded), 140))
    blocks.append(f"# {', '.join(packed)}\nPACKED = r'''\n{lines}\n'''\n")
    source = LOADER.format(files="\n".join(blocks)).rstrip("\n")
    if len(source.encode()) > LIMIT:
        raise SystemExit(f"the cell has {len(source.encode()):,} bytes, more than {LIMIT:,}")
    return source


def update_notebook(text: str, source: str) -> str:
    """Return the notebook's JSON with `source` in its tagged cell, and clean."""
    notebook = json.loads(text)
    tagged = [cell for cell in notebook["cells"] if TAG in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise SystemExit(f"expected one cell tagged {TAG!r}, found {len(tagged)}")
    tagged[0]["source"] = source
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"]).splitlines(keepends=True)
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    notebook["metadata"] = {key: notebook["metadata"][key] for key in ("accelerator", "colab", "kernelspec", "language_info")}
    return json.dumps(notebook, ensure_ascii=False, indent=1) + "\n"


def main() -> int:
    source = make_cell_source(read_package())
    different = []
    for name in NOTEBOOKS:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        updated = update_notebook(text, source)
        if updated != text:
            different.append(name)
            if "--check" not in sys.argv[1:]:
                path.write_text(updated, encoding="utf-8", newline="\n")
    print(f"{len(source.encode()):,} bytes in the cell; {'differ' if '--check' in sys.argv[1:] else 'rewritten'}: {different or 'none'}")
    return 1 if different and "--check" in sys.argv[1:] else 0


if __name__ == "__main__":
    sys.exit(main())
