"""Does the notebooks' jobs from a terminal: `python -m dpo_helpers train | experiment | data | judge |
doctor | merge | share`.
"""

import argparse
import io
import os
import sys

from dpo_helpers.config import RunConfig, TrainingStopped, UserError
from dpo_helpers.data import own_rows as own_data
from dpo_helpers.judge import measure as judge
from dpo_helpers.judge import verdict
from dpo_helpers.keep import share as sharing
from dpo_helpers.setup.doctor import run_doctor
from dpo_helpers.sweep import plan as experiments


def train(
    config: RunConfig,
    folder,
    device: str = "auto",
    mirror=None,
    resume: str = "auto",
    data: str = "",
    on_error: str = "raise",
) -> dict:
    """Run the whole way of the main notebook, without a notebook; return what metrics.json holds.

    A finished run is not repeated: its metrics are returned as they are. Under `accelerate launch` every
    process calls this, and all but the first are done when the training is: they return {}.
    """
    from accelerate import PartialState

    from dpo_helpers.data.generate import split_rows
    from dpo_helpers.judge.monitoring import build_metrics
    from dpo_helpers.judge.scores import score_rows
    from dpo_helpers.keep.run import open_shared_run
    from dpo_helpers.keep.storage import make_zip, save_run
    from dpo_helpers.machine import Stopwatch, describe_machine, find_machine
    from dpo_helpers.model.load import load_tokenizer
    from dpo_helpers.train.trainers import build_dpo_trainer, train_dpo, train_sft

    clock = Stopwatch()
    with clock("setup"):
        machine = find_machine(device)
        print(describe_machine(machine))
        run = open_shared_run(config, folder, machine, mirror, resume, clock)
    try:
        with (
            clock("setup"),
            PartialState().main_process_first(),
        ):  # the first one makes the embedded model, or downloads
            tokenizer = load_tokenizer(config.model_name, config.seed, config.held_out_fraction)
        with clock("data"), PartialState().main_process_first():
            rows = own_data.collect_rows(config, tokenizer, data, on_error, run.folder)
            run.use_rows(*split_rows(rows, config.held_out_fraction, config.seed))
            print(f"学習用 {len(run.train_rows)} 行、評価用 {len(run.held_out_rows)} 行")
        if (metrics := run.read_finished()) is None:
            warmed_up = train_sft(run)
            trainer = train_dpo(run, build_dpo_trainer(run, warmed_up), warmed_up)
            if not run.leads:
                return {}
            with clock("evaluation"):
                scores = score_rows(trainer.model, tokenizer, run.held_out_rows, config.max_length)
                measured, _ = judge.evaluate_run(trainer.model, tokenizer, run.held_out_rows, scores, config)
            metrics = build_metrics(run, trainer) | measured
            metrics["verdict"] = verdict.judge(metrics, trainer.state.log_history)
            save_run(run, trainer, metrics)
        if mirror and not run.deliver():
            print(f"結果をまとめた zip：{make_zip(run.folder)}")
    finally:
        run.close()
    print(
        verdict.describe_verdict(metrics.get("verdict") or judge.judge_folder(run.folder))
    )  # a run of an older version has none
    held_out = metrics["held_out"]
    print(f"評価用の損失 {held_out['loss']:.4f}、正解率 {held_out['accuracy']:.1%}。結果：{run.folder}")
    return metrics


OTHER_JOBS = {
    "experiment": experiments.run_experiment,
    "data": own_data.run_data,
    "judge": judge.run_judge,
    "doctor": lambda arguments: run_doctor(arguments.fix, arguments.json, arguments.metadata_only),
    "merge": sharing.run_merge,
    "share": sharing.run_share,
}


def read_settings(pairs: list[str]) -> dict:
    """Turn KEY=VALUE words into a dict; the knobs may be in capitals, as in the notebook's forms."""
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise UserError(
            f"--set は 名前=値 の形で書いてください（誤り：{', '.join(wrong)}）。例：--set num_samples=300"
        )
    return {name.strip().lower(): value for name, value in (pair.split("=", 1) for pair in pairs)}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dpo_helpers", description="DPO と LoRA の学習をターミナルから実行します。"
    )
    jobs = parser.add_subparsers(dest="job", required=True)
    job = jobs.add_parser("train", help="学習、評価、保存をまとめて実行する")
    job.add_argument("--config", help="設定ファイル（run_config.json）。省くと既定の設定を使う")
    job.add_argument(
        "--set", action="append", default=[], metavar="名前=値", help="設定を一つ変える（何度でも書ける）"
    )
    job.add_argument("--run-dir", default="run", help="結果を置くフォルダー（既定：run）")
    job.add_argument(
        "--mirror", metavar="DIR", help="チェックポイントと結果の写しを置くフォルダー（Google Drive など）"
    )
    job.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="前の続きから（auto、既定）か、最初から（never）か",
    )
    job.add_argument(
        "--data",
        default="",
        metavar="FILE",
        help="自分のデータのファイルか Hub のデータセット名。省くと生成する",
    )
    job.add_argument(
        "--on-error",
        choices=("raise", "drop"),
        default="raise",
        help="データの誤りのある行で止める（raise）か除く（drop）か",
    )
    job.add_argument("--device", default="auto", help="auto, cuda, mps, cpu（既定：auto）")
    experiments.add_experiment_arguments(
        jobs.add_parser("experiment", help="設定を比べる実験を行い、結果を 1 行ずつ残す")
    )
    own_data.add_data_arguments(jobs.add_parser("data", help="学習データを生成する、自分のデータを検査する"))
    judge.add_judge_arguments(jobs.add_parser("judge", help="保存した学習の結果を判定する"))
    job = jobs.add_parser("doctor", help="環境を診断し、--fix で修復する")
    job.add_argument("--fix", action="store_true", help="見つけた故障を直します（なければ診断だけ）")
    job.add_argument("--json", action="store_true", help="結果を JSON で標準出力に書きます")
    job.add_argument(
        "--metadata-only", action="store_true", help="試し学習を省き、パッケージの情報だけで判断します"
    )
    sharing.add_merge_arguments(jobs.add_parser("merge", help="学習したアダプターをベースモデルと一つにする"))
    sharing.add_share_arguments(
        jobs.add_parser(
            "share", help="モデルカードを作り、Hugging Face Hub に送る（--push まで何も送らない）"
        )
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0 done, 2 a problem that the user can solve (told on standard error), 3 stopped
    by NaN, 130 stopped by Ctrl-C; doctor has its own.
    """
    arguments = make_parser().parse_args(argv)
    follows = (
        int(os.environ.get("RANK", "0")) > 0
    )  # one of several processes, and not the first: what it would say has been said
    if follows:
        sys.stdout = io.StringIO()
    try:
        if arguments.job != "train":
            return OTHER_JOBS[arguments.job](arguments)
        config = RunConfig.load(arguments.config) if arguments.config else RunConfig()
        train(
            config.replace(read_settings(arguments.set), "--set"),
            arguments.run_dir,
            arguments.device,
            arguments.mirror,
            arguments.resume,
            arguments.data,
            arguments.on_error,
        )
        return 0
    except UserError as error:
        if not follows:
            print(f"⚠️ {error}", file=sys.stderr)
        return {"nan": 3, "interrupted": 130}[error.reason] if isinstance(error, TrainingStopped) else 2


if __name__ == "__main__":
    sys.exit(main())
