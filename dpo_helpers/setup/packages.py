"""Runs pip so that nothing moves that need not: installs what is missing, cures conflicts, puts versions
back.
"""

import subprocess
import sys
import tempfile
import time
import unicodedata
from pathlib import Path

from packaging.requirements import Requirement

from dpo_helpers.errors import UserError
from dpo_helpers.setup.conflicts import (
    PROJECT,
    REQUIREMENTS,
    UNDECLARED,
    Conflict,
    Packages,
    Step,
    explain_change,
    find_conflicts,
    find_guards,
    find_new_conflicts,
    list_changes,
    make_constraints,
    make_ladder,
    snapshot_packages,
)
from dpo_helpers.setup.runtime import find_stale_modules, report_restart

FRESH_RUNTIME = (
    "Colab では「ランタイム → ランタイムを接続解除して削除」を選び、"
    "新しいランタイムで最初のセルから実行してください。"
    "手元の PC では仮想環境を作り直してください。"
)


def format_table(*rows: tuple[str, ...]) -> str:
    """A plain table, the first row its header; a Japanese character takes two columns."""

    def pad(cell: str, width: int) -> str:
        return cell + " " * (width - measure(cell))

    def measure(cell: str) -> int:
        return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in cell)

    widths = [max(map(measure, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(map(pad, row, widths)).rstrip() for row in rows]
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
        raise UserError(
            "torch（PyTorch）がありません。GPU に合う版を自動では選べないので、"
            f"何も変更しませんでした。\n{FRESH_RUNTIME}"
        )


def run_pip(*arguments: str, label: str) -> str | None:
    """Run pip with a line that shows it is alive; None on success, else its own last words.

    pip resolves before it installs: after a failed resolution nothing has changed.
    """
    command, start = (
        [sys.executable, "-m", "pip", *arguments, "--no-input", "--disable-pip-version-check"],
        time.monotonic(),
    )
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
        print(
            f"\r{label}（pip、{time.monotonic() - start:.0f} 秒で{'失敗' if process.returncode else '終了'}）"
        )
        log.seek(0)
        return "".join(log.readlines()[-12:]).strip() or "（なし）" if process.returncode else None


def run_step(step: Step, packages: Packages, label: str) -> str | None:
    """Show and carry out one step, with every version that it does not free held where it is; as
    `run_pip`.
    """
    if step.uninstall:
        print(f"$ pip uninstall --yes {' '.join(step.uninstall)}（ほかに方法がないので取り除きます）")
        return run_pip("uninstall", "--yes", *step.uninstall, label=label)
    movable = sorted(step.freed)[:6] + ([f"ほか {len(step.freed) - 6} 個"] if len(step.freed) > 6 else [])
    print(f"$ pip install -c constraints.txt -r keep.txt {' '.join(map(repr, step.targets))}")
    print(f"  （動いてよいのは {', '.join(movable)} だけで、ほかはいまの版のままです）")
    with tempfile.TemporaryDirectory() as folder:
        constraints, keep = Path(folder, "constraints.txt"), Path(folder, "keep.txt")
        constraints.write_text("\n".join(make_constraints(step, packages)), encoding="utf-8")
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


def cure(conflicts: list[Conflict], requirements: tuple[str, ...], label: str) -> str | None:
    """Climb the ladder until these conflicts are gone and none is new; else all is as it was, and why is
    returned.
    """
    before, words = snapshot_packages(), "動かしてよいパッケージがありません。"
    known = find_conflicts(before, requirements)
    for step in make_ladder(conflicts, before, requirements):
        words = run_step(step, before, label)
        after = snapshot_packages()
        found = find_conflicts(after, requirements)
        if (
            words is None
            and len(find_new_conflicts(found, conflicts)) == len(conflicts)
            and not find_new_conflicts(known, found)
        ):
            return None
        words = words or "入れても衝突が残るか、新しい衝突が出ます。"
        if list_changes(before, after):
            restore(before)
    return words


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
        raise UserError(
            "パッケージを入れられませんでした。環境は元のままです。"
            f"QUICK_FIX のセルで診断できます。\npip の言葉: {words}"
        )
    after = snapshot_packages()
    changes = list_changes(before, after)
    rows = [
        (n, old or "なし", new or "削除", explain_change(n, old, after, wanted))
        for n, (old, new) in changes.items()
    ]
    print(format_table(("パッケージ", "前", "後", "理由"), *rows))
    print("ほかのパッケージは動かしていません。新しい衝突はありません。")
    return report_restart(find_stale_modules(changes), auto_restart)
