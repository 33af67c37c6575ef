"""The notebooks' jobs from a terminal: python -m dpo_helpers train | experiment | data | judge | doctor |
merge | share.
"""

import argparse
import io
import json
import os
import sys
from pathlib import Path

from dpo_helpers.config import RunConfig
from dpo_helpers.errors import TrainingStopped, UserError
from dpo_helpers.files import explain_error
from dpo_helpers.setup.doctor import run_doctor


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0 done, 1 rows or settings that failed, 2 a problem that the user can solve (told
    on standard error), 3 stopped by NaN, 130 stopped by Ctrl-C; doctor has its own.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's is not a terminal's
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows only ascii ends no training
    arguments = make_parser().parse_args(argv)
    follows = int(os.environ.get("RANK", "0")) > 0  # one of several processes: the first one does the talking
    if follows:
        sys.stdout = io.StringIO()
    jobs = {
        "train": run_train,
        "experiment": run_experiment,
        "data": run_data,
        "judge": run_judge,
        "doctor": lambda a: run_doctor(a.fix, a.json, a.metadata_only),
        "merge": run_merge,
        "share": run_share,
    }
    try:
        return jobs[arguments.job](arguments)
    except UserError as error:
        if not follows:
            print(f"⚠️ {error}", file=sys.stderr)
        return {"nan": 3, "interrupted": 130}[error.reason] if isinstance(error, TrainingStopped) else 2
    except KeyboardInterrupt:
        print("⚠️ 中断しました。もう一度同じように実行すると、続きから始まります。", file=sys.stderr)
        return 130
    except Exception as error:
        if (text := explain_error(error)) is None:
            raise
        print(f"⚠️ {text}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dpo_helpers", description="DPO と LoRA の学習をターミナルから実行します。"
    )
    jobs = parser.add_subparsers(dest="job", required=True)

    def device(job):
        job.add_argument("--device", default="auto", help="auto, cuda, cpu（既定：auto）")

    def on_error(job):
        job.add_argument(
            "--on-error",
            choices=("raise", "drop"),
            default="raise",
            help="データの誤りのある行で止める（raise）か除く（drop）か",
        )

    job = jobs.add_parser("train", help="学習、評価、保存をまとめて実行する")
    job.add_argument("--config", help="設定ファイル（run_config.json）。省くと既定の設定を使う")
    job.add_argument(
        "--set", action="append", default=[], metavar="名前=値", help="設定を一つ変える（何度でも書ける）"
    )
    job.add_argument("--run-dir", default="run", help="結果を置くフォルダ（既定：run）")
    job.add_argument("--mirror", metavar="DIR", help="コピーを置くフォルダ（Google Drive など）")
    job.add_argument(
        "--resume", choices=("auto", "never"), default="auto", help="続きから（auto）か、最初から（never）か"
    )
    job.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="列名=名前",
        help="データの列名の対応。例：質問文=prompt",
    )
    job.add_argument("--data", default="", metavar="FILE", help="自分のデータのファイルか Hub の名前")
    on_error(job)
    device(job)
    job = jobs.add_parser("experiment", help="設定を比べる実験を行い、結果を 1 行ずつ残す")
    job.add_argument(
        "--grid",
        required=True,
        metavar="FILE",
        help='試す設定の JSON：{"settings": {"beta": [0.1, 0.5]}, "common": {...}, "seeds": [...]}',
    )
    job.add_argument("--results", required=True, metavar="FILE", help="結果を 1 行ずつ加える JSONL")
    job.add_argument("--mirror", metavar="DIR", help="結果のコピーを置くフォルダ（Google Drive など）")
    job.add_argument(
        "--retry-failed", action="store_true", help="失敗した設定（NaN を除く）をもう一度実行する"
    )
    device(job)
    job = jobs.add_parser("data", help="学習データを生成する、自分のデータを検査する")
    job.add_argument("--count", type=int, default=1000, help="生成する行数（既定：1000）")
    job.add_argument("--seed", type=int, default=42, help="乱数シード（既定：42）")
    job.add_argument("--output", metavar="FILE", help="行を書き込む JSONL ファイル")
    job.add_argument("--check", metavar="FILE", help="自分のファイル（または Hub の名前）を検査する")
    job.add_argument(
        "--column", action="append", default=[], metavar="列名=名前", help="列名の対応。例：質問文=prompt"
    )
    on_error(job)
    job.add_argument("--dropped-file", metavar="FILE", help="除いた行の一覧を書き込む JSONL ファイル")
    job.add_argument("--tokenizer", metavar="NAME", help="トークン数も調べるモデルの名前")
    job.add_argument(
        "--max-length", type=int, default=128, help="質問と回答を合わせた長さの上限（トークン、既定：128）"
    )
    job.add_argument("--json", action="store_true", help="結果をプログラム用の JSON で書く")
    job = jobs.add_parser("judge", help="保存した学習の結果を測り直して判定する")
    job.add_argument("run_dir", metavar="RUN_DIR", help="結果のフォルダ")
    job.add_argument("--json", action="store_true", help="判定を JSON で表示する")
    job = jobs.add_parser("doctor", help="環境を診断し、--fix で修復する")
    job.add_argument("--fix", action="store_true", help="診断に従って修復する（付けなければ、調べるだけ）")
    job.add_argument("--json", action="store_true", help="結果をプログラム用の JSON で書く")
    job.add_argument(
        "--metadata-only", action="store_true", help="試しの学習を省き、パッケージの情報だけで判断する"
    )
    job = jobs.add_parser("merge", help="学習したアダプターをベースモデルと一つにする")
    job.add_argument("run_dir", help="学習を終えたフォルダ")
    job.add_argument("target", help="一つにしたモデルを置く、新しいフォルダ")
    job = jobs.add_parser(
        "share", help="モデルカードを作り、Hugging Face Hub に送る（--push まで何も送らない）"
    )
    job.add_argument("run_dir", help="学習を終えたフォルダ、または merge で作ったフォルダ")
    job.add_argument(
        "--repo", required=True, metavar="NAME", help="Hugging Face Hub のリポジトリ（ユーザー名/モデル名）"
    )
    job.add_argument("--push", action="store_true", help="実際に送る（付けなければ、送るものを見せるだけ）")
    job.add_argument("--public", action="store_true", help="だれでも見られるようにする（付けなければ非公開）")
    return parser


def read_settings(pairs: list[str]) -> dict:
    """Turn KEY=VALUE words into a dict; the knobs may be in capitals, as in the notebook's forms."""
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise UserError(
            f"--set は 名前=値 の形で書いてください（誤り：{', '.join(wrong)}）。例：--set num_samples=300"
        )
    return {name.strip().lower(): value for name, value in (pair.split("=", 1) for pair in pairs)}


def run_train(arguments) -> int:
    config = RunConfig.load(arguments.config) if arguments.config else RunConfig()
    config = config.replace(read_settings(arguments.set), "--set")
    where = arguments.run_dir, arguments.device, arguments.mirror
    train(config, *where, arguments.resume, arguments.data, arguments.on_error, arguments.column)
    return 0


def train(
    config: RunConfig, folder, device="auto", mirror=None, resume="auto", data="", on_error="raise", column=()
) -> dict:
    """Run the whole way of the main notebook, without a notebook; return what metrics.json holds.

    A finished run is not repeated: its metrics are returned as they are. Under `accelerate launch` every
    process calls this, and all but the first are done when the training is: they return {}.
    """
    from accelerate import PartialState

    from dpo_helpers.data.generate import split_rows
    from dpo_helpers.data.own_rows import collect_rows, parse_columns
    from dpo_helpers.judge.measure import BEFORE_ROWS, evaluate_run
    from dpo_helpers.judge.scores import measure_before
    from dpo_helpers.judge.verdict import describe_verdict, judge
    from dpo_helpers.keep.result import make_zip
    from dpo_helpers.keep.run import open_shared_run
    from dpo_helpers.machine import Stopwatch, describe_machine, find_machine
    from dpo_helpers.model.load import load_tokenizer
    from dpo_helpers.train.stages import build_metrics, save_result, train_dpo, train_sft
    from dpo_helpers.train.trainers import build_dpo_trainer

    clock = Stopwatch()
    with clock("setup"):
        machine = find_machine(device)
        print(describe_machine(machine))
        run = open_shared_run(config, folder, machine, mirror, resume, clock)
    try:
        # the first process makes or downloads the model
        with clock("setup"), PartialState().main_process_first():
            tokenizer = load_tokenizer(str(run.base or config.model_name))
        with clock("data"), PartialState().main_process_first():
            rows = collect_rows(config, tokenizer, data, on_error, run.folder, parse_columns(column))
            train_rows, held_out_rows = split_rows(rows, config.held_out_fraction, config.seed)
            run.check_rows(train_rows, held_out_rows, generated=not data)
            print(f"学習用 {len(train_rows)} 行、評価用 {len(held_out_rows)} 行")
        if (metrics := run.read_finished()) is None:
            warmed_up = train_sft(run, config, machine, train_rows)
            trainer = build_dpo_trainer(run, config, machine, train_rows, held_out_rows, warmed_up)
            before = measure_before(trainer.model, tokenizer, held_out_rows[:BEFORE_ROWS], config.max_length)
            trainer = train_dpo(run, config, machine, train_rows, held_out_rows, trainer, warmed_up)
            if not run.leads:
                return {}
            with clock("evaluation"):
                measured = evaluate_run(trainer.model, tokenizer, train_rows, held_out_rows, config, before)
            metrics = build_metrics(run, config, machine, train_rows, trainer) | measured.metrics
            metrics["verdict"] = judge(metrics, trainer.state.log_history)
            save_result(run, config, train_rows, held_out_rows, trainer, metrics)
        if mirror and not run.deliver():
            print(f"結果をまとめた zip：{make_zip(run.folder)}")
    finally:
        run.close()
    print(describe_verdict(metrics["verdict"]))
    held_out = metrics["held_out"]
    print(f"評価用の損失 {held_out['loss']:.4f}、正解率 {held_out['accuracy']:.1%}。結果：{run.folder}")
    return metrics


def run_experiment(arguments) -> int:
    """Run a grid and print its table; return 0, or 1 if a run failed."""
    from dpo_helpers.machine import find_machine
    from dpo_helpers.sweep.plan import Results, load_grid, run_plan
    from dpo_helpers.sweep.report import summarize_outcomes
    from dpo_helpers.sweep.runs import Workshop
    from dpo_helpers.tables import quiet_libraries

    plan, results = load_grid(arguments.grid), Results(arguments.results, arguments.mirror)
    quiet_libraries()
    outcomes = run_plan(plan, results, Workshop(find_machine(arguments.device)), arguments.retry_failed)
    for line in summarize_outcomes(outcomes):
        print("、".join(f"{name} {value}" for name, value in line.items() if value != ""))
    return int(any(record["status"] == "failed" for _, record in outcomes))


def run_data(arguments) -> int:
    """Generate or check rows as the options say; return 0, or 1 for row errors (told on standard error)."""
    from dpo_helpers.data import own_rows
    from dpo_helpers.model.load import load_tokenizer

    return own_rows.run_data(arguments, load_tokenizer)


def run_judge(arguments) -> int:
    """Measure a saved run again on its held-out rows and print the verdict; return 0, whatever the label."""
    from dpo_helpers.files import read_json, read_rows
    from dpo_helpers.judge.measure import evaluate_run
    from dpo_helpers.judge.verdict import describe_verdict, judge
    from dpo_helpers.keep.result import load_run

    folder = Path(arguments.run_dir)
    metrics = read_json(folder / "metrics.json", "学習の記録")
    log = read_json(folder / "log_history.json", "学習の記録")
    if "stopped" not in metrics:
        model, tokenizer, config = load_run(folder)
        rows = [read_rows(folder / name, "学習と評価の行") for name in ("train.jsonl", "held_out.jsonl")]
        metrics |= evaluate_run(model, tokenizer, *rows, config, metrics["before"]).metrics
    verdict = judge(metrics, log)
    print(json.dumps(verdict, ensure_ascii=False, indent=2) if arguments.json else describe_verdict(verdict))
    return 0


def run_merge(arguments) -> int:
    from dpo_helpers.keep.share import merge_adapter

    merge_adapter(arguments.run_dir, arguments.target)
    return 0


def run_share(arguments) -> int:
    from dpo_helpers.keep.share import push_to_hub

    push_to_hub(arguments.run_dir, arguments.repo, dry_run=not arguments.push, public=arguments.public)
    return 0


if __name__ == "__main__":
    sys.exit(main())
