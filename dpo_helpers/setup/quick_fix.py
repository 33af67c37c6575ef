"""The doctor: finds what is really broken in this environment, and repairs that and nothing else."""

import contextlib
import importlib.metadata
import json
import re
import sys
from dataclasses import asdict, dataclass, replace

from dpo_helpers.errors import UserError
from dpo_helpers.setup.conflicts import (
    PROJECT,
    REQUIREMENTS,
    Conflict,
    Packages,
    find_closure,
    find_conflicts,
    find_untouchable,
    list_changes,
    snapshot_packages,
    split_components,
)
from dpo_helpers.setup.packages import FRESH_RUNTIME, check_may_install, cure, format_table, restore, run_pip
from dpo_helpers.setup.runtime import find_stale_modules, report_restart, run_trial


@dataclass(frozen=True)
class Diagnosis:
    """Unmet requirements, packages without their files, the trial's report (None: not run), replaced
    modules.
    """

    conflicts: list[Conflict]
    incomplete: list[str]
    trial: dict | None
    stale: list[str]

    @property
    def ours(self) -> list[Conflict]:
        return [conflict for conflict in self.conflicts if conflict.kind == "ours"]

    @property
    def torch_replaced(self) -> bool:
        """torch no longer matches its kin, which are built for one exact torch: no repair from inside."""
        kin = ("torchvision", "torchaudio")
        return (
            any(c.package in kin and c.required == "torch" for c in self.ours) or "torch" in self.incomplete
        )

    @property
    def exit_code(self) -> int:
        """0 healthy, 1 broken, 2 nothing broken but the kernel must restart."""
        broken = self.ours or self.incomplete or (self.trial and self.trial["failed"])
        return 1 if broken else 2 if self.stale else 0


def find_incomplete(names: set[str]) -> list[str]:
    """Installed distributions of which a listed Python file is gone, as after an interrupted pip."""
    incomplete = []
    for name in sorted(names):
        files = importlib.metadata.distribution(name).files or ()
        if not all(file.locate().exists() for file in files if file.suffix == ".py"):
            incomplete.append(name)
    return incomplete


def read_complaint(trial: dict, packages: Packages) -> list[Conflict]:
    """The conflict that only a library's error message tells, as peft's does about torchao."""
    pattern = r"incompatible version of (\S+?)\.? Found version .*only versions (?:above )?`?(\d[\w.]*\w)"
    found = re.search(pattern, trial["error"])
    if not found or found[1] not in packages:
        return []
    return [Conflict(PROJECT, f"{found[1]}>={found[2]}", found[1], packages[found[1]].version, "ours")]


def diagnose(metadata_only: bool = False) -> Diagnosis:
    """Look, and change nothing; `metadata_only` leaves out the trial."""
    packages, trial = snapshot_packages(), None
    conflicts = find_conflicts(packages)
    if not metadata_only:
        print("新しい Python で、小さなモデルの学習を 1 ステップ試しています…", flush=True)
        trial = run_trial()
        known = {conflict.required for conflict in conflicts}
        conflicts = [c for c in read_complaint(trial, packages) if c.required not in known] + conflicts
    return Diagnosis(
        conflicts, find_incomplete(find_closure(packages) & set(packages)), trial, find_stale_modules()
    )


def explain(conflict: Conflict, packages: Packages) -> tuple[str, str, str, str]:
    """One row of the table: what, who complains, what it means for the reader, what QUICK_FIX would do."""
    who = (
        "このノート"
        if conflict.package == PROJECT
        else f"{conflict.package} {packages[conflict.package].version}"
    )
    found = (f"{conflict.required} {conflict.found or '（なし）'}", f"{who}: {conflict.requirement}")
    if conflict.kind != "ours":
        return (*found, "このノートには関係しません", "何もしません")
    untouchable, moved = find_untouchable(packages), conflict.required
    meaning = "学習が動かないおそれがあります"
    if conflict.package not in find_closure(packages) | {PROJECT}:
        meaning, moved = f"学習は動きます。{conflict.package} だけが困ります", conflict.package
    elif moved in untouchable:
        moved = conflict.package
    elif moved == "matplotlib-fontja":
        meaning = "グラフの日本語が読めません"
    return (
        *found,
        meaning,
        "直せません"
        if moved in untouchable | {PROJECT}
        else f"{moved} を{'合う版にします' if moved in packages else '入れます'}",
    )


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """Print the table of findings and what follows from them."""
    packages, trial = snapshot_packages(), diagnosis.trial
    if trial:
        print(
            f"試し学習: 「{trial['failed']}」で失敗しました。\n  {trial['error'][:300]}"
            if trial["failed"]
            else f"試し学習: 成功しました（GPU: {trial['cuda'] or 'なし'}）。"
        )
    rows = [explain(conflict, packages) for conflict in diagnosis.conflicts if conflict.kind != "noise"]
    rows += [
        (name, "ファイルが欠けています", "学習が動きません", "同じ版を入れ直します")
        for name in diagnosis.incomplete
    ]
    if rows:
        print(format_table(("何が", "どこからの要求", "あなたへの影響", "QUICK_FIX がすること"), *rows))
    noise = [f"{c.package} の {c.required}" for c in diagnosis.conflicts if c.kind == "noise"]
    if noise:
        print(f"無害なもの（もとから入っていないだけ。何もしません）: {'、'.join(noise)}")
    if diagnosis.torch_replaced:
        print(f"診断: torch が入れ替わっているか、欠けています。ここからは直せません。\n{FRESH_RUNTIME}")
    elif diagnosis.exit_code != 1:
        print("診断: 健康です。このまま学習できます。")
    elif diagnosis.ours or diagnosis.incomplete:
        print("診断: 直すところがあります。")
    else:
        print(f"診断: 試し学習の失敗の原因が、パッケージの情報からは分かりません。\n{FRESH_RUNTIME}")


def is_worse(before: dict | None, after: dict | None) -> bool:
    """Whether the trial comes less far than before, or the GPU no longer answers."""
    if not before or not after:
        return False
    return len(after["passed"]) < len(before["passed"]) or bool(before["cuda"] and not after["cuda"])


def repair_environment(diagnosis: Diagnosis, metadata_only: bool = False) -> Diagnosis:
    """Cure what can be cured, look again, and undo everything if anything got worse."""
    before = snapshot_packages()
    if diagnosis.exit_code != 1 or diagnosis.torch_replaced:
        print("QUICK_FIX は何も変更しませんでした。")
        return diagnosis
    check_may_install(before)
    for name in diagnosis.incomplete:
        command = ("install", "--force-reinstall", "--no-deps", f"{name}=={before[name].version}")
        print("$ pip " + " ".join(command))
        if words := run_pip(*command, label="入れ直しています"):
            print(f"{name} を入れ直せませんでした。理由:\n{words}")
    for component in split_components(diagnosis.ours):
        if words := cure(component, REQUIREMENTS, "修復しています"):
            print(
                "直せませんでした（元のままです）"
                f": {', '.join(c.requirement for c in component)}。理由:\n{words}"
            )
    changes = list_changes(before, snapshot_packages())
    after = diagnose(metadata_only)
    if changes and is_worse(diagnosis.trial, after.trial):
        print("修復の前より悪くなりました。")
        restore(before)
        print(f"元に戻しました。{FRESH_RUNTIME}")
        return diagnosis
    for name, (old, new) in changes.items():
        print(f"  {name}: {old or 'なし'} → {new or '削除'}")
    print_diagnosis(after)
    if after.exit_code == 1:
        print(
            "QUICK_FIX では直せないものが残りました。学習が動かないときは、"
            f"次のようにしてください。\n{FRESH_RUNTIME}"
        )
    return replace(after, stale=find_stale_modules(changes))


def quick_fix(repair: bool = False, auto_restart: bool = False, metadata_only: bool = False) -> Diagnosis:
    """The notebook's cell: diagnose, print the table, and with `repair` cure what is broken."""
    diagnosis = diagnose(metadata_only)
    print_diagnosis(diagnosis)
    if repair:
        diagnosis = repair_environment(diagnosis, metadata_only)
    elif diagnosis.exit_code == 1 and not diagnosis.torch_replaced:
        print(
            "QUICK_FIX = True でこのセルをもう一度実行すると（端末では doctor --fix）、表のとおりに直します。"
        )
    if diagnosis.stale or diagnosis.exit_code != 1:
        report_restart(diagnosis.stale, auto_restart)
    return diagnosis


def run_doctor(args) -> int:
    """`python -m dpo_helpers doctor`: 0 healthy, 1 broken or not allowed to touch it, 2 restart needed."""
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        try:
            diagnosis = quick_fix(args.fix, metadata_only=args.metadata_only)
        except UserError as error:
            print(f"⚠️ {error}", file=sys.stderr)
            return 1
    if args.json:
        facts = {
            **asdict(diagnosis),
            "torch_replaced": diagnosis.torch_replaced,
            "exit_code": diagnosis.exit_code,
        }
        print(json.dumps(facts, ensure_ascii=False, indent=2))
    return diagnosis.exit_code
