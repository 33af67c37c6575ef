"""Collects the trainer's log and puts a run's metrics together; it measures nothing itself."""


def collect_history(log_history: list[dict]) -> dict[str, dict[str, list[float]]]:
    """Return {"training" | "held_out": {step, loss, accuracy, margin, chosen, rejected}} from a Trainer's log
    history.

    `chosen` and `rejected` are mean log-probs in nats under the policy; `margin` is the mean of beta *
    log-ratio difference.
    """
    keys = {
        "loss": "loss",
        "accuracy": "rewards/accuracies",
        "margin": "rewards/margins",
        "chosen": "logps/chosen",
        "rejected": "logps/rejected",
    }
    curves = {}
    for name, prefix in (("training", ""), ("held_out", "eval_")):
        entries = [
            entry for entry in log_history if prefix + keys["margin"] in entry and prefix + "loss" in entry
        ]
        curves[name] = {"step": [entry["step"] for entry in entries]}
        curves[name] |= {ours: [entry[prefix + theirs] for entry in entries] for ours, theirs in keys.items()}
    return curves


def summarize_training(log_history: list[dict]) -> dict[str, float]:
    """Return first_loss (step 1, before any update: ln 2) and final_train_loss (mean of the last 10 % of
    steps); {} for no log.
    """
    curve = collect_history(log_history)["training"]
    if not curve["step"]:
        return {}
    last = curve["step"][-1]
    tail = [loss for step, loss in zip(curve["step"], curve["loss"], strict=True) if step > 0.9 * last]
    return {"first_loss": curve["loss"][0], "final_train_loss": sum(tail) / len(tail)}


def describe_metrics(metrics: dict) -> list[dict]:
    """Return the figures of metrics.json that a reader wants first, as rows of a Japanese table."""
    held_out, seconds = metrics["held_out"], metrics["seconds"]
    return [
        {
            "項目": "最初の損失（学習用）",
            "値": f"{metrics['first_loss']:.4f}",
            "見方": "学習前は ln 2 = 0.6931",
        },
        {
            "項目": "最後の損失（学習用）",
            "値": f"{metrics['final_train_loss']:.4f}",
            "見方": "最後の 1 割のステップの平均",
        },
        {
            "項目": f"損失（評価用 {held_out['rows']} 行）",
            "値": f"{held_out['loss']:.4f}",
            "見方": "0.6931 より小さいほど良い",
        },
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
        {
            "項目": "メモリーの最大",
            "値": f"{metrics['peak_memory_bytes'] / 1e9:.2f} GB",
            "見方": "GPU があれば GPU、なければこの処理全体",
        },
    ]
