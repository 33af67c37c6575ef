"""Pack the package into the helper cell of both notebooks, so that one .ipynb is enough, and keep them clean.

    python tools/embed_helpers.py            # rewrite the notebooks
    python tools/embed_helpers.py --check    # exit 1 where a notebook's unpacked files are not the package

Standard library only. The archive is a tar without times or owners: the same package gives the same cell.
"""

import base64
import bz2
import io
import json
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ("colab_dpo_training.ipynb", "dpo_training_experiment.ipynb")
TAG = "helpers"
LIMIT = 200_000  # bytes of the whole cell; to come down to 110_000 with the package
LINE = 4_000  # characters of one line of the packed text

CELL = '''\
#@title 補助パッケージ dpo_helpers を用意します（実行すると、左のファイル一覧で中身を読めます）
import base64, hashlib, importlib.util, io, pathlib, shutil, sys, tarfile  # tools/embed_helpers.py が作ります
PACKED = """
@PACKED@
"""
STAMP, AT = ".written_by_notebook", pathlib.Path.cwd() / "dpo_helpers"
def stamp(contents):
    return hashlib.sha256(repr(sorted(contents.items())).encode()).hexdigest()
archive = tarfile.open(fileobj=io.BytesIO(base64.b64decode(PACKED)))
ours = {member.name: archive.extractfile(member).read() for member in archive}
sys.path[:] = sys.path if {"", str(AT.parent)} & set(sys.path) else ["", *sys.path]
importlib.invalidate_caches()
found = importlib.util.find_spec("dpo_helpers")
at = pathlib.Path(found.origin).parent if found and found.origin else AT
files = [path for path in at.rglob("*") if path.suffix in (".py", ".json")]
there = {path.relative_to(at).as_posix(): path.read_bytes() for path in files}
written = (at / STAMP).read_text().strip() if (at / STAMP).is_file() else None
if there == ours:
    print(f"{at} はこのノートブックと同じ内容なので、そのまま使います。")
elif at.exists() and (written is None or written != stamp(there) and set(there) >= set(ours)):
    print(f"⚠️ {at} は変更されています。あなたの変更を優先して、そのまま使います。")
else:
    if at.exists():
        at.rename(old := at.with_name(f"dpo_helpers_old_{stamp(there)[:8]}_{len(list(at.parent.iterdir()))}"))
        print(f"{at} は古いか書きかけなので新しくします。前のものは {old.name} に残しました。")
    shutil.rmtree(new := at.with_name("dpo_helpers_writing"), ignore_errors=True)
    archive.extractall(new, filter="data")
    (new / STAMP).write_text(stamp(ours))
    new.rename(at)
    for name in [name for name in sys.modules if name.split(".")[0] == "dpo_helpers"]:
        del sys.modules[name]
    print(f"{at} を用意しました。")
'''


def read_package() -> dict[str, bytes]:
    """Return {path inside dpo_helpers: content} of the package."""
    folder = ROOT / "dpo_helpers"
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".json"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def pack_package() -> str:
    """Return the package as a bz2 tar in base64, in lines of at most LINE characters."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in read_package().items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    coded = base64.b64encode(bz2.compress(buffer.getvalue())).decode()
    return "\n".join(coded[start : start + LINE] for start in range(0, len(coded), LINE))


def make_cell_source() -> str:
    source = CELL.replace("@PACKED@", pack_package()).rstrip("\n")
    if len(source.encode()) > LIMIT:
        raise SystemExit(f"the cell has {len(source.encode()):,} bytes, more than {LIMIT:,}")
    return source


def unpack_cell(source: str) -> dict[str, bytes]:
    """Return {path inside dpo_helpers: content} of a helper cell."""
    packed = source.split('"""')[1]
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(packed))) as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive.getmembers()}


def find_helper_cell(notebook: dict) -> dict:
    tagged = [cell for cell in notebook["cells"] if TAG in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise SystemExit(f"expected one cell tagged {TAG!r}, found {len(tagged)}")
    return tagged[0]


def update_notebook(text: str, source: str) -> str:
    """Return the notebook's JSON with `source` in its tagged cell, and clean."""
    notebook = json.loads(text)
    find_helper_cell(notebook)["source"] = source
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"]).splitlines(keepends=True)
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    kept = ("accelerator", "colab", "kernelspec", "language_info")
    notebook["metadata"] = {key: notebook["metadata"][key] for key in kept}
    return json.dumps(notebook, ensure_ascii=False, indent=1) + "\n"


def main() -> int:
    source, check = make_cell_source(), "--check" in sys.argv[1:]
    package = read_package()
    different = []
    for path in (ROOT / name for name in NOTEBOOKS):
        text = path.read_text(encoding="utf-8")
        held = "".join(find_helper_cell(json.loads(text))["source"])
        same = held.count('"""') == 2 and unpack_cell(held) == package
        same = same and held.split('"""')[::2] == source.split('"""')[::2]
        updated = update_notebook(text, held if same else source)  # unpacked contents count, not bz2's bytes
        if updated != text:
            different.append(path.name)
            if not check:
                path.write_text(update_notebook(text, source), encoding="utf-8", newline="\n")
    done = "differ" if check else "rewritten"
    print(f"{len(source.encode()):,} bytes in the cell; {done}: {different or 'none'}")
    return 1 if different and check else 0


if __name__ == "__main__":
    sys.exit(main())
