"""Finds what contradicts what among the installed packages, and plans the smallest cures; changes nothing.

All but `snapshot_packages` is pure. Whether the libraries really run is asked in `runtime`.
"""

import importlib.metadata
from dataclasses import dataclass, field
from functools import cache

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

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
    "sacrebleu>=2.4,<3",
)
# What a library checks only in its code, if that is installed at all: peft refuses any LoRA beside an old
# torchao.
UNDECLARED = (("peft>=0.19", "torchao>=0.16"),)
# Moving one of these costs gigabytes or the running session; all that google-colab pins is added to them.
UNTOUCHABLE = {"torch", "torchvision", "torchaudio", "triton", "numpy", "pandas", "pip", "google-colab"}


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

    `kind` is "ours" (touches what we use), "not ours", or "noise" (a stranger lacks a package, as images
    ship).
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
        name = canonicalize_name(
            (metadata and metadata.get("Name")) or ""
        )  # "" in what a killed pip leaves behind
        if name and name not in packages:
            packages[name] = Package(
                name, metadata.get("Version") or "", tuple(metadata.get_all("Requires-Dist") or ())
            )
    return add_undeclared(packages)


def add_undeclared(packages: Packages) -> Packages:
    """Give packages the requirements that only their code knows."""
    packages = dict(packages)
    for asking, line in UNDECLARED:
        package = packages.get(Requirement(asking).name)
        if package and Requirement(line).name in packages and fits(Requirement(asking), package.version):
            packages[package.name] = Package(package.name, package.version, (*package.requires, line))
    return packages


@cache
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


def active_requirements(
    package: Package, extras: frozenset[str] = frozenset()
) -> list[tuple[str, Requirement]]:
    """(name, requirement) of all that count on this machine, with these extras asked for."""
    lines = (
        line for line in package.requires if extras or "extra ==" not in line
    )  # evaluating markers is slow
    found = [requirement for line in lines if (requirement := parse_requirement(line))]
    environments = [{"extra": extra} for extra in extras or {""}]
    return [
        (canonicalize_name(r.name), r)
        for r in found
        if not r.marker or any(map(r.marker.evaluate, environments))
    ]


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
            waiting += (
                [r for _, r in active_requirements(packages[node[0]], node[1])] if node[0] in packages else []
            )
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
    return sorted(
        conflicts, key=lambda c: (("ours", "not ours", "noise").index(c.kind), c.package, c.required)
    )


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
        components = [group for group in components if group not in touching] + [
            [c for group in touching for c in group] + [conflict]
        ]
    return components


def make_ladder(
    conflicts: list[Conflict], packages: Packages, wanted: tuple[str, ...] = REQUIREMENTS
) -> list[Step]:
    """The tries for one component, each freeing more than the one before; the first success wins.

    What moves keeps at least its X.Y: else the "smallest" repair of fastai 2.7 is fastai 2.1.
    """
    closure, untouchable = find_closure(packages, wanted), find_untouchable(packages)
    users: dict[str, set[str]] = {}
    for package in packages.values():
        for name in required_names(package) & set(packages):
            users.setdefault(name, set()).add(package.name)

    def floors(names: set[str]) -> dict[str, str]:
        return {
            n: ">=" + ".".join(map(str, Version(packages[n].version).release[:2]))
            for n in names
            if n in packages
        }

    # What our own libraries ask for moves to suit them; any other complainer moves to suit what is there.
    targets, freed, complainers = set(), {}, {conflict.package for conflict in conflicts}
    outsiders = complainers - closure - untouchable - {PROJECT}
    for conflict in conflicts:
        own_complaint = conflict.package in closure | {PROJECT}
        if (own_complaint or conflict.found is None) and conflict.required not in untouchable:
            targets.add(conflict.requirement)
            freed[conflict.required] = ""
        elif conflict.package not in untouchable | {PROJECT}:
            targets.add(conflict.package)
            freed = floors({conflict.package}) | freed
    private = set(freed)  # and what only they use, such as fastcore for fastai
    while more := {name for name, asking in users.items() if asking <= private} - private - untouchable:
        private |= more
    ends = {
        name: ""
        for conflict in conflicts
        for name in (conflict.package, conflict.required)
        if name in packages
    }
    # For a stranger's sake only our own libraries move; for our own also what they stand on.
    own = (
        {canonicalize_name(Requirement(line).name) for line in wanted}
        if len(outsiders) == len(complainers)
        else closure
    )
    rungs = [freed, floors(private) | freed, floors(private | own) | ends | freed]
    steps: list[Step] = []
    for rung in rungs if targets else []:
        if not steps or set(rung) - untouchable != set(steps[-1].freed):
            steps.append(
                Step(tuple(sorted(targets)), {n: bound for n, bound in rung.items() if n not in untouchable})
            )
    return steps + ([Step((), {}, tuple(sorted(outsiders)))] if outsiders else [])


def find_guards(step: Step, packages: Packages) -> list[str]:
    """Held packages that use a freed one, to be named beside the targets: pip looks only where its arguments
    lead.

    Those that lead to a conflict of their own are left out: pip would set out to cure that as well.
    """
    complaining = {conflict.package for conflict in find_conflicts(packages)}
    users = [p for p in packages.values() if p.name not in step.freed and required_names(p) & set(step.freed)]
    return [f"{p.name}=={p.version}" for p in users if not find_closure(packages, (p.name,)) & complaining]


def make_constraints(step: Step, packages: Packages) -> list[str]:
    """Every installed version held where it is, but for what the step frees."""
    lines = [name + step.freed.get(name, f"=={package.version}") for name, package in packages.items()]
    return [line for line in lines if line not in step.freed and parse_requirement(line)]


def list_changes(before: Packages, after: Packages) -> dict[str, tuple[str | None, str | None]]:
    """name → (old version, new version) of what differs; None: not installed."""
    old, new = ({name: package.version for name, package in snapshot.items()} for snapshot in (before, after))
    return {
        name: (old.get(name), new.get(name))
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    }


def explain_change(name: str, old: str | None, after: Packages, requirements: tuple[str, ...]) -> str:
    """Why a package was added or moved: who asks for what it was not."""
    for package in (Package(PROJECT, "", requirements), *after.values()):
        for required, requirement in active_requirements(package):
            if required == name and not (old and fits(requirement, old)):
                asker = "このノート" if package.name == PROJECT else f"{package.name} {package.version} "
                return f"{asker}が使うため（{requirement.specifier or 'どの版でも'}）"
    return "ほかと版を合わせるため"
