"""Finds what the installed packages lack or contradict, plans the smallest cure, and has pip do exactly that.

Whether the libraries really run is not asked here but in `doctor`.
"""

import contextlib
import csv
import json
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from email.parser import BytesHeaderParser
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, Popen

from dpo_helpers.errors import UserError

try:
    from packaging import requirements, utils, version
except (ImportError, SyntaxError):  # half removed by an interrupted pip, which carries a copy of its own
    from pip._vendor.packaging import requirements, utils, version

PROJECT = "dpo_helpers"  # who complains when one of REQUIREMENTS is not met
# 0.29.1 is the last trl that Colab's datasets 4.0 satisfies; the other bounds are what it needs to run.
REQUIREMENTS = (
    *("torch", "transformers>=4.56.2", "peft>=0.18", "datasets>=3", "accelerate>=1.4", "trl>=0.29.1,<2"),
    *("matplotlib-fontja>=1.1,<2", "sacrebleu>=2.4,<3", "scipy>=1.14", "filelock>=3.16"),
)
IF_INSTALLED = "torchao>=0.16"  # peft refuses LoRA beside an older one, which only its code knows
HEAVY = re.compile(r"torch|torchvision|torchaudio|triton|(nvidia|cuda)-.*")  # gigabytes: these never move
FIXED = {PROJECT, "google-colab", "pip"}  # their complaints count, but they do not move
LOADED = {"numpy", "pandas"}  # the session has them in use: they move only if they are complained about
MODULES = {"pillow": "PIL", "pyyaml": "yaml"}  # what is imported by another name than it is installed
PIP = ("-P", "-m", "pip", "--timeout", "15", "--retries", "1", "--no-input", "--disable-pip-version-check")
FRESH_RUNTIME = (
    "Colab では「ランタイム → ランタイムを接続解除して削除」を選び、新しいランタイムで最初のセルから実行して"
    "ください。新しい版のランタイムで動かなくなったときは、「ランタイム → ランタイムのタイプを変更」の"
    "「ランタイムのバージョン」で前の版を選べます。手元の PC では仮想環境を作り直してください。"
)
NO_ANSWER = (
    "パッケージの配布元から返事がありません。インターネットへの接続を確かめて、もう一度実行してください。"
)


@dataclass(frozen=True)
class Package:
    """One distribution as plain values, for its files may be replaced a moment later.

    `info` is its folder of metadata; what is not `whole` is known only from what an interrupted pip left.
    """

    name: str
    version: str
    requires: tuple[requirements.Requirement, ...] = ()
    info: Path = Path()
    whole: bool = True


@dataclass(frozen=True)
class Conflict:
    """`package` asks for `requirement`, but `found` is installed (None: nothing); `ours` if we use either."""

    package: str
    requirement: str
    required: str
    found: str | None
    ours: bool


Packages = dict[str, Package]


def parse_requirements(lines) -> tuple[requirements.Requirement, ...]:
    """What counts on this machine, without extras; older lines than the standard are passed over."""
    found = []
    for line in lines:
        if "extra ==" not in line:  # evaluating markers is slow, and most of them are about extras
            with contextlib.suppress(requirements.InvalidRequirement):
                found.append(requirements.Requirement(line))
                found[-1].name = utils.canonicalize_name(found[-1].name)
    return tuple(r for r in found if not r.marker or r.marker.evaluate())


def read_package(info: Path) -> Package | None:
    """The package of one folder of metadata; None where not even the name can be told."""
    files = [file for file in (info / "METADATA", info / "PKG-INFO", info) if file.is_file()]
    told = BytesHeaderParser().parsebytes(files[0].read_bytes() if files else b"")
    left = info.name.startswith("~")  # pip renames what it is about to remove, until it can no longer fail
    if told["Name"] and told["Version"]:
        requires = parse_requirements(told.get_all("Requires-Dist") or ())
        return Package(utils.canonicalize_name(told["Name"]), told["Version"], requires, info, not left)
    name, _, number = info.stem.partition("-")
    return None if left or not number else Package(utils.canonicalize_name(name), number, (), info, False)


def find_packages() -> Packages:
    """Read every installed distribution; of two copies on sys.path the first wins, as on import."""
    infos = [info for folder in sys.path for info in sorted(Path(folder).glob("*.*-info"))]
    found = [package for info in reversed(infos) if (package := read_package(info))]
    return {package.name: package for package in sorted(found, key=lambda package: package.whole)}


def has_its_files(package: Package) -> bool:
    """Whether RECORD and every module in it are there, as they are not after an interrupted pip.

    RECORD is read here: importlib.metadata passes over the files that are gone, from Python 3.12 on.
    """
    record, by = package.info / "RECORD", package.info / "INSTALLER"
    if package.info.suffix == ".egg-info" or (by.is_file() and by.read_text().strip() not in ("pip", "uv")):
        return True  # Debian and conda leave RECORD out on purpose
    if not package.whole or not record.is_file():
        return False
    with record.open(encoding="utf-8", newline="") as lines:
        files = [Path(row[0]) for row in csv.reader(lines) if row]
    code = [file for file in files if file.suffix in (".py", ".so") and "tests" not in file.parts]
    return bool(files) and all((package.info.parent / file).exists() for file in code)


def find_incomplete(packages: Packages, wanted: tuple[str, ...] = REQUIREMENTS) -> list[str]:
    """What we use of which files are gone, and whatever an interrupted pip had taken away."""
    taken = {name for name, package in packages.items() if package.info.name.startswith("~")}
    ours = find_closure(packages, wanted) & set(packages)
    return sorted(taken | {name for name in ours if not has_its_files(packages[name])})


def find_leftovers() -> list[Path]:
    """The `~ame` folders and files of interrupted pips, in the folders that pip installs into."""
    folders = [Path(folder) for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    return sorted(path for folder in folders for path in folder.glob("~*"))


def fits(requirement: requirements.Requirement, package: Package) -> bool:
    """Whether an installed version satisfies a requirement, judged as `pip check` does."""
    try:
        return requirement.specifier.contains(version.Version(package.version), prereleases=True)
    except version.InvalidVersion:  # Debian's own; pip does not judge them either
        return True


def find_closure(packages: Packages, wanted: tuple[str, ...] = REQUIREMENTS) -> set[str]:
    """The names of everything that these requirements lead to, installed or not."""
    names, waiting = set(), list(parse_requirements(wanted))
    while waiting:
        name = waiting.pop().name
        if name not in names:
            names.add(name)
            waiting += packages[name].requires if name in packages else ()
    return names


def find_conflicts(packages: Packages, wanted: tuple[str, ...] = REQUIREMENTS) -> list[Conflict]:
    """Every unmet requirement of the installed packages and of this project, ours first."""
    closure, conflicts = find_closure(packages, wanted) | {PROJECT}, []
    project = Package(PROJECT, "", parse_requirements((*wanted, IF_INSTALLED)))
    for package in (project, *packages.values()):
        for r in package.requires:
            found = packages.get(r.name)
            if not fits(r, found) if found else str(r) != IF_INSTALLED:
                ours = package.name in closure or r.name in closure
                number = found.version if found else None
                conflicts.append(Conflict(package.name, f"{r.name}{r.specifier}", r.name, number, ours))
    return sorted(conflicts, key=lambda c: (not c.ours, c.package, c.required))


def choose_movable(conflicts: list[Conflict], packages: Packages, wanted: tuple[str, ...]) -> list[dict]:
    """What may move (name → its bound): both sides of conflicts, then what they ask for or are pinned by.

    Of these pip moves only what it must. A complainer keeps its X.Y at least: else the "smallest" repair of
    fastai 2.7 is fastai 2.1.
    """
    required = {conflict.required for conflict in conflicts}
    sides = required | ({conflict.package for conflict in conflicts} & set(packages))
    asked = {r.name for name in sides & set(packages) for r in packages[name].requires} & set(packages)
    asked -= LOADED | {r.name for r in parse_requirements(wanted)}
    pinned = {p.name for p in packages.values() for r in p.requires if r.name in sides and "==" in str(r)}

    def bound(name: str) -> str:
        known = re.match(r"\d+(\.\d+)?", packages[name].version) if name not in required | pinned else None
        return f">={known[0]}" if known else ""

    rungs = (sides - FIXED, (sides | asked | pinned) - FIXED)
    return [{name: bound(name) for name in rung if not HEAVY.fullmatch(name)} for rung in rungs]


def make_constraints(movable: dict[str, str], packages: Packages) -> list[str]:
    """Every version held where it is; for what may move, its bound and all that the held ones ask of it.

    What they ask for in vain already is not asked for again: then there would be no solution.
    """
    lines = [name + bound for name, bound in movable.items() if bound]
    for package in packages.values():
        if package.name not in movable:
            lines.append(f"{package.name}=={package.version}")
            asked = [r for r in package.requires if r.name in movable and r.specifier]
            met = [r for r in asked if r.name not in packages or fits(r, packages[r.name])]
            lines += [f"{r.name}{r.specifier}" for r in met]
    return [str(r) for r in parse_requirements(lines)]


def write_image(folder: Path, packages: Packages) -> None:
    """Write metadata of these packages without the demands, of extras too, that are not met even now.

    Ahead of the real ones on pip's path, they let it solve what is asked and nothing that is older.
    """
    for package in packages.values():
        info = folder / f"{package.name.replace('-', '_')}-{package.version}.dist-info"
        info.mkdir()
        met = [r for r in package.requires if r.name in packages and fits(r, packages[r.name])]
        lines = ["Metadata-Version: 2.1", f"Name: {package.name}", f"Version: {package.version}"]
        lines += [f"Requires-Dist: {r.name}{r.specifier}" for r in met]
        (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_pip(*arguments: str, image: str = "") -> str | None:
    """Run pip; None on success, else its own last words. An interruption ends it only while it moves nothing.

    It gets a session of its own, so that Ctrl-C is ours alone, and an empty folder, where no pip.py waits.
    """
    command = [sys.executable, *PIP, *arguments]
    path = os.pathsep.join(filter(None, (image, os.environ.get("PYTHONPATH"))))
    streams = {"stdin": DEVNULL, "stdout": PIPE, "stderr": STDOUT, "encoding": "utf-8", "errors": "replace"}
    interrupted, words = False, None
    with tempfile.TemporaryDirectory() as folder:
        own = {"cwd": folder, "env": {**os.environ, "PYTHONPATH": path}, "start_new_session": True}
        process = Popen(command, **own, **streams)
        while words is None:
            try:
                words, _ = process.communicate()
            except KeyboardInterrupt:
                interrupted = True
                if "--dry-run" in arguments:
                    process.terminate()
    if interrupted:
        raise KeyboardInterrupt
    if process.returncode and "Retrying" in words:
        raise UserError(NO_ANSWER)
    return words.strip()[-900:] or "（なし）" if process.returncode else None


def ask_pip(targets: set[str], movable: dict[str, str], packages: Packages) -> Packages | str:
    """What pip would install to meet these targets while nothing but `movable` moves; else its own words."""
    with tempfile.TemporaryDirectory() as folder:
        constraints, report = Path(folder, "constraints.txt"), Path(folder, "report.json")
        constraints.write_text("\n".join(make_constraints(movable, packages)), encoding="utf-8")
        write_image(Path(folder), {name: p for name, p in packages.items() if name not in movable})
        options = ("--dry-run", "--report", str(report), "--only-binary", ":all:", "-c", str(constraints))
        if words := run_pip("install", *options, *sorted(targets), image=folder):
            return words
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    plan = {}
    for told in (item["metadata"] for item in found):
        name, asked = utils.canonicalize_name(told["name"]), told.get("requires_dist", ())
        plan[name] = Package(name, told["version"], parse_requirements(asked))
    return plan


def make_plan(conflicts: list[Conflict], packages: Packages, wanted=REQUIREMENTS) -> tuple[Packages, str]:
    """The packages as they will be, without these conflicts or a new one; pip's words about what stays.

    One solution for all, so that nothing moves twice. Where there is none, each complained-about package is
    solved alone: a hopeless one keeps no other broken.
    """
    words, names = "", list(dict.fromkeys(conflict.required for conflict in conflicts))
    known = {(c.package, c.required) for c in find_conflicts(packages, wanted)}
    known -= {(c.package, c.required) for c in conflicts}
    for movable in choose_movable(conflicts, packages, wanted) if conflicts else ():
        targets = {c.package if c.package in movable else c.requirement for c in conflicts}
        # pip minds only what its targets lead to, so whoever may move and uses what may move is one of them.
        free = [packages[name] for name in movable if name in packages]
        targets |= {package.name for package in free if any(r.name in movable for r in package.requires)}
        found = ask_pip(targets, movable, packages) if movable else "動かしてよいパッケージがありません。"
        if isinstance(found, str):
            words = found
        elif {(c.package, c.required) for c in find_conflicts(packages | found, wanted)} <= known:
            return packages | found, ""
        else:
            words = "入れても食い違いが残るか、新しい食い違いが出ます。"
    for name in names if len(names) > 1 else ():
        alone = [conflict for conflict in conflicts if conflict.required == name]
        packages, left = make_plan(alone, packages, wanted)
        words = f"{name}: {left}" if left else words
    return packages, words


def list_moves(before: Packages, after: Packages, again: list[str] = ()) -> dict[str, str]:
    """name → the versions before and after of each package that moves or is installed `again`."""
    moves = {}
    for name in sorted(before | after):
        old, new = (state[name].version if name in state else "なし" for state in (before, after))
        if old != new or name in again:
            moves[name] = f"  {name}: {old} → {new}{'（入れ直し）' if old == new else ''}"
    return moves


def carry_out(before: Packages, after: Packages, again: list[str]) -> None:
    """Announce what will move or be installed `again`, do it, and say whether nothing else has moved."""
    moves = list_moves(before, after, again)
    print("次のとおりに変更します（ほかのパッケージは動かしません）。", *moves.values(), sep="\n", flush=True)
    for info in (before[name].info for name in moves if name in before and not has_its_files(before[name])):
        aside = info.with_name(f"~{info.name[1:]}")  # pip cannot remove what has no RECORD
        if aside != info:
            shutil.rmtree(aside, ignore_errors=True)
            info.rename(aside)
    install = [f"{name}=={after[name].version}" for name in moves if name in after]
    remove = [name for name in moves if name not in after]
    words = run_pip("install", "--no-deps", *install) if install else None
    words = words or (run_pip("uninstall", "--yes", *remove) if remove else None)
    if words:
        raise UserError(f"pip が失敗しました。{FRESH_RUNTIME}\npip の言葉: {words}")
    for path in find_leftovers():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    moved = list_moves(before, find_packages())
    if moved == list_moves(before, after):
        print("予告したとおりに変更しました。ほかのパッケージは動かしていません。")
    else:
        print("⚠️ 予告と違う動きがありました。実際に変わったもの:", *moved.values(), sep="\n")


@contextlib.contextmanager
def stoppable(before: Packages):
    """End an interruption in a sentence that says what has moved by then."""
    try:
        yield
    except KeyboardInterrupt:
        moved = "\n".join(list_moves(before, find_packages()).values()) or "  なし"
        raise UserError(f"止めました。もう一度実行すると続きから行います。変わったもの:\n{moved}") from None


def check_may_install(packages: Packages) -> None:
    """Raise UserError where pip would change a system Python, or would have to choose a torch."""
    virtual = sys.prefix != sys.base_prefix or Path(sys.prefix, "conda-meta").is_dir()
    if not virtual and "google-colab" not in packages:
        raise UserError(
            "いまの Python は仮想環境ではないので、パッケージには触れません。\n"
            "python -m venv .venv で仮想環境を作り、その Python でもう一度実行してください。"
        )
    if "torch" not in packages or not has_its_files(packages["torch"]):
        missing = "torch（PyTorch）がないか、欠けています。GPU に合う版を自動では選べません。"
        raise UserError(f"{missing}何も変更しませんでした。\n{FRESH_RUNTIME}")


def install_missing(requirements: tuple[str, ...] = (), auto_restart: bool = False) -> bool:
    """Install what this project needs and is not there, moving nothing else; True if a restart is needed.

    `requirements` come on top of REQUIREMENTS. UserError with pip's last words if that cannot be.
    """
    wanted, before = (*REQUIREMENTS, *requirements), find_packages()
    unmet = [conflict for conflict in find_conflicts(before, wanted) if conflict.package == PROJECT]
    incomplete = find_incomplete(before, wanted)
    if not unmet and not incomplete:
        print("必要なパッケージはそろっています。何も変更しませんでした。")
        return report_restart(find_stale(before, before), auto_restart)
    check_may_install(before)
    missing = [conflict.requirement for conflict in unmet] + incomplete
    print(f"足りないもの: {'、'.join(missing)}。入れ方を調べています（30 秒ほど）…", flush=True)
    with stoppable(before):
        after, words = make_plan(unmet, before, wanted)
        if words:
            words = f"{FRESH_RUNTIME}\npip の言葉: {words}"
            raise UserError(f"入れる方法がないので、何も変更しませんでした。{words}")
        carry_out(before, after, incomplete)
    return report_restart(find_stale(before, find_packages()), auto_restart)


def find_stale(before: Packages, now: Packages) -> list[str]:
    """What this process has imported in another version than the one now on disk.

    What moved since `before` is known; for what the user moved, the version of our loaded libraries tells.
    """
    stale, ours = [], find_closure(now)
    for package in now.values():
        module = sys.modules.get(MODULES.get(package.name, package.name.replace("-", "_")))
        moved = package.name in before and before[package.name].version != package.version
        # A module may say 2.13.0+cpu where its metadata says 2.13.0.
        loaded = str(vars(module or sys).get("__version__", "")).partition("+")[0]
        told = parse_requirements([f"{package.name}=={loaded}"]) if package.name in ours else ()
        if module and (moved or not all(fits(r, package) for r in told)):
            stale.append(package.name)
    return sorted(stale)


def report_restart(stale: list[str], auto_restart: bool = False) -> bool:
    """Say whether the kernel must restart and, if the user turned that on, restart it."""
    if not stale:
        print("再起動は必要ありません。")
        return False
    print(f"再起動が必要です: {', '.join(stale)} は読み込み済みですが、ディスク上の版が変わりました。")
    if not auto_restart:
        print("「ランタイム → セッションを再起動する」を選び、もう一度最初のセルから実行してください。")
        return True
    from IPython import get_ipython  # only in a notebook

    get_ipython().kernel.do_shutdown(True)  # the cell's output still arrives; with os.kill it does not
    # An error also cancels the cells that "run all" has queued: they would still start in the old kernel.
    raise UserError("自動で再起動しています。終わったら、もう一度最初のセルから実行してください。")
