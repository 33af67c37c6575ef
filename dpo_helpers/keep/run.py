"""Holds one run: its folder, checkpoints, mirror and lock, and where it goes on from; it does not train."""

import hashlib
import json
import shutil
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from dpo_helpers.config import RunConfig
from dpo_helpers.errors import UserError
from dpo_helpers.files import copy_file
from dpo_helpers.keep.checkpoints import Checkpoint, find_newest, publish_checkpoint, rotate_checkpoints
from dpo_helpers.keep.mirror import Mirror
from dpo_helpers.keep.run_lock import RunLock
from dpo_helpers.keep.storage import CHECKPOINTS, copy_run, prepare_run_folder
from dpo_helpers.machine import Machine, Stopwatch, choose_micro_batch

RESUME_CHOICES = {"自動": "auto", "最初から": "never"}
PHASES = {"sft": "sft", "dpo": "training"}  # which of metrics.json's seconds a stage's training counts into
STAGE_NAMES = {"sft": "教師あり学習", "dpo": "DPO"}
RELEASE_SECONDS = 5
_open_runs: dict[
    Path, "Run"
] = {}  # a cell that is run twice must not leave two heartbeats and two mirrors behind


@dataclass
class Progress:
    """How far a run is: what its checkpoints hold beside the trainer's own files.

    `micro_batch` pairs are computed at once; memory may shrink it, the effective batch stays.
    `steps_executed` are those of this process alone, and are not kept.
    """

    micro_batch: int
    eval_batch: int = 8
    resumed_at: list[int] = field(default_factory=list)
    resumed_stages: list[str] = field(default_factory=list)
    sft_log: list[dict] = field(default_factory=list)
    identity: dict[str, str] = field(default_factory=dict)  # hashes of rows and base
    steps_executed: dict[str, int] = field(default_factory=lambda: {"sft": 0, "dpo": 0})


class Run:
    """One run: its folder, its checkpoints, its mirror, and how far it is."""

    def __init__(self, folder: Path, mirror_folder: Path | None, clock: Stopwatch, progress: Progress):
        self.folder, self.mirror_folder, self.clock, self.progress = folder, mirror_folder, clock, progress
        self.checkpoints = folder / CHECKPOINTS
        self.lock = RunLock([folder, *([mirror_folder] if mirror_folder else [])])
        self.mirror = Mirror(mirror_folder) if mirror_folder else None
        # under `accelerate launch` one process leads: it alone locks, writes and mirrors
        self.process_count, self.leads = 1, True
        # a line once: a damaged checkpoint is met again by every look for the newest good one
        self.announce = cache(print)

    def wait(self) -> None:
        """Wait for the run's other processes, if it has any."""
        if self.process_count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def check_rows(self, train_rows, held_out_rows) -> None:
        """Refuse rows that are not those of the newest checkpoint."""
        digest = hashlib.sha256()
        for part in (train_rows, held_out_rows):
            for row in part:
                digest.update(json.dumps(row, ensure_ascii=False, sort_keys=True).encode())
            digest.update(b"\0")
        self._check("rows", digest.hexdigest(), "学習データ")

    def check_base(self, model) -> None:
        """Refuse a base model whose weights are not those that the checkpoint was trained on."""
        digest = hashlib.sha256()
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                # the start of each tensor, so that 7B are read quickly
                start = parameter.detach().flatten()[:1024].float().cpu().numpy()
                name = name.removeprefix("base_model.model.").replace(".base_layer", "")
                digest.update(f"{name}{tuple(parameter.shape)}".encode() + start.tobytes())
        self._check("base", digest.hexdigest(), "ベースモデル")

    def _check(self, what: str, digest: str, text: str) -> None:
        checkpoint = self.newest()
        if checkpoint and checkpoint.progress[what] != digest:
            raise UserError(
                f"チェックポイント（{checkpoint.path}）の{text}は、"
                f"今の{text}と違うので続けられません（設定は同じです）。\n"
                f"同じ{text}に戻すか、新しく始めるには RESUME を「最初から」（ターミナルでは "
                "--resume never）にしてください。"
            )
        self.progress.identity[what] = digest

    def newest(self, stage: str | None = None) -> Checkpoint | None:
        """Return this machine's newest good checkpoint, or None where that is of another stage."""
        checkpoint = find_newest(self.checkpoints, None, self.announce)
        return checkpoint if checkpoint and stage in (None, checkpoint.stage) else None

    def keep_checkpoint(self, stage: str, made: Path, step: int, max_steps: int, config: RunConfig) -> None:
        """Complete what the trainer wrote in `made` and hand it to the mirror.

        A failure costs this checkpoint, not the run.
        """
        own = self.progress
        progress = {
            "config": config.as_dict(),
            **own.identity,
            "max_steps": max_steps,
            "resumed_at": own.resumed_at,
            "resumed_stages": own.resumed_stages,
            "seconds": {**self.clock.seconds, PHASES[stage]: self.clock.so_far(PHASES[stage])},
            "micro_batch": own.micro_batch,
            "eval_batch": own.eval_batch,
            "sft_log": own.sft_log,
        }
        try:
            path = publish_checkpoint(made, self.checkpoints, stage, step, progress, find_own_base(config))
            rotate_checkpoints(self.checkpoints, self.mirror.in_use() if self.mirror else set())
        except OSError as error:
            print(
                f"⚠️ ステップ {step} のチェックポイントを保存できませんでした（{error}）。"
                "学習は続け、次の機会にまた保存します。"
            )
            return
        if self.mirror:
            self.mirror.submit(path)

    def go_on_from(self, checkpoint: Checkpoint) -> None:
        """Take over what a checkpoint says of the run so far, and tell it."""
        progress = checkpoint.progress
        self.clock.seconds |= {
            phase: progress["seconds"][phase] for phase in PHASES.values() if phase in progress["seconds"]
        }
        for name in ("micro_batch", "eval_batch", "sft_log", "resumed_at", "resumed_stages"):
            setattr(self.progress, name, progress[name])
        name, place = STAGE_NAMES[checkpoint.stage], f"ステップ {checkpoint.step} / {progress['max_steps']}"
        if checkpoint.ends_the_run:
            print(f"この学習は終わっています（{name}：{place}）。保存した結果を使い、学習はやり直しません。")
            print("新しく学習するには RESUME を「最初から」（ターミナルでは --resume never）にしてください。")
        else:
            print(f"前の続きがあります（{name}：{place}）。")

    def read_finished(self) -> dict | None:
        """Return metrics.json where this machine holds the whole result of the finished run, else None."""
        checkpoint, path = self.newest(), self.folder / "metrics.json"
        if not (
            checkpoint
            and checkpoint.ends_the_run
            and path.is_file()
            and (self.folder / "adapter_model.safetensors").is_file()
        ):
            return None
        metrics = json.loads(path.read_text(encoding="utf-8"))
        return None if "stopped" in metrics else metrics

    def deliver(self) -> bool:
        """Bring the newest checkpoint and the result to the mirror; return whether all of it is there, byte
        by byte.

        Where the checkpoint did not fit, the far smaller result is tried all the same, but not on a mount
        that hangs.
        """
        if self.mirror is None:
            return False
        safe = self.mirror.finish()
        if self.mirror.hangs:  # finish() has said so, and a copy would never return
            return False
        if not safe:
            print(f"チェックポイントの写しは {self.mirror_folder} にありません：{self.mirror.problem}")
        return copy_run(self.folder, self.mirror_folder) and safe

    def close(self) -> None:
        """Let go of the folder, when the mirror has had its time."""
        _open_runs.pop(self.folder.resolve(), None)
        if self.mirror:
            self.mirror.finish()
        letting_go = threading.Thread(target=self.lock.release, daemon=True)
        letting_go.start()
        letting_go.join(RELEASE_SECONDS)  # the lock on a mount that hangs is never written


def open_run(
    config: RunConfig,
    folder,
    machine: Machine,
    mirror=None,
    resume: str = "auto",
    clock: Stopwatch | None = None,
) -> Run:
    """Open the run's folder (and its folder on the mirror), go on where it was, or begin.

    `resume` is "auto" or "never" (or 自動, 最初から): never begins in a fresh numbered folder beside the old
    one, which stays. Raises UserError where another notebook holds the folder or a checkpoint belongs to
    another configuration.
    """
    resume = RESUME_CHOICES.get(resume, resume)
    if resume not in RESUME_CHOICES.values():
        raise UserError(
            "RESUME は「自動」か「最初から」（ターミナルでは auto か never）"
            f"にしてください（指定：{resume}）。"
        )
    folder, mirror = Path(folder), Path(mirror) if mirror else None
    if mirror:
        _check_mirror(mirror)
    folder, mirror = _choose_folders(folder, mirror, config, resume)
    if already := _open_runs.get(folder.resolve()):
        already.close()
    prepare_run_folder(folder, config)
    progress = Progress(choose_micro_batch(config, machine.device))
    run = Run(folder, mirror, clock or Stopwatch(), progress)
    run.lock.acquire()
    _open_runs[folder.resolve()] = run
    try:
        checkpoint = find_newest(run.checkpoints, mirror, run.announce)
        if checkpoint:
            if different := RunConfig().replace(checkpoint.progress["config"]).differences(config):
                raise _refuse(checkpoint.path, different)
            _install_own_base(checkpoint)
            run.go_on_from(checkpoint)
            if run.mirror and not checkpoint.on_mirror:
                run.mirror.submit(checkpoint.path)
        if mirror:
            with suppress(OSError):  # the mirror's first checkpoint meets the same error and reports it
                copy_file(folder / "run_config.json", mirror / "run_config.json")
    except BaseException:
        run.close()
        raise
    return run


def _check_mirror(mirror: Path) -> None:
    """Refuse a mirror that gives no answer: it may hold what this run goes on from, and a fresh start
    would write over that.
    """
    try:
        with suppress(FileNotFoundError):
            mirror.stat()
    except OSError as error:
        raise UserError(
            f"保存先 {mirror} を読めません（{error.strerror}）。"
            "前の続きがあるかもしれないので、まだ始めません。\n"
            "Google Drive なら、このセルをもう一度実行してつなぎ直してください。"
            "使わずに始めるには USE_DRIVE をオフ（ターミナルでは --mirror を省く）にします。"
        ) from None


def open_shared_run(
    config: RunConfig, folder, machine: Machine, mirror, resume: str, clock: Stopwatch
) -> Run:
    """Open the run once for all processes of `accelerate launch`: the first does what open_run does, the
    others join it.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    processes = PartialState(cpu=machine.device == "cpu")
    run = open_run(config, folder, machine, mirror, resume, clock) if processes.is_main_process else None
    if processes.num_processes == 1:
        return run
    (chosen,) = broadcast_object_list(
        [run and run.folder]
    )  # a fresh start has another folder than was asked for
    if run is None:
        run = Run(chosen, None, clock, Progress(choose_micro_batch(config, machine.device)))
        if checkpoint := run.newest():
            run.go_on_from(checkpoint)
    run.process_count, run.leads = processes.num_processes, processes.is_main_process
    pairs = config.effective_batch_size * run.process_count
    print(f"{run.process_count} 個のプロセスで学習します。1 回の更新に使うのは、合わせて {pairs} 組です。")
    return run


def _refuse(where, different: list[str]) -> UserError:
    return UserError(
        f"{where} は別の設定の結果なので、続きにも上書きにも使いません。違い：{'、'.join(different)}\n"
        "設定を元に戻すか、RUN_DIR に別の名前を書くか、"
        "RESUME を「最初から」（ターミナルでは --resume never）にしてください。"
    )


def _choose_folders(
    folder: Path, mirror: Path | None, config: RunConfig, resume: str
) -> tuple[Path, Path | None]:
    """Return the folders to work in: name, name.2, name.3 and so on are the starts of one run, the highest
    the newest.
    """

    def numbered(path: Path, number: int) -> Path:
        return path if number == 1 else path.with_name(f"{path.name}.{number}")

    def settings(number: int) -> list[Path]:
        places = [numbered(path, number) for path in (folder, mirror) if path]
        return [place / "run_config.json" for place in places if (place / "run_config.json").is_file()]

    def differences(path: Path) -> list[str]:
        try:
            return RunConfig.load(path).differences(config)
        except (
            UserError
        ):  # cut off while it was written, or garbage from Drive: the checkpoint's own record decides
            return []

    endings = [
        path.suffix[1:] for root in (folder, mirror) if root for path in root.parent.glob(f"{root.name}.*")
    ]
    last = max([1, *(int(ending) for ending in endings if ending.isdigit())])
    used = [number for number in range(1, last + 1) if settings(number)]
    if resume == "never":
        number = (used[-1] + 1) if used else 1
        if used:
            print(f"新しく始めます。前の結果は残し、{numbered(folder, number)} を使います。")
    else:
        same = [n for n in used if not any(map(differences, settings(n)))]
        number = same[-1] if same else 1
        if used and not same:
            path = next(path for path in settings(used[-1]) if differences(path))
            raise _refuse(path.parent, differences(path))
        if number > 1:
            print(f"{numbered(folder, number)} の続きを使います。")
    return numbered(folder, number), numbered(mirror, number) if mirror else None


def find_own_base(config: RunConfig) -> Path | None:
    """Return the folder of the embedded model where the run uses it: its checkpoints carry it along."""
    from dpo_helpers.model.embedded import EMBEDDED, find_embedded_folder

    name = config.model_name
    return find_embedded_folder(name) if name in EMBEDDED else None


def _install_own_base(checkpoint: Checkpoint) -> None:
    """Put a checkpoint's embedded model where this machine would look for it, unless it has one already."""
    source = checkpoint.path / "base_model"
    target = find_own_base(RunConfig().replace(checkpoint.progress["config"]))
    if source.is_dir() and not target.is_dir():
        aside = target.with_name(f"{target.name}.restored")
        shutil.copytree(source, aside, dirs_exist_ok=True)
        aside.rename(target)
