"""Asks the running Python instead of the metadata: what this process has loaded, what a fresh one can do.

Run as a script, it is that fresh interpreter's trial; so it imports nothing of ours.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path


def find_process_start() -> float:
    """Seconds since the epoch at which this process started; 0.0 where there is no /proc to tell."""
    if not Path("/proc/self/stat").exists():
        return 0.0
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    boot = int(re.search(r"^btime (\d+)", Path("/proc/stat").read_text(), re.MULTILINE)[1])
    return boot + ticks / os.sysconf("SC_CLK_TCK")


def find_stale_modules(changes: dict[str, tuple[str | None, str | None]] | None = None) -> list[str]:
    """Distributions that this process imported in another version than the one now on disk.

    `changes`, name → (old version, new version), are what pip did just now: they tell for modules without a
    `__version__`. For the rest that is compared, but only where the disk is younger than this process: some
    modules always disagree with their metadata.
    """
    stale, started = set(), find_process_start()
    for record in (record for folder in sys.path for record in Path(folder).glob("*.dist-info/RECORD")):
        if record.stat().st_mtime < started:
            continue
        name, version = record.parent.name.removesuffix(".dist-info").split("-")[:2]
        name = re.sub(r"[-_.]+", "-", name).lower()
        moved = (changes or {}).get(name, (None,))[0] is not None
        files = importlib.metadata.Distribution.at(record.parent).files or ()
        for module in {file.parts[0].removesuffix(".py") for file in files} & set(sys.modules):
            loaded = getattr(sys.modules[module], "__version__", None)
            if moved or (isinstance(loaded, str) and split_version(loaded) != split_version(version)):
                stale.add(name)
    return sorted(stale)


def split_version(version: str) -> list[int]:
    """The numbers of a version: a module may say 2025.06.15 or 2.13.0+cpu where its metadata says
    2025.6.15 or 2.13.0.
    """
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]


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

    from dpo_helpers.errors import UserError  # not on top: the trial runs this file alone

    get_ipython().kernel.do_shutdown(True)  # the cell's output still arrives; with os.kill it does not
    # An error also cancels the cells that "run all" has queued: they would still start in the old kernel.
    raise UserError("自動で再起動しています。終わったら、もう一度最初のセルから実行してください。")


def run_trial(timeout: float = 300) -> dict:
    """Try a training step in a fresh interpreter: {"passed": stages, "failed": stage or None, "error",
    "cuda": name or None}.
    """
    command = [sys.executable, "-P", str(Path(__file__).resolve())]  # -P: our files shadow no library
    with tempfile.TemporaryDirectory() as folder:
        try:
            process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return {
                "passed": [],
                "failed": "時間内の終了",
                "error": f"{timeout:.0f} 秒で終わりませんでした",
                "cuda": None,
            }
    told = re.findall(r"^(STAGE|CUDA|ERROR) (.+)$", process.stdout, re.MULTILINE)
    *passed, last = [text for kind, text in told if kind == "STAGE"] or ["起動"]
    # An interpreter that crashed told no error: its last words are all there is.
    crash = (process.stderr.strip().splitlines() or [f"終了コード {process.returncode}"])[-1]
    failed, facts = None if last == "end" else last, dict(told)
    return {
        "passed": passed,
        "failed": failed,
        "error": facts.get("ERROR", crash) if failed else "",
        "cuda": facts.get("CUDA"),
    }


def try_training(folder: str) -> None:
    """Go through the stages of a training run on a one-layer model, naming each before it starts, "end"
    last.
    """

    def enter(stage: str) -> None:
        print("STAGE " + stage, flush=True)

    try:
        for name in ("torch", "datasets", "transformers", "peft", "trl"):
            enter(f"import {name}")
            importlib.import_module(name)
        import datasets
        import peft
        import tokenizers
        import torch
        import transformers
        import trl

        enter("CUDA")
        if torch.cuda.is_available():
            print("CUDA " + torch.cuda.get_device_name())
        enter("LoRA")
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<e>": 0, "a": 1, "b": 2}, unk_token="<e>"))
        words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, eos_token="<e>", pad_token="<e>"
        )
        config = transformers.GPT2Config(
            vocab_size=3, n_layer=1, n_embd=8, n_head=1, eos_token_id=0, bos_token_id=0
        )
        model = transformers.GPT2LMHeadModel(config)
        lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora)
        enter("DPO")
        rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " a"}])
        options = trl.DPOConfig(
            folder, max_steps=1, use_cpu=True, bf16=False, fp16=False, report_to="none", save_strategy="no"
        )
        trl.DPOTrainer(model=model, args=options, train_dataset=rows, processing_class=tokenizer).train()
        enter("end")
    except BaseException as error:  # told to the parent, which is all that this process is for
        print(f"ERROR {type(error).__name__}: {' '.join(str(error).split())}")


if __name__ == "__main__":
    try_training(os.getcwd())
