"""Asks the running Python instead of the metadata: what this process has loaded, what a fresh one can do.

Run as a script, it is that fresh interpreter's trial; so it imports nothing of ours.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

Changes = dict[str, tuple[str | None, str | None]]  # name → (old version, new version); None: absent


def find_process_start() -> float:
    """Seconds since the epoch at which this process started; 0.0 where there is no /proc to tell."""
    if not Path("/proc/self/stat").exists():
        return 0.0
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    boot = int(re.search(r"^btime (\d+)", Path("/proc/stat").read_text(), re.MULTILINE)[1])
    return boot + ticks / os.sysconf("SC_CLK_TCK")


def find_stale_modules(changes: Changes | None = None) -> list[str]:
    """Distributions that this process imported in another version than the one now on disk.

    `changes` are what pip did just now: they tell for modules without a `__version__`. For the rest
    it is compared, but only in distributions written after the process started: a module may
    always have disagreed with its metadata.
    """
    stale, started = set(), find_process_start()
    for record in (record for folder in sys.path for record in Path(folder).glob("*.dist-info/RECORD")):
        if record.stat().st_mtime < started:
            continue
        distribution = importlib.metadata.Distribution.at(record.parent)
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        moved = (changes or {}).get(name, (None,))[0] is not None
        for module in {file.parts[0].removesuffix(".py") for file in distribution.files or ()} & set(sys.modules):
            loaded = getattr(sys.modules[module], "__version__", None)
            differs = isinstance(loaded, str) and loaded.split("+")[0] != distribution.version.split("+")[0]
            if moved or differs:
                stale.add(name)
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

    print("自動で再起動します。終わったら、もう一度最初のセルから実行してください。")
    get_ipython().kernel.do_shutdown(True)  # the cell's output still arrives; with os.kill it does not
    return True


def run_trial(timeout: float = 300) -> dict:
    """Try a training step in a fresh interpreter: {"passed": stages, "failed": stage or None, "error", "cuda"}."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", str(Path(__file__).resolve())]  # -P: our files shadow no library
        try:
            process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return {"passed": [], "failed": "時間内の終了", "error": f"{timeout:.0f} 秒で終わりませんでした", "cuda": None}
    lines = [line for line in process.stdout.splitlines() if line.startswith("TRIAL ")]
    report = json.loads(lines[-1][6:]) if lines else {"passed": [], "failed": "起動", "error": "", "cuda": None}
    if report["failed"] and not report["error"]:  # the interpreter died: its last words are all there is
        report["error"] = (process.stderr.strip().splitlines() or [f"終了コード {process.returncode}"])[-1]
    return report


def try_training(folder: str) -> None:
    """Go through the stages of a training run on a one-layer model, printing after each how far it came."""
    report = {"passed": [], "failed": None, "error": "", "cuda": None}

    def enter(stage: str) -> None:
        if report["failed"]:
            report["passed"].append(report["failed"])
        report["failed"] = stage
        print("TRIAL " + json.dumps(report), flush=True)

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
        report["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        enter("LoRA")
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<e>": 0, "a": 1, "b": 2}, unk_token="<e>"))
        words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>", pad_token="<e>")
        config = transformers.GPT2Config(vocab_size=3, n_layer=1, n_embd=8, n_head=1, eos_token_id=0, bos_token_id=0)
        model = transformers.GPT2LMHeadModel(config)
        lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora)
        enter("DPO")
        rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " a"}])
        options = trl.DPOConfig(folder, max_steps=1, use_cpu=True, bf16=False, fp16=False, report_to="none", save_strategy="no")
        trl.DPOTrainer(model=model, args=options, train_dataset=rows, processing_class=tokenizer).train()
        enter("")
    except BaseException as error:  # reported to the parent, which is all that this process is for
        report["error"] = f"{type(error).__name__}: {str(error).strip() or '-'}"
    print("TRIAL " + json.dumps({**report, "failed": report["failed"] or None}), flush=True)


if __name__ == "__main__":
    try_training(os.getcwd())
