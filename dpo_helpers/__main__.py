"""Does the notebooks' jobs from a terminal: `python -m dpo_helpers train | data | doctor`."""

import argparse
import sys
from pathlib import Path

from dpo_helpers import own_data, quick_fix
from dpo_helpers.config import RunConfig, UserError


def train(config: RunConfig, folder, device: str = "auto") -> dict:
    """Run the whole way of the main notebook, without a notebook; return what metrics.json holds."""
    from dpo_helpers.environment import Stopwatch, describe_machine, find_machine
    from dpo_helpers.evaluation import score_rows, summarize_scores
    from dpo_helpers.monitoring import build_metrics
    from dpo_helpers.preferences import generate_preferences, split_rows
    from dpo_helpers.storage import prepare_run_folder, save_run, write_json
    from dpo_helpers.training import build_dpo_trainer, sample_curve_rows, train_dpo, train_sft

    clock = Stopwatch()
    with clock("setup"):
        folder = prepare_run_folder(folder, config)
        machine = find_machine(device)
        print(describe_machine(machine))
    with clock("data"):
        rows = generate_preferences(config.num_samples, config.seed, config.held_out_fraction)
        train_rows, held_out_rows = split_rows(rows, config.held_out_fraction, config.seed)
        print(f"学習用 {len(train_rows)} 行、評価用 {len(held_out_rows)} 行")
    work = folder.with_name(f"{folder.name}-work")
    with clock("sft"):
        warmed_up, sft_log = train_sft(config, train_rows, work, machine)
    trainer = build_dpo_trainer(config, train_rows, sample_curve_rows(held_out_rows), work, machine, warmed_up)
    tokenizer = trainer.processing_class
    with clock("training"):
        train_dpo(trainer)
    with clock("evaluation"):
        held_out = summarize_scores(score_rows(trainer.model, tokenizer, held_out_rows, config.max_length), config.beta)
    metrics = build_metrics(config, trainer, held_out, clock.seconds, machine)
    with clock("saving"):
        save_run(folder, trainer.model, tokenizer, train_rows, held_out_rows, trainer.state.log_history, sft_log, metrics)
    metrics["seconds"]["saving"] = clock.seconds["saving"]
    write_json(folder / "metrics.json", metrics)
    print(f"評価用の損失 {held_out['loss']:.4f}、正解率 {held_out['accuracy']:.1%}。結果：{folder}")
    return metrics


def read_settings(pairs: list[str]) -> dict:
    """Turn KEY=VALUE words into a dict; the knobs may be in capitals, as in the notebook's forms."""
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise UserError(f"--set は 名前=値 の形で書いてください（誤り：{', '.join(wrong)}）。例：--set num_samples=300")
    return {name.strip().lower(): value for name, value in (pair.split("=", 1) for pair in pairs)}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dpo_helpers", description="DPO と LoRA の学習をターミナルから実行します。")
    jobs = parser.add_subparsers(dest="job", required=True)
    job = jobs.add_parser("train", help="学習、評価、保存をまとめて実行する")
    job.add_argument("--config", help="設定ファイル（run_config.json）。省くと既定の設定を使う")
    job.add_argument("--set", action="append", default=[], metavar="名前=値", help="設定を一つ変える（何度でも書ける）")
    job.add_argument("--run-dir", default="run", help="結果を置くフォルダー（既定：run）")
    job.add_argument("--device", default="auto", help="auto, cuda, mps, cpu（既定：auto）")
    own_data.add_data_arguments(jobs.add_parser("data", help="学習データを生成する、自分のデータを検査する"))
    quick_fix.add_doctor_arguments(jobs.add_parser("doctor", help="環境を診断し、--fix で修復する"))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0 done, 2 a problem that the user can solve (told on standard error); doctor has its own."""
    arguments = make_parser().parse_args(argv)
    try:
        if arguments.job == "doctor":
            return quick_fix.run_doctor(arguments)
        if arguments.job == "data":
            return own_data.run_data(arguments)
        config = RunConfig.load(arguments.config) if arguments.config else RunConfig()
        train(config.replace(read_settings(arguments.set), "--set"), Path(arguments.run_dir), arguments.device)
        return 0
    except UserError as error:
        print(f"⚠️ {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
