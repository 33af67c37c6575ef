"""Finds what contradicts what among the installed packages, and cures it by moving as little as possible.

Whether the libraries really run is asked in `runtime`, not here. Down to `make_ladder` all is pure.
"""

import importlib.metadata
import subprocess
import sys
import tempfile
import time
import unicodedata
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from dpo_helpers.config import UserError
from dpo_helpers.runtime import Changes, find_stale_modules, report_restart

PROJECT = "dpo_helpers"  # who complains when one of REQUIREMENTS is not met
# 0.29.1 is the last trl that Colab's datasets 4.0 satisfies.
REQUIREMENTS = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "accelerate",
    "trl>=0.29.1,<2",
    "matplotlib-fontja>=1.1,<2",
)
# What a library checks only in its code, if that is installed at all: peft refuses any LoRA beside an old torchao.
UNDECLARED = (("peft>=0.19", "torchao>=0.16"),)
# Moving one of these costs gigabytes or the running session; all that google-colab pins is added to them.
UNTOUCHABLE = {"torch", "torchvision", "torchaudio", "triton", "numpy", "pandas", "pip", "google-colab"}
FRESH_RUNTIME = (
    "Colab では「ランタイム → ランタイムを接続解除して削除」を選び、新しいランタイムで最初のセルから実行してください。"
    "手元の PC では仮想環境を作り直してください。"
)


@dataclass(frozen=True)
class Package:
    """One distribution as plain values: importlib.metadata answers None once pip has replaced the files."""

    name: str
    version: str
    requires: tuple[str, ...] = ()


Packages = dict[str, Package]


@dataclass(frozen=True)
class Conflict:
    """`package` asks for `requirement`, but `found` is installed (None: nothing).

    `kind` is "ours" (touches what we use), "not ours", or "noise" (a stranger lacks a package, as images ship).
    """

    package: str
    requirement: str
    required: str
    found: str | None
    kind: str


@dataclass(frozen=True)
class Step:
    """One try: what pip is asked for, what may move (name → constraint, "" for none), what is removed."""

    targets: tuple[str, ...]
    freed: dict[str, str] = field(default_factory=dict)
    uninstall: tuple[str, ...] = ()


def snapshot_packages() -> Packages:
    """Read every installed distribution; of two copies on sys.path the first wins, as on import."""
    packages = {}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata
        name = canonicalize_name(metadata and metadata.get("Name") or "")  # "" in what a killed pip leaves behind
        if name and name not in packages:
            packages[name] = Package(name, metadata.get("Version", ""), tuple(metadata.get_all("Requires-Dist") or ()))
    return add_undeclared(packages)


def add_undeclared(packages: Packages) -> Packages:
    """Give packages the requirements that only their code knows."""
    packages = dict(packages)
    for asking, line in UNDECLARED:
        package = packages.get(Requirement(asking).name)
        if package and Requirement(line).name in packages and fits(Requirement(asking), package.version):
            packages[package.name] = Package(package.name, package.version, (*package.requires, line))
    return packages


@lru_cache(maxsize=None)
def parse_requirement(line: str) -> Requirement | None:
    """None for a line older than the standard, which pip passes over as well."""
    try:
        return Requirement(line)
    except InvalidRequirement:
        return None


def fits(requirement: Requirement, version: str) -> bool:
    """Whether an installed version satisfies a requirement, judged as `pip check` does."""
    try:
        return requirement.specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:  # Debian's own; pip does not judge them either
        return True


def active_requirements(package: Package, extras: frozenset[str] = frozenset()) -> list[tuple[str, Requirement]]:
    """(name, requirement) of all that count on this machine, with these extras asked for."""
    lines = (line for line in package.requires if extras or "extra ==" not in line)  # evaluating markers is slow
    found = [requirement for line in lines if (requirement := parse_requirement(line))]
    environments = [{"extra": extra} for extra in extras or {""}]
    return [(canonicalize_name(r.name), r) for r in found if not r.marker or any(map(r.marker.evaluate, environments))]


def required_names(package: Package) -> set[str]:
    return {name for name, _ in active_requirements(package)}


def find_closure(packages: Packages, requirements: tuple[str, ...] = REQUIREMENTS) -> set[str]:
    """The names of everything that these requirements lead to, installed or not."""
    seen, waiting = set(), list(map(Requirement, requirements))
    while waiting:
        requirement = waiting.pop()
        node = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if node not in seen:
            seen.add(node)
            waiting += [r for _, r in active_requirements(packages[node[0]], node[1])] if node[0] in packages else []
    return {name for name, _ in seen}


def find_conflicts(packages: Packages, requirements: tuple[str, ...] = REQUIREMENTS) -> list[Conflict]:
    """Every unmet requirement of the installed packages and of this project, ours first."""
    closure, conflicts = find_closure(packages, requirements), []
    for package in (Package(PROJECT, "", requirements), *packages.values()):
        for name, requirement in active_requirements(package):
            found = packages[name].version if name in packages else None
            if found is None or not fits(requirement, found):
                ours = package.name in closure | {PROJECT} or name in closure
                kind = "ours" if ours else "noise" if found is None else "not ours"
                conflicts.append(Conflict(package.name, f"{name}{requirement.specifier}", name, found, kind))
    return sorted(conflicts, key=lambda c: (("ours", "not ours", "noise").index(c.kind), c.package, c.required))


def find_new_conflicts(before: list[Conflict], after: list[Conflict]) -> list[Conflict]:
    """Complaints that were not there before; one that only changed its version is not new."""
    known = {(conflict.package, conflict.required) for conflict in before}
    return [conflict for conflict in after if (conflict.package, conflict.required) not in known]


def find_untouchable(packages: Packages) -> set[str]:
    """What never moves: torch and its kin, numpy, pandas, GPU libraries, and all that google-colab pins."""
    colab = packages.get("google-colab", Package("", ""))
    pinned = {name for name, requirement in active_requirements(colab) if "==" in str(requirement.specifier)}
    return UNTOUCHABLE | pinned | {name for name in packages if name.startswith(("nvidia-", "cuda-"))}


def split_components(conflicts: list[Conflict]) -> list[list[Conflict]]:
    """Group conflicts that share a package, so that a hopeless group does not keep another broken."""
    components: list[list[Conflict]] = []
    for conflict in conflicts:
        names = {conflict.package, conflict.required} - {PROJECT}
        touching = [group for group in components if any(names & {c.package, c.required} for c in group)]
        components = [group for group in components if group not in touching] + [sum(touching, []) + [conflict]]
    return components


def make_ladder(conflicts: list[Conflict], packages: Packages, wanted: tuple[str, ...] = REQUIREMENTS) -> list[Step]:
    """The tries for one component, each freeing more than the one before; the first success wins.

    What moves keeps at least its X.Y: else the "smallest" repair of fastai 2.7 is fastai 2.1.
    """
    closure, untouchable = find_closure(packages, wanted), find_untouchable(packages)
    users: dict[str, set[str]] = {}
    for package in packages.values():
        for name in required_names(package) & set(packages):
            users.setdefault(name, set()).add(package.name)

    def floors(names: set[str]) -> dict[str, str]:
        return {n: ">=" + ".".join(map(str, Version(packages[n].version).release[:2])) for n in names if n in packages}

    # What our own libraries ask for moves to suit them; any other complainer moves to suit what is there.
    targets, freed, outsiders = set(), {}, set()
    for conflict in conflicts:
        own_complaint = conflict.package in closure | {PROJECT}
        if (own_complaint or conflict.found is None) and conflict.required not in untouchable:
            targets.add(conflict.requirement)
            freed[conflict.required] = ""
        elif conflict.package not in untouchable | {PROJECT}:
            targets.add(conflict.package)
            freed = floors({conflict.package}) | freed
        if not own_complaint and conflict.package not in untouchable:
            outsiders.add(conflict.package)
    private = set(freed)  # and what only they use, such as fastcore for fastai
    while more := {name for name, asking in users.items() if asking <= private} - private - untouchable:
        private |= more
    ends = {name: "" for conflict in conflicts for name in (conflict.package, conflict.required) if name in packages}
    own = {canonicalize_name(Requirement(line).name) for line in wanted}
    rungs = [freed, floors(private) | freed, floors(private | own) | ends | freed, floors(private | closure) | ends | freed]
    steps: list[Step] = []
    for rung in rungs if targets else []:
        if not steps or set(rung) - untouchable != set(steps[-1].freed):
            steps.append(Step(tuple(sorted(targets)), {n: bound for n, bound in rung.items() if n not in untouchable}))
    return steps + ([Step((), {}, tuple(sorted(outsiders)))] if outsiders else [])


def find_guards(step: Step, packages: Packages) -> list[str]:
    """Held packages that use a freed one. Named beside the targets, they are respected by pip's resolver,
    which looks at nothing that the targets do not lead to. Not those that lead to a conflict: pip would move it."""
    complaining = {conflict.package for conflict in find_conflicts(packages)}
    users = [p for p in packages.values() if p.name not in step.freed and required_names(p) & set(step.freed)]
    return [f"{p.name}=={p.version}" for p in users if not find_closure(packages, (p.name,)) & complaining]


def list_changes(before: Packages, after: Packages) -> Changes:
    """What differs between two snapshots, by name."""
    pairs = {name: tuple(name in s and s[name].version or None for s in (before, after)) for name in sorted({*before, *after})}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def format_table(*rows: tuple[str, ...]) -> str:
    """A plain table, the first row its header; columns stay straight with Japanese, two columns each."""
    spare = [[sum(unicodedata.east_asian_width(c) in "WF" for c in cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) + extra[i] for row, extra in zip(rows, spare)) for i in range(len(rows[0]))]
    lines = [" | ".join(c.ljust(w - e) for c, w, e in zip(row, widths, extra)).rstrip() for row, extra in zip(rows, spare)]
    return "\n".join([lines[0], "-" * (sum(widths) + 3 * len(widths) - 3), *lines[1:]])


def check_may_install(packages: Packages) -> None:
    """Raise UserError where pip would change a system Python, or would have to choose a torch."""
    virtual = sys.prefix != sys.base_prefix or (Path(sys.prefix) / "conda-meta").is_dir()
    if not virtual and "google-colab" not in packages:
        raise UserError(
            "いまの Python は仮想環境ではないので、パッケージには触れません。\n"
            "python -m venv .venv で仮想環境を作り、その Python でもう一度実行してください。"
        )
    if "torch" not in packages:
        raise UserError(f"torch（PyTorch）がありません。GPU に合う版を自動では選べないので、何も変更しませんでした。\n{FRESH_RUNTIME}")


def run_pip(*arguments: str, label: str) -> str | None:
    """Run pip with a line that shows it is alive; None on success, else its own last words.

    pip resolves before it installs: after a failed resolution nothing has changed.
    """
    command, start = [sys.executable, "-m", "pip", *arguments, "--no-input", "--disable-pip-version-check"], time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            try:
                process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                print(f"\r{label}（pip、{time.monotonic() - start:.0f} 秒）", end="", flush=True)
            except KeyboardInterrupt:  # pip was interrupted as well; it must finish putting its files back
                process.wait()
                raise
        print(f"\r{label}（pip、{time.monotonic() - start:.0f} 秒で{'失敗' if process.returncode else '終了'}）")
        log.seek(0)
        return "".join(log.readlines()[-12:]).strip() or "（なし）" if process.returncode else None


def run_step(step: Step, packages: Packages, label: str) -> str | None:
    """Show and carry out one step, with every version that it does not free held where it is; as `run_pip`."""
    if step.uninstall:
        print(f"$ pip uninstall --yes {' '.join(step.uninstall)}（ほかに方法がないので取り除きます）")
        return run_pip("uninstall", "--yes", *step.uninstall, label=label)
    bounds = [f"{name}{step.freed.get(name, '==' + package.version)}" for name, package in packages.items()]
    names = sorted(step.freed)[:6] + ([f"ほか {len(step.freed) - 6} 個"] if len(step.freed) > 6 else [])
    print(f"$ pip install -c constraints.txt -r keep.txt {' '.join(map(repr, step.targets))}（動いてよいもの: {', '.join(names)}）")
    with tempfile.TemporaryDirectory() as folder:
        constraints, keep = Path(folder, "constraints.txt"), Path(folder, "keep.txt")
        constraints.write_text("\n".join(bound for bound in bounds if bound not in step.freed), encoding="utf-8")
        keep.write_text("\n".join(find_guards(step, packages)), encoding="utf-8")
        return run_pip("install", "-c", str(constraints), "-r", str(keep), *step.targets, label=label)


def restore(before: Packages) -> None:
    """Put the former versions back, exactly; UserError if pip cannot."""
    changes = list_changes(before, snapshot_packages())
    old = [f"{name}=={pair[0]}" for name, pair in changes.items() if pair[0]]
    added = [name for name, pair in changes.items() if not pair[0]]
    print(f"元の版に戻します: {', '.join(old + [f'{name}（削除）' for name in added])}")
    words = run_pip("install", "--no-deps", *old, label="戻しています") if old else None
    words = words or (run_pip("uninstall", "--yes", *added, label="戻しています") if added else None)
    if words or list_changes(before, snapshot_packages()):
        raise UserError(f"元の版に戻せませんでした。{FRESH_RUNTIME}\npip の言葉: {words}")


def cure(conflicts: list[Conflict], wanted: tuple[str, ...], label: str) -> str | None:
    """Climb the ladder until these conflicts are gone and none is new; else all is as it was, and why is returned."""
    before, words = snapshot_packages(), "直せるものがありません"
    known = find_conflicts(before, wanted)
    for step in make_ladder(conflicts, before, wanted):
        words = run_step(step, before, label)
        if words is None:
            after = find_conflicts(snapshot_packages(), wanted)
            left = len(conflicts) - len(find_new_conflicts(after, conflicts))
            if not left and not find_new_conflicts(known, after):
                return None
            words = "入れても衝突が残るか、新しい衝突が出ます。"
            restore(before)
    return words


def explain_change(name: str, old: str | None, after: Packages, wanted: tuple[str, ...]) -> str:
    """Why a package was added or moved: who asks for what it was not."""
    for package in (Package(PROJECT, "", wanted), *after.values()):
        for required, requirement in active_requirements(package):
            if required == name and not (old and fits(requirement, old)):
                asker = "このノート" if package.name == PROJECT else f" {package.name} {package.version} "
                return f"{asker}が使うため（{requirement.specifier or 'どの版でも'}）".strip()
    return "ほかと版を合わせるため"


def install_missing(requirements: tuple[str, ...] = (), auto_restart: bool = False) -> bool:
    """Install what this project needs and is not there, moving nothing else; True if a restart is needed.

    `requirements` come on top of REQUIREMENTS. Raises UserError with pip's last words if no try succeeds.
    """
    wanted, before = (*REQUIREMENTS, *requirements), snapshot_packages()
    hidden = {Requirement(line).name for _, line in UNDECLARED}
    unmet = [c for c in find_conflicts(before, wanted) if c.package == PROJECT or c.required in hidden]
    if not unmet:
        print("必要なパッケージはそろっています。何も変更しませんでした。")
        return report_restart(find_stale_modules(), auto_restart)
    check_may_install(before)
    words = cure(unmet, wanted, "足りないパッケージを入れています")
    if words:
        raise UserError(f"パッケージを入れられませんでした。環境は元のままです。QUICK_FIX のセルで診断できます。\npip の言葉: {words}")
    after = snapshot_packages()
    changes = list_changes(before, after)
    rows = [(n, old or "なし", new or "削除", explain_change(n, old, after, wanted)) for n, (old, new) in changes.items()]
    print(format_table(("パッケージ", "前", "後", "理由"), *rows))
    print("ほかのパッケージは動かしていません。新しい衝突はありません。")
    return report_restart(find_stale_modules(changes), auto_restart)
