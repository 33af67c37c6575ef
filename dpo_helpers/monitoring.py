"""Collects the trainer's log and draws it; it measures nothing itself."""

import math


def collect_history(log_history: list[dict]) -> dict[str, dict[str, list[float]]]:
    """Return {"training" | "held_out": {step, loss, accuracy, margin, chosen, rejected}} from a Trainer's log history.

    `chosen` and `rejected` are mean log-probs in nats under the policy; `margin` is the mean of beta * log-ratio difference.
    """
    keys = {"loss": "loss", "accuracy": "rewards/accuracies", "margin": "rewards/margins", "chosen": "logps/chosen",
            "rejected": "logps/rejected"}  # fmt: skip
    curves = {}
    for name, prefix in (("training", ""), ("held_out", "eval_")):
        entries = [entry for entry in log_history if prefix + keys["margin"] in entry and prefix + "loss" in entry]
        curves[name] = {"step": [entry["step"] for entry in entries]}
        curves[name] |= {ours: [entry[prefix + theirs] for entry in entries] for ours, theirs in keys.items()}
    return curves


def summarize_training(log_history: list[dict]) -> dict[str, float]:
    """Return first_loss (step 1, before any update: ln 2) and final_train_loss (mean of the last 10 % of steps); {} for no log."""
    curve = collect_history(log_history)["training"]
    if not curve["step"]:
        return {}
    last = curve["step"][-1]
    tail = [loss for step, loss in zip(curve["step"], curve["loss"], strict=True) if step > 0.9 * last]
    return {"first_loss": curve["loss"][0], "final_train_loss": sum(tail) / len(tail)}


def plot_training(log_history: list[dict], path=None):
    """Draw loss, accuracy, margin and log-prob drift against the step, training beside held-out; save to `path` if given."""
    import matplotlib.pyplot as plt
    import matplotlib_fontja  # noqa: F401  (imported for its effect: a font with Japanese glyphs)

    curves = collect_history(log_history)
    blue, orange, grey = "#0072B2", "#D55E00", "#666666"  # distinguishable with any colour vision (Okabe and Ito 2008)
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    panels = (
        ("loss", "損失", "損失：下がるほど良い", math.log(2), "ln 2（学習前）"),
        ("accuracy", "正解率", "正解率：良い回答を選べた割合", 0.5, "0.5（当てずっぽう）"),
        ("margin", "マージン（β × 対数確率比の差）", "マージン：二つの回答の差", 0.0, "0（学習前）"),
    )
    for axis, (key, label, title, level, level_label) in zip(axes.flat, panels, strict=False):
        axis.axhline(level, color=grey, linestyle=":", label=level_label)
        for name, text, style in (
            ("training", "学習", {"color": blue}),
            ("held_out", "評価（学習に使わない概念）", {"color": orange, "marker": "o"}),
        ):
            axis.plot(curves[name]["step"], curves[name][key], label=text, **style)
        axis.set(title=title, xlabel="ステップ", ylabel=label)
        axis.legend(fontsize=9)
    axis = axes[1, 1]
    for key, text, color in (("chosen", "良い回答", blue), ("rejected", "悪い回答", orange)):
        values = curves["held_out"][key]  # empty where a run was stopped before its first evaluation
        axis.plot(curves["held_out"]["step"], [value - values[0] for value in values], color=color, marker="o", label=text)
    axis.axhline(0, color=grey, linestyle=":")
    axis.set(title="対数確率の変化（評価）", xlabel="ステップ", ylabel="学習前からの差（nat）")
    axis.legend(fontsize=9)
    if path is not None:
        figure.savefig(path, dpi=110)
    plt.close(figure)  # the notebook shows the returned figure once, not also the open one
    return figure


def build_metrics(run, trainer, held_out: dict | None = None, baselines: dict | None = None) -> dict:
    """Put together what metrics.json says of a run: numbers as measured, in nats, bytes and seconds.

    `resumed_at` are the steps that interrupted processes went on from, `steps_executed` the optimizer steps of this process.
    """
    from importlib.metadata import version

    from dpo_helpers.environment import measure_peak_memory
    from dpo_helpers.modeling import count_parameters

    trainable, total = count_parameters(trainer.model)
    seconds, steps = run.clock.seconds, trainer.state.global_step
    pairs = min(steps * run.config.effective_batch_size, round(len(run.train_rows) * run.config.num_train_epochs))
    packages = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")
    return {
        **summarize_training(trainer.state.log_history),
        **({"held_out": held_out, "baselines": baselines} if held_out else {}),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "training_rows": len(run.train_rows),
        "steps": steps,
        "resumed_at": run.resumed_at,
        "resumed_stages": run.resumed_stages,
        "steps_executed": run.steps_executed,
        "pairs_per_second": round(pairs / seconds["training"], 3) if seconds.get("training") else None,
        "seconds": {phase: seconds.get(phase, 0.0) for phase in ("setup", "data", "sft", "training", "evaluation", "saving")},
        "peak_memory_bytes": measure_peak_memory(run.machine.device),
        "device": run.machine.name,
        "precision": run.machine.precision,
        "versions": {name: version(name) for name in packages},
    }


def describe_metrics(metrics: dict) -> list[dict]:
    """Return the figures of metrics.json that a reader wants first, as rows of a Japanese table."""
    held_out, seconds = metrics["held_out"], metrics["seconds"]
    return [
        {"項目": "最初の損失（学習用）", "値": f"{metrics['first_loss']:.4f}", "見方": "学習前は ln 2 = 0.6931"},
        {"項目": "最後の損失（学習用）", "値": f"{metrics['final_train_loss']:.4f}", "見方": "最後の 1 割のステップの平均"},
        {"項目": f"損失（評価用 {held_out['rows']} 行）", "値": f"{held_out['loss']:.4f}", "見方": "0.6931 より小さいほど良い"},
        {"項目": "正解率（評価用）", "値": f"{held_out['accuracy']:.1%}", "見方": "当てずっぽうなら 50 %"},
        {
            "項目": "マージン（評価用）",
            "値": f"{held_out['margin']:.3f}",
            "見方": "学習前は 0。大きいほど、二つの回答をはっきり区別している",
        },
        {
            "項目": "良い回答の対数確率の変化",
            "値": f"{held_out['chosen_log_prob_change']:+.2f}",
            "見方": "1 回答あたり（nat）。下がることも多い",
        },
        {
            "項目": "悪い回答の対数確率の変化",
            "値": f"{held_out['rejected_log_prob_change']:+.2f}",
            "見方": "良い回答より大きく下がるのが狙い",
        },
        {
            "項目": "速さ",
            "値": f"{metrics['pairs_per_second']:.2f} 組/秒",
            "見方": f"DPO {seconds['training']:.0f} 秒、教師あり学習 {seconds['sft']:.0f} 秒",
        },
        {"項目": "メモリーの最大", "値": f"{metrics['peak_memory_bytes'] / 1e9:.2f} GB", "見方": "GPU があれば GPU、なければこの処理全体"},
    ]
