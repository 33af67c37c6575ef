"""The doctor: finds what is really broken in this environment, and repairs that and nothing else."""

import contextlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dpo_helpers.errors import UserError
from dpo_helpers.setup import packages as pip
from dpo_helpers.setup.packages import FRESH_RUNTIME, HEAVY, PROJECT, Conflict


@dataclass(frozen=True)
class Diagnosis:
    """What was found, and the plan of its repair (name → version).

    `hiding` are the user's files that hide a library; the trial is None where it was not run.
    """

    conflicts: list[Conflict]
    incomplete: list[str]
    leftovers: list[str]
    hiding: list[str]
    trial: dict | None
    stale: list[str]
    plan: dict[str, str]

    @property
    def torch_replaced(self) -> bool:
        """Whether torch and its kin no longer fit or lack files: gigabytes that no repair moves."""
        mixed = [c for c in self.conflicts if HEAVY.fullmatch(c.package) and HEAVY.fullmatch(c.required)]
        return bool(mixed) or any(map(HEAVY.fullmatch, self.incomplete))

    @property
    def curable(self) -> bool:
        return bool(self.conflicts or self.incomplete or self.leftovers) and not self.torch_replaced

    @property
    def exit_code(self) -> int:
        """0 healthy, 1 broken, 2 nothing broken but the kernel must restart."""
        failed = self.trial and self.trial["error"]
        broken = self.conflicts or self.incomplete or self.leftovers or self.hiding or failed
        return 1 if broken else 2 if self.stale else 0


def try_training() -> None:
    """Train one step of DPO with LoRA on a one-layer model; its source runs in a fresh interpreter."""
    import datasets
    import peft
    import tokenizers
    import torch
    import transformers
    import trl

    print("CUDA", torch.cuda.get_device_name() if torch.cuda.is_available() else "")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<e>": 0, "a": 1, "b": 2}, unk_token="<e>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"eos_token": "<e>", "pad_token": "<e>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    sizes = {"vocab_size": 3, "n_layer": 1, "n_embd": 8, "n_head": 1, "eos_token_id": 0, "bos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " a"}])
    options = trl.DPOConfig(".", max_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no")
    model = peft.get_peft_model(model, lora)
    trl.DPOTrainer(model=model, args=options, train_dataset=rows, processing_class=tokenizer).train()


def run_trial(timeout: float = 300) -> dict:
    """Train a step in a fresh interpreter: {"error": its last words or "", "cuda": the GPU's name or ""}."""
    # -P and an empty folder: the user's own files hide no library there.
    command = [sys.executable, "-P", "-c", inspect.getsource(try_training) + "try_training()"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return {"error": f"{timeout:.0f} 秒で終わりませんでした", "cuda": ""}
    last = [f"終了コード {process.returncode}", *filter(str.strip, process.stderr.splitlines())][-1]
    cuda = re.search(r"^CUDA (.*)$", process.stdout, re.MULTILINE)
    return {"error": last if process.returncode else "", "cuda": cuda[1] if cuda else ""}


def find_hiding(names: set[str]) -> list[str]:
    """Files and folders of the working folder that Python imports in place of a library of the same name."""
    hidden = {pip.MODULES.get(name, name.replace("-", "_")) for name in names} | sys.stdlib_module_names
    here = Path.cwd()
    if not {"", str(here)} & set(sys.path) or here.name == "site-packages":
        return []
    found = [path for path in here.iterdir() if path.name.removesuffix(".py") in hidden | {"pip"}]
    return sorted(path.name for path in found if path.suffix == ".py" or (path / "__init__.py").is_file())


def diagnose(metadata_only: bool = False) -> Diagnosis:
    """Look, and change nothing; `metadata_only` leaves out the trial."""
    packages, trial = pip.find_packages(), None
    if not metadata_only:
        print("新しい Python で、小さなモデルの学習を 1 ステップ試しています…", flush=True)
        trial = run_trial()
    return Diagnosis(
        [conflict for conflict in pip.find_conflicts(packages) if conflict.ours],
        pip.find_incomplete(packages),
        [path.name for path in pip.find_leftovers()],
        find_hiding(pip.find_closure(packages)),
        trial,
        pip.find_stale(packages, packages),
        {},
    )


def print_diagnosis(found: Diagnosis) -> None:
    """Say what was found, what it means for the reader, and what follows."""
    if found.trial:
        failed = found.trial["error"] and f"失敗しました。\n  {found.trial['error'][:300]}"
        print(f"試し学習: {failed or '成功しました。'}（GPU: {found.trial['cuda'] or 'なし'}）")
    closure = pip.find_closure(pip.find_packages())
    for c in found.conflicts:
        who = "このノート" if c.package == PROJECT else c.package
        alone = f"学習は動きます。{who} だけが困ります"
        effect = "学習が動かないおそれがあります" if c.package in closure | {PROJECT} else alone
        there = f"{c.required} は {c.found or 'ありません'}"
        print(f"・{who} は {c.requirement} を求めますが、{there}（{effect}）")
    for name in found.incomplete:
        print(f"・{name} のファイルが欠けています（学習が動かないおそれがあります）")
    if found.leftovers:
        print(f"・途中で止まった pip の残り: {'、'.join(found.leftovers)}（学習には影響しません）")
    for name in found.hiding:
        print(f"・作業フォルダの {name} が、同じ名前のライブラリを隠しています。名前を変えてください。")
    if found.torch_replaced:
        print(f"診断: torch が入れ替わっているか、欠けています。ここからは直せません。\n{FRESH_RUNTIME}")
    elif found.exit_code != 1:
        print("診断: 健康です。このまま学習できます。")
    elif found.curable or found.hiding:
        print("診断: 直すところがあります。")
    else:
        print(f"診断: 試し学習の失敗の原因が、パッケージの情報からは分かりません。\n{FRESH_RUNTIME}")


def repair_environment(found: Diagnosis, before, after, metadata_only: bool) -> Diagnosis:
    """Carry out the plan, look again, and put everything back if that was interrupted or made it worse."""
    pip.check_may_install(before)
    try:
        pip.carry_out(before, after, found.incomplete)
        seen = diagnose(metadata_only)
        was, now = found.trial or {"error": "", "cuda": ""}, seen.trial or {"error": "", "cuda": ""}
        if (now["error"] and not was["error"]) or (was["cuda"] and not now["cuda"]):
            raise UserError(f"修復の前より悪くなったので、元に戻しました。{FRESH_RUNTIME}")
    except (UserError, KeyboardInterrupt) as error:
        state = pip.find_packages()
        if pip.list_moves(before, state):
            print("元の版に戻します。")
            pip.carry_out(state, before, [])
        raise UserError(str(error) or "修復を止めました。元の版のままです。") from None
    print_diagnosis(seen)
    return replace(seen, stale=pip.find_stale(before, pip.find_packages()))


def quick_fix(repair: bool = False, auto_restart: bool = False, metadata_only: bool = False) -> Diagnosis:
    """The notebook's cell: diagnose, announce the repair, and with `repair` carry it out."""
    before = pip.find_packages()
    with pip.stoppable(before):
        found = diagnose(metadata_only)
        print_diagnosis(found)
        after, words = before, ""
        if found.curable:
            after, words = pip.make_plan(found.conflicts, before)
        moves = pip.list_moves(before, after, found.incomplete if found.curable else [])
        if words:
            print(f"直せないものがあります（元のままにします）。{FRESH_RUNTIME}\npip の言葉: {words}")
        if repair and found.curable and (moves or found.leftovers):
            found = repair_environment(found, before, after, metadata_only)
        elif repair:
            print("QUICK_FIX は何も変更しませんでした。")
        elif found.curable and (moves or found.leftovers):
            print("直し方:", *moves.values() or ["  pip の残りを片付けます"], sep="\n")
            print("QUICK_FIX = True で（端末では doctor --fix で）もう一度実行すると、このとおりに直します。")
    if found.stale or found.exit_code != 1:
        pip.report_restart(found.stale, auto_restart)
    return replace(found, plan={name: after[name].version for name in moves})


def run_doctor(fix: bool = False, as_json: bool = False, metadata_only: bool = False) -> int:
    """`python -m dpo_helpers doctor`: 0 healthy, 1 broken or not allowed to touch it, 2 restart needed."""
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        try:
            found = quick_fix(fix, metadata_only=metadata_only)
        except UserError as error:
            print(f"⚠️ {error}", file=sys.stderr)
            return 1
    if as_json:
        facts = asdict(found) | {"torch_replaced": found.torch_replaced, "exit_code": found.exit_code}
        print(json.dumps(facts, ensure_ascii=False, indent=2))
    return found.exit_code
