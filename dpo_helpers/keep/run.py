"""Opens one run: whose folder it is, where it goes on from, what its checkpoints say; it does not train.

Nothing is written before the folder is locked and the run accepted: a start that is refused changes nothing.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from dpo_helpers.config import RunConfig
from dpo_helpers.errors import UserError
from dpo_helpers.files import (
    ABSENT,
    copy_whole,
    exists,
    list_names,
    patiently,
    raise_error,
    read_manifest,
    write_json,
)
from dpo_helpers.keep.checkpoints import (
    SLOT_NAMES,
    Checkpoint,
    find_newest,
    list_checkpoints,
    publish_checkpoint,
)
from dpo_helpers.keep.drive import RECORD, Mirror, TakenError, claim_mirror, read_record
from dpo_helpers.keep.result import deliver_result, deliver_votes, read_result
from dpo_helpers.machine import Machine, Stopwatch, choose_micro_batch

RESUME_CHOICES = {"自動": "auto", "最初から": "never"}
PHASES = {"sft": "sft", "dpo": "training"}  # which of metrics.json's seconds a stage's training counts into
STAGE_NAMES = {"sft": "教師あり学習", "dpo": "DPO"}
LOCK = "run.lock"
FORMAT = 2  # of run.json; what an older notebook left has none
OURS = re.compile(rf"(sft|dpo)-\d+(\.partial)?|writing-\w+|warmed-up|without-scaler|base_model\w*|{LOCK}")
_open_runs: dict[Path, "Run"] = {}  # a cell that is run twice must not leave a lock and a mirror behind
FRESH = "RESUME を「最初から」（ターミナルでは --resume never）にしてください。"


@dataclass
class Progress:
    """How far a run is: what its checkpoints hold beside the trainer's own files.

    `micro_batch` pairs are computed at once; memory may shrink it, the effective batch stays. `steps_executed` are
    those of this process alone, and are not kept.
    """

    micro_batch: int
    eval_batch: int = 8
    resumed_at: list[int] = field(default_factory=list)
    resumed_stages: list[str] = field(default_factory=list)
    sft_log: list[dict] = field(default_factory=list)
    identity: dict = field(default_factory=dict)  # hashes of rows and base, and how many rows
    generated: bool = False  # whether the rows are the project's own, so that all of them may be shown
    steps_executed: dict[str, int] = field(default_factory=lambda: {"sft": 0, "dpo": 0})


class Run:
    """One run: its folder, its checkpoints beside it, its mirror, and how far it is."""

    def __init__(self, folder: Path, config: RunConfig, machine: Machine, clock: Stopwatch):
        self.folder, self.config, self.precision, self.clock = folder, config, machine.precision, clock
        self.checkpoints = folder.with_name(f"{folder.name}.checkpoints")
        self.progress = Progress(choose_micro_batch(config, machine.device))
        self.mirror: Mirror | None = None
        self.lock = None
        self.known: dict = {}  # the identity that the newest checkpoint, or the result, was made with
        self._newest: Checkpoint | None = None
        # under `accelerate launch` one process leads: it alone locks, writes and mirrors
        self.process_count, self.leads = 1, True
        # a line once: a damaged checkpoint is met again by every look for the newest good one
        self.announce = cache(print)

    def wait(self) -> None:
        """Wait for the run's other processes, if it has any."""
        if self.process_count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def check_rows(self, train_rows, held_out_rows, generated: bool = False) -> None:
        """Refuse rows that are not those of the run so far; `generated` says that none of them is the user's own."""
        counts = [len(train_rows), len(held_out_rows)]
        before = "、".join(f"{count} 行" for count in self.known.get("counts", []))
        now = "、".join(f"{count} 行" for count in counts)
        self._check("rows", hash_rows(train_rows, held_out_rows), f"学習データ（{before} → {now}）")
        self.progress.identity["counts"], self.progress.generated = counts, generated

    def check_base(self, model) -> None:
        """Refuse a base model whose weights are not those that the run so far was trained on."""
        digest = hashlib.sha256()
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                # the start of each tensor, so that 7B are read quickly
                start = parameter.detach().flatten()[:1024].float().cpu().numpy()
                name = name.removeprefix("base_model.model.").replace(".base_layer", "")
                digest.update(f"{name}{tuple(parameter.shape)}".encode() + start.tobytes())
        self._check("base", digest.hexdigest(), "ベースモデル")

    def _check(self, what: str, digest: str, text: str) -> None:
        if self.known.get(what, digest) != digest:
            raise UserError(
                f"{self.folder} の続きには使えません。違い：{text}。学習の設定は同じです。\n"
                "設定のセルを変えたときは、そのセルから順に実行してください。"
                f"元に戻すか、RUN_NAME に別の名前を書くか、{FRESH}"
            )
        self.progress.identity[what] = digest

    def check_ready(self, config: RunConfig, model) -> None:
        """Refuse a training with other settings than the run was opened with, or with rows that it does not know."""
        if different := self.config.differences(config):
            raise _refuse(self.folder, different)
        self.check_base(model)
        if "rows" not in self.progress.identity:
            raise UserError("学習データがまだ決まっていません。データを分けるセルを実行してください。")

    def check_result(self, trainer, train_rows, held_out_rows) -> None:
        """Refuse to save what is not this run's: an unfinished or another run's trainer, or other rows."""
        if hash_rows(train_rows, held_out_rows) != self.progress.identity.get("rows"):
            what = "今の行は、この学習の行ではありません。データのセルと、データを分けるセルを実行してください。"
        elif Path(trainer.args.output_dir).parent != self.checkpoints:
            what = "今の学習済みモデルは、この学習のものではありません。教師あり学習のセルから実行してください。"
        elif trainer.state.global_step < max(1, trainer.state.max_steps):
            what = "DPO の学習がまだ終わっていません。DPO の学習のセルを実行してください。"
        else:
            return
        raise UserError(f"{self.folder} には何も書いていません。{what}")

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
        own, before = self.progress, self.newest()
        progress = {
            "config": self.config.as_dict(),
            **own.identity,
            "generated": own.generated,
            "precision": self.precision,
            "max_steps": max_steps,
            "resumed_at": own.resumed_at,
            "resumed_stages": own.resumed_stages,
            "seconds": {**self.clock.seconds, PHASES[stage]: self.clock.so_far(PHASES[stage])},
            "micro_batch": own.micro_batch,
            "eval_batch": own.eval_batch,
            "sft_log": own.sft_log,
        }
        try:
            path = publish_checkpoint(made, self.checkpoints, stage, step, progress, self.find_base())
        except OSError as error:
            print(
                f"⚠️ ステップ {step} のチェックポイントを保存できませんでした（{error}）。"
                "学習は続け、次の機会にまた保存します。"
            )
            return
        self._newest = Checkpoint(path, stage, step, progress)
        self.known = dict(own.identity)
        spared = {path, before and before.path} | (self.mirror.in_use() if self.mirror else set())
        for old in list_checkpoints(self.checkpoints):
            if old not in spared:
                shutil.rmtree(old, ignore_errors=True)  # one that cannot be deleted costs space, not the run
        if self.mirror:
            self.mirror.submit(path)

    def go_on_from(self, checkpoint: Checkpoint) -> None:
        """Take over what a checkpoint says of the run so far, and tell it."""
        progress, own = checkpoint.progress, self.progress
        self.clock.seconds |= {name: progress["seconds"].get(name, 0.0) for name in PHASES.values()}
        for name in ("micro_batch", "eval_batch", "sft_log", "resumed_at", "resumed_stages", "generated"):
            setattr(own, name, progress[name])
        self.known = {name: progress[name] for name in ("rows", "base", "counts")}
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
        """Bring the newest checkpoint, the result and the votes to the mirror; return whether all of it is there.

        Where the checkpoint did not fit, the far smaller result is tried all the same, but not on a mount that hangs.
        """
        if self.mirror is None:
            return False
        safe = self.mirror.finish()
        if self.mirror.hangs:  # finish() has said so, and a copy would never return
            return False
        try:
            self.mirror.check_owner()
        except (OSError, TakenError) as error:
            print(self.mirror.problem or f"{self.mirror.folder} を読めないので、コピーしません（{error}）。")
            return False
        if not safe:
            print(f"チェックポイントのコピーは {self.mirror.folder} にありません：{self.mirror.problem}")
        return deliver_result(self.folder, self.mirror.folder) and safe

    def deliver_votes(self) -> None:
        """Bring the votes to the mirror as soon as they are cast; where that fails, the next delivery does it."""
        if self.mirror and not self.mirror.hangs and not self.mirror.taken:
            try:
                deliver_votes(self.folder, self.mirror.folder)
            except OSError as error:
                print(f"投票を {self.mirror.folder} にコピーできませんでした（{error}）。{self.folder} にはあります。")

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

    `resume` is "auto" or "never" (or 自動, 最初から): never begins in a fresh numbered folder beside the old one, which
    stays. UserError: the folder is not ours, in use, or of other settings, or something could not be read.
    """
    resume = RESUME_CHOICES.get(resume, resume)
    if resume not in RESUME_CHOICES.values():
        raise UserError(f"RESUME は「自動」か「最初から」（auto か never）にしてください（指定：{resume}）。")
    roots = _check_places(folder, mirror)
    try:
        number = patiently(_choose_number, roots, config, resume)
        folder, *mirrors = places = [_add_number(root, number) for root in roots]
        if already := _open_runs.get(folder.resolve()):
            already.close()
        with _locked(folder) as lock:
            run = Run(folder, config, machine, clock or Stopwatch())
            run.lock = lock
            _start(run, mirrors[0] if mirrors else None, [root.name for root in roots], number)
    except OSError as error:
        raise UserError(
            f"{error.filename or places[0]} を読み書きできません（{error.strerror or error}）。"
            "前の続きがあるかもしれないので、まだ始めません。何も書き換えていません。\n"
            "少し待って、もう一度実行してください。続くときは、書き込める場所を RUN_DIR に指定してください。"
            "Google Drive なら、接続するセルからやり直すか、USE_DRIVE をオフ（ターミナルでは --mirror を省く）にします。"
        ) from error
    _open_runs[folder.resolve()] = run
    return run


def _start(run: Run, mirror: Path | None, names: list[str], number: int) -> None:
    """Accept the run or raise; only then write its record, claim the mirror, and fetch what the mirror has newer."""
    newest = patiently(_look, run, mirror)
    if newest and (different := RunConfig().replace(newest.progress["config"]).differences(run.config)):
        raise _refuse(newest.path, different)
    records = [
        {"format": FORMAT, "first": name, "number": number, "settings": run.config.as_dict()} for name in names
    ]
    owner = {"owner": secrets.token_hex(8)}
    run.folder.mkdir(exist_ok=True)
    write_json(run.folder / RECORD, records[0] | owner)
    if not exists(run.folder / "run_config.json"):
        run.config.save(run.folder / "run_config.json")
    if mirror:
        run.mirror = Mirror(mirror, records[1] | owner)
        deliver_votes(run.folder, mirror, send=False)
    if newest and newest.path.parent != run.checkpoints:
        target = run.checkpoints / f"{newest.stage}-{newest.step:06d}"
        shutil.rmtree(target, ignore_errors=True)  # a damaged one
        patiently(copy_whole, newest.path, target)
    for place in filter(None, (mirror, run.folder)):
        run.known = (patiently(read_manifest, place) or {}).get("identity") or run.known
    if checkpoint := run.newest():
        run.go_on_from(checkpoint)
        carried = checkpoint.path / "base_model"
        if carried.is_dir() and not (run.checkpoints / "base_model").is_dir():
            aside = run.checkpoints / "base_model_new"
            shutil.copytree(carried, aside, dirs_exist_ok=True)
            aside.rename(run.checkpoints / "base_model")
        if run.mirror and not newest.on_mirror:
            run.mirror.submit(checkpoint.path)


def _look(run: Run, mirror: Path | None) -> Checkpoint | None:
    """Refuse places that are not this run's; return the newest good checkpoint. It only reads."""
    for place in filter(None, (run.folder, mirror)):
        _check_ours(place, run.config)
    for place in filter(None, (run.folder, run.checkpoints, mirror)):
        _refuse_links(place)
    return find_newest(run.checkpoints, mirror, run.announce)


def open_shared_run(config: RunConfig, folder, machine: Machine, mirror, resume: str, clock: Stopwatch) -> Run:
    """Open the run once for all processes of `accelerate launch`: the first does what open_run does, the others join."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    processes = PartialState(cpu=machine.device == "cpu")
    run = open_run(config, folder, machine, mirror, resume, clock) if processes.is_main_process else None
    if processes.num_processes == 1:
        return run
    (chosen,) = broadcast_object_list([run and run.folder])  # a fresh start has another folder than was asked for
    if run is None:
        run = Run(chosen, config, machine, clock)
        if checkpoint := run.newest():
            run.go_on_from(checkpoint)
    run.process_count, run.leads = processes.num_processes, processes.is_main_process
    pairs = config.effective_batch_size * run.process_count
    print(f"{run.process_count} 個のプロセスで学習します。1 回の更新に使うのは、合わせて {pairs} ペアです。")
    return run


def hash_rows(train_rows, held_out_rows) -> str:
    digest = hashlib.sha256()
    for part in (train_rows, held_out_rows):
        for row in part:
            digest.update(json.dumps(row, ensure_ascii=False, sort_keys=True).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def find_own_base(config: RunConfig) -> Path | None:
    """Return the folder of the embedded model where the run uses it: its checkpoints carry it along."""
    from dpo_helpers.model.load import EMBEDDED, find_embedded_folder

    name = config.model_name
    return find_embedded_folder(config.seed, config.held_out_fraction, name) if name in EMBEDDED else None


def _refuse(where, different: list[str]) -> UserError:
    return UserError(
        f"{where} は別の設定の結果なので、続きにも上書きにも使いません。違い：{'、'.join(different)}\n"
        f"設定を元に戻すか、RUN_NAME（RUN_DIR）に別の名前を書くか、{FRESH}"
    )


def _check_places(folder, mirror) -> list[Path]:
    """Return the absolute folders of run and mirror; refuse names that stand for another folder, and one in the other."""
    names = [str(folder), *([str(mirror)] if mirror else [])]
    roots = [Path(os.path.abspath(os.path.expanduser(name))) for name in names]
    for name, root in zip(names, roots, strict=True):
        try:
            os.lstat(f"{root}.checkpoints")
        except ABSENT:
            pass
        except (OSError, ValueError) as error:  # too long, a null character, a lone surrogate
            if getattr(error, "errno", None) not in (None, errno.ENAMETOOLONG):
                continue  # unreadable: told when it is read
            raise UserError(f"{name!r:.60} はフォルダの名前に使えません。RUN_NAME に短い名前を書いてください。") from None
        if name.strip() in ("", ".", "..") or Path.cwd().is_relative_to(root):
            raise UserError(f"「{name}」は作業中のフォルダなので使えません。RUN_NAME に、run のような名前を書いてください。")
    folder, *others = [Path(os.path.realpath(root)) for root in roots]
    for other in others:
        for own in (folder, folder.with_name(f"{folder.name}.checkpoints")):
            if other.is_relative_to(own) or own.is_relative_to(other):
                raise UserError(f"--mirror の {other} と結果の {folder} は、互いの外に置いてください。別の場所を指定してください。")
    return roots


def _add_number(root: Path, number: int) -> Path:
    """Return the folder of one of a name's starts: name, name.2, name.3 and so on."""
    return root if number == 1 else root.with_name(f"{root.name}.{number}")


def _find_starts(root: Path) -> dict[int, dict]:
    """Return {number: record} of the folders that say of themselves that they are starts of this one."""
    starts = {}
    for name in list_names(root.parent):
        match = re.fullmatch(r"\.([1-9]\d{0,8})", name.removeprefix(root.name)) if name != root.name else None
        if name == root.name or (match and name.startswith(root.name)):
            record, number = read_record(root.parent / name), int(match[1]) if match else 1
            if record is not None and (number == 1 or (record.get("first"), record.get("number")) == (root.name, number)):
                starts[number] = record
    return starts


def _choose_number(roots: list[Path], config: RunConfig, resume: str) -> int:
    """Return which start of the name to go on with, or the first free one where a fresh start is asked for."""
    found = [(number, root, record) for root in roots for number, record in _find_starts(root).items()]
    if resume == "never":
        number = max([0, *(number for number, *_ in found)]) + 1
        while any(list_names(_add_number(root, number)) for root in roots):
            number += 1
        if number > 1:
            print(f"新しく始めます。前の結果は残し、{_add_number(roots[0], number)} を使います。")
        return number
    different = {number: root for number, root, record in found if _differences(record, config)}
    same = {number for number, *_ in found} - different.keys()
    if different and not same:
        number = max(different)
        records = [record for n, root, record in found if n == number and root == different[n]]
        raise _refuse(_add_number(different[number], number), _differences(records[0], config))
    number = max(same, default=1)
    if number > 1:
        print(f"{_add_number(roots[0], number)} の続きを使います。")
    return number


def _differences(record: dict, config: RunConfig) -> list[str]:
    """Name the settings that differ from a record's; of a record that is cut off none: the checkpoint's decide."""
    if not record:
        return []
    if record["format"] != FORMAT:
        return [f"バージョン: {record['format']} → {FORMAT}"]
    return RunConfig().replace(record["settings"]).differences(config)


def _check_ours(place: Path, config: RunConfig) -> None:
    """Refuse a folder that is not new, empty or a run's of these settings."""
    names, record = set(list_names(place)) - {f"{RECORD}.new"}, read_record(place)
    torn = record == {} and (names == {RECORD} or names & {"run_config.json", *SLOT_NAMES})
    if names and not record and not torn:
        if names & {"run_config.json", *SLOT_NAMES}:
            raise UserError(
                f"{place} は、前のバージョンのノートブックが書いたものです。続きには使えないので、何も変えていません。\n"
                "結果はそのまま残ります。RUN_NAME（ターミナルでは --run-dir と --mirror）に別の名前を書いてください。"
            )
        raise UserError(
            f"{place} には、この学習のものではないファイルがあります（{sorted(names)[0]} など）。何も変えていません。\n"
            "新しいフォルダの名前を RUN_NAME（ターミナルでは --run-dir か --mirror）に書いてください。"
        )
    if record and (different := _differences(record, config)):
        raise _refuse(place, different)


def _refuse_links(place: Path) -> None:
    """Refuse a folder with a link that leads outside: what is written there would be written through it."""
    for folder, folders, files in os.walk(place, onerror=raise_error):
        for path in (Path(folder) / name for name in (*folders, *files)):
            if path.is_symlink() and not path.resolve().is_relative_to(place.resolve()):
                raise UserError(f"{path} は外のファイルへのリンクです。書き換えないように止めました。リンクを消してください。")


@contextmanager
def _locked(folder: Path):
    """Hold the lock of a run's folder on this machine; where the start is refused, leave nothing behind."""
    checkpoints = folder.with_name(f"{folder.name}.checkpoints")
    if foreign := [name for name in patiently(list_names, checkpoints) if not OURS.fullmatch(name)]:
        raise UserError(f"{checkpoints} に、学習のものではない {foreign[0]} があります。RUN_NAME に別の名前を書いてください。")
    made = [path for path in (checkpoints, *checkpoints.parents) if not exists(path)]
    checkpoints.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(checkpoints / LOCK), timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"フォルダ {folder} は、別のノートブックかターミナルが学習に使っています。結果が混ざるので、始めません。\n"
            "そちらを止めるか、別の名前（例：run-2）を RUN_NAME に書いてから、もう一度実行してください。"
        ) from None
    try:
        yield lock
    except BaseException:
        lock.release()
        if made:
            (checkpoints / LOCK).unlink(missing_ok=True)
            for path in made:
                with suppress(OSError):  # not empty: the start was not refused, but cut off later
                    path.rmdir()
        raise
