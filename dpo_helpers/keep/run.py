"""Opens one run: whose folder it is, where it goes on from, what its checkpoints say; it does not train.

Nothing is written before the folder is locked and the run accepted: a start that is refused changes nothing.
"""

import secrets
import shutil
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path

from dpo_helpers import places
from dpo_helpers.config import RunConfig
from dpo_helpers.errors import UserError
from dpo_helpers.files import exists, hash_rows, patiently, read_lines, write_json
from dpo_helpers.folders import copy_whole, read_manifest
from dpo_helpers.keep.checkpoints import Checkpoint, find_newest, list_checkpoints, publish_checkpoint
from dpo_helpers.keep.drive import Mirror, TakenError
from dpo_helpers.keep.result import VOTES, deliver_result, deliver_votes, read_result
from dpo_helpers.machine import Machine, Stopwatch, choose_micro_batch
from dpo_helpers.model.adapters import hash_base
from dpo_helpers.places import FORMAT, FRESH, RECORD, find_checkpoints, make_refusal

RESUME_CHOICES = {"自動": "auto", "最初から": "never"}
PHASES = {"sft": "sft", "dpo": "training"}  # which of metrics.json's seconds a stage's training counts into
STAGE_NAMES = {"sft": "教師あり学習", "dpo": "DPO"}
_open_runs: dict[Path, "Run"] = {}  # a cell that is run twice must not leave a lock and a mirror behind


@dataclass
class Progress:
    """How far a run is: what its checkpoints hold beside the trainer's own files.

    `micro_batch` pairs are computed at once; memory may shrink it, the effective batch stays.
    """

    micro_batch: int
    precision: str
    eval_batch: int = 8
    resumed_at: list[int] = field(default_factory=list)
    resumed_stages: list[str] = field(default_factory=list)
    sft_log: list[dict] = field(default_factory=list)
    identity: dict = field(default_factory=dict)  # hashes of rows and base, and how many rows
    generated: bool = False  # whether the rows are the project's own, so that all of them may be shown
    # of this process alone
    steps_executed: dict[str, int] = field(default_factory=lambda: {"sft": 0, "dpo": 0})


class Run:
    """One run: its folder, its checkpoints beside it, its mirror, and how far it is."""

    def __init__(self, folder: Path, config: RunConfig, machine: Machine, clock: Stopwatch):
        self.folder, self.config, self.clock = folder, config, clock
        self.checkpoints = find_checkpoints(folder)
        self.progress = Progress(choose_micro_batch(config, machine.device), machine.precision)
        self.mirror = self.lock = self._newest = None
        self.known: dict = {}  # the identity that the newest checkpoint, or the result, was made with
        # under `accelerate launch` one process leads: it alone locks, writes and mirrors
        self.process_count, self.leads = 1, True
        self.announce = cache(print)  # a line once: a damaged checkpoint is met again by every look

    def wait(self) -> None:
        """Wait for the run's other processes, if it has any."""
        if self.process_count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def check_rows(self, train_rows, held_out_rows, generated: bool = False) -> None:
        """Refuse rows that are not those of the run so far; `generated`: none of them is the user's own."""
        counts = [len(train_rows), len(held_out_rows)]
        before, now = (
            "、".join(f"{count} 行" for count in pair) for pair in (self.known.get("counts", []), counts)
        )
        self._check("rows", hash_rows(train_rows, held_out_rows), f"学習データ（{before} → {now}）")
        self.progress.identity["counts"], self.progress.generated = counts, generated

    def check_base(self, model) -> None:
        """Refuse a base model whose weights are not those that the run so far was trained on."""
        self._check("base", hash_base(model), "ベースモデル")

    def _check(self, what: str, digest: str, text: str) -> None:
        if self.known.get(what, digest) != digest:
            raise UserError(
                f"{self.folder} の続きには使えません。違い：{text}。学習の設定は同じです。\n"
                "設定のセルを変えたときは、そのセルから順に実行してください。"
                f"元に戻すか、RUN_NAME に別の名前を書くか、{FRESH}"
            )
        self.progress.identity[what] = digest

    def check_ready(self, config: RunConfig, model) -> None:
        """Refuse a training with other settings than the run was opened with, or with unknown rows."""
        if different := self.config.differences(config):
            raise make_refusal(self.folder, different)
        self.check_base(model)
        if "rows" not in self.progress.identity:
            raise UserError("学習データがまだ決まっていません。データを分けるセルを実行してください。")

    def check_result(self, trainer, train_rows, held_out_rows) -> None:
        """Refuse to save what is not this run's: an unfinished or another run's trainer, or other rows."""
        what = None
        if hash_rows(train_rows, held_out_rows) != self.progress.identity.get("rows"):
            what = "今の行は、この学習の行ではありません。データのセルと、データを分けるセル"
        elif Path(trainer.args.output_dir).parent != self.checkpoints:
            what = "今の学習済みモデルは、この学習のものではありません。教師あり学習からのセル"
        elif trainer.state.global_step < max(1, trainer.state.max_steps):
            what = "DPO の学習がまだ終わっていません。DPO の学習のセル"
        if what:
            raise UserError(f"{self.folder} には何も書いていません。{what}を実行してください。")

    def check_owner(self) -> None:
        """Stop where another notebook has taken over the mirror."""
        if self.mirror and self.mirror.taken:
            raise UserError(self.mirror.problem)

    def newest(self, stage: str | None = None) -> Checkpoint | None:
        """Return this machine's newest good checkpoint, or None where that is of another stage."""
        if self._newest is None or self._newest.path not in list_checkpoints(self.checkpoints)[:1]:
            self._newest = patiently(find_newest, self.checkpoints, None, self.announce)
        return self._newest if self._newest and stage in (None, self._newest.stage) else None

    @property
    def base(self) -> Path | None:
        """The embedded model that came with the run's checkpoint: this run loads it, and no other run."""
        return carried if (carried := self.checkpoints / "base_model").is_dir() else None

    def find_base(self) -> Path | None:
        """Return the folder of the embedded model where the run uses it."""
        return self.base or find_own_base(self.config)

    def keep_checkpoint(self, stage: str, made: Path, step: int, max_steps: int) -> None:
        """Complete what the trainer wrote in `made` and hand it to the mirror.

        A failure costs this checkpoint, not the run.
        """
        before, phase = self.newest(), PHASES[stage]
        seconds = {**self.clock.seconds, phase: self.clock.so_far(phase)}
        progress = {"config": self.config.as_dict(), "max_steps": max_steps, "seconds": seconds}
        progress |= asdict(self.progress)
        try:
            path = publish_checkpoint(made, self.checkpoints, stage, step, progress, self.find_base())
        except OSError as error:
            print(f"⚠️ ステップ {step} のチェックポイントを保存できませんでした（{error}）。")
            print("学習は続け、次の機会にまた保存します。")
            return
        self._newest, self.known = Checkpoint(path, stage, step, progress), dict(self.progress.identity)
        spared = {path, before and before.path} | (self.mirror.in_use() if self.mirror else set())
        for old in set(list_checkpoints(self.checkpoints)) - spared:
            shutil.rmtree(old, ignore_errors=True)  # one that cannot be deleted costs space, not the run
        if self.mirror:
            self.mirror.submit(path)

    def go_on_from(self, checkpoint: Checkpoint) -> None:
        """Take over what a checkpoint says of the run so far, and tell it."""
        progress = checkpoint.progress
        self.clock.seconds |= {name: progress["seconds"].get(name, 0.0) for name in PHASES.values()}
        for name in {item.name for item in fields(Progress)} - {"identity", "precision", "steps_executed"}:
            setattr(self.progress, name, progress[name])
        self.known = progress["identity"]
        name, place = STAGE_NAMES[checkpoint.stage], f"ステップ {checkpoint.step} / {progress['max_steps']}"
        if checkpoint.ends_the_run:
            print(f"この学習は終わっています（{name}：{place}）。保存した結果を使い、学習はやり直しません。")
            print(f"新しく学習するには {FRESH}")
        else:
            print(f"前の続きがあります（{name}：{place}）。")

    def read_finished(self) -> dict | None:
        """Return metrics.json where the finished run's result is whole here or in the mirror, else None."""
        return read_result(self.folder, self.mirror and self.mirror.folder)

    def deliver(self) -> bool:
        """Bring the newest checkpoint, the result and the votes to the mirror; return whether all is there.

        Where the checkpoint did not fit, the smaller result is tried all the same; not where the mount hangs.
        """
        if self.mirror is None:
            return False
        safe = self.mirror.finish()
        if self.mirror.hangs:  # finish() has said so, and a copy would never return
            return False
        try:
            self.mirror.check_owner()
        except (OSError, TakenError) as error:
            print(self.mirror.problem or f"{self.mirror.folder} を読めないので書きません（{error!r}）。")
            return False
        if not safe:
            print(f"チェックポイントのコピーは {self.mirror.folder} にありません：{self.mirror.problem}")
        return deliver_result(self.folder, self.mirror.folder) and safe

    def deliver_votes(self) -> None:
        """Bring the votes to the mirror as soon as they are cast; where that fails, at the next delivery."""
        if self.mirror and not self.mirror.hangs and not self.mirror.taken:
            try:
                deliver_votes(self.folder, self.mirror.folder)
            except OSError as error:
                print(f"投票を {self.mirror.folder} にコピーできませんでした（{error}）。")

    def close(self) -> None:
        """Let go of the folder, when the mirror has had its time."""
        _open_runs.pop(self.folder.resolve(), None)
        if self.mirror:
            self.mirror.finish()
        if self.lock:
            self.lock.release()


def open_run(
    config: RunConfig, folder, machine: Machine, mirror=None, resume="auto", clock: Stopwatch | None = None
) -> Run:
    """Open the run's folder (and its folder on the mirror), go on where it was, or begin.

    `resume` is "auto" or "never": never begins in a fresh numbered folder beside the old one, which stays.
    UserError: the folder is not ours, in use, or of other settings, or could not be read.
    """
    resume = RESUME_CHOICES.get(resume, resume)
    if resume not in RESUME_CHOICES.values():
        raise UserError(f"RESUME は「自動」か「最初から」（auto か never）にしてください（指定：{resume}）。")
    mirror = mirror or None
    roots = [places.make_absolute(place) for place in (folder, mirror) if place is not None]
    places.check_apart(*roots)
    try:
        number = patiently(places.choose_number, roots, config, resume)
        folder, *mirrors = [places.add_number(root, number) for root in roots]
        if already := _open_runs.get(folder.resolve()):
            already.close()
        with places.hold_lock(find_checkpoints(folder), folder) as lock:
            run = Run(folder, config, machine, clock or Stopwatch())
            run.lock = lock
            _start(run, mirrors[0] if mirrors else None, [root.name for root in roots], number)
    except OSError as error:
        raise places.explain_unreadable(error, roots[0]) from error
    _open_runs[folder.resolve()] = run
    return run


def _start(run: Run, mirror: Path | None, names: list[str], number: int) -> None:
    """Accept the run or raise; then write its record, claim the mirror, and fetch what is newer there."""
    newest = patiently(_look, run, mirror)
    if newest and (different := RunConfig().replace(newest.progress["config"]).differences(run.config)):
        raise make_refusal(newest.path, different)
    common = {"format": FORMAT, "number": number, "settings": run.config.as_dict()}
    common |= {"owner": secrets.token_hex(8)}
    run.folder.mkdir(exist_ok=True)
    write_json(run.folder / RECORD, common | {"first": names[0]})
    if not exists(run.folder / "run_config.json"):
        run.config.save(run.folder / "run_config.json")
    if mirror:
        run.mirror = Mirror(mirror, common | {"first": names[1]})
        deliver_votes(run.folder, mirror, send=False)
    if newest and newest.path.parent != run.checkpoints:
        target = run.checkpoints / f"{newest.stage}-{newest.step:06d}"
        shutil.rmtree(target, ignore_errors=True)  # a damaged one
        patiently(copy_whole, newest.path, target)
    for place in filter(None, (mirror, run.folder)):
        run.known = (patiently(read_manifest, place) or {}).get("identity") or run.known
    if checkpoint := run.newest():
        run.go_on_from(checkpoint)
        carried, own = checkpoint.path / "base_model", run.checkpoints / "base_model"
        if carried.is_dir() and not own.is_dir():
            shutil.copytree(carried, own.with_name("base_model_new"), dirs_exist_ok=True).rename(own)
        if run.mirror and not newest.on_mirror:
            run.mirror.submit(checkpoint.path)


def _look(run: Run, mirror: Path | None) -> Checkpoint | None:
    """Refuse places that are not this run's or cannot be read; return the newest good checkpoint."""
    for place in filter(None, (run.folder, mirror)):
        places.check_ours(place, run.config)
    for place in filter(None, (run.folder, run.checkpoints, mirror)):
        places.refuse_links(place)
        read_manifest(place)
    for name in VOTES if mirror else ():
        read_lines(mirror / name)
    return find_newest(run.checkpoints, mirror, run.announce)


def open_shared_run(
    config: RunConfig, folder, machine: Machine, mirror, resume: str, clock: Stopwatch
) -> Run:
    """Open the run once for all processes of `accelerate launch`: the first opens it, the others join."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    processes = PartialState(cpu=machine.device == "cpu")
    run = open_run(config, folder, machine, mirror, resume, clock) if processes.is_main_process else None
    if processes.num_processes == 1:
        return run
    # a fresh start has another folder than was asked for
    (chosen,) = broadcast_object_list([run and run.folder])
    if run is None:
        run = Run(chosen, config, machine, clock)
        if checkpoint := run.newest():
            run.go_on_from(checkpoint)
    run.process_count, run.leads = processes.num_processes, processes.is_main_process
    pairs = config.effective_batch_size * run.process_count
    print(f"{run.process_count} 個のプロセスで学習します。1 回の更新に使うのは、合わせて {pairs} ペアです。")
    return run


def find_own_base(config: RunConfig) -> Path | None:
    """Return the folder of the embedded model where the run uses it: its checkpoints carry it along."""
    from dpo_helpers.model.embedded import EMBEDDED, find_embedded_folder

    return find_embedded_folder(config.model_name) if config.model_name in EMBEDDED else None
