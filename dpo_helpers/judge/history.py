"""Reads the trainer's log history; it measures nothing itself."""

KEYS = {
    "loss": "loss",
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "chosen": "logps/chosen",
    "rejected": "logps/rejected",
}


def collect_history(log_history: list[dict]) -> dict[str, dict[str, list[float]]]:
    """Return {"training" | "held_out": {step, loss, accuracy, margin, chosen, rejected}} from a Trainer's log
    history.

    `chosen` and `rejected` are mean log-probs in nats under the policy; `margin` is the mean of beta *
    log-ratio difference.
    """
    curves = {}
    for name, prefix in (("training", ""), ("held_out", "eval_")):
        needed = (prefix + KEYS["margin"], prefix + "loss")
        entries = [entry for entry in log_history if all(key in entry for key in needed)]
        curves[name] = {"step": [entry["step"] for entry in entries]}
        curves[name] |= {ours: [entry[prefix + theirs] for entry in entries] for ours, theirs in KEYS.items()}
    return curves


def summarize_training(log_history: list[dict]) -> dict[str, float]:
    """Return first_loss (step 1, before any update: ln 2) and final_train_loss (mean of the last 10 % of
    steps).

    {} for an empty log.
    """
    curve = collect_history(log_history)["training"]
    if not curve["step"]:
        return {}
    last = curve["step"][-1]
    tail = [loss for step, loss in zip(curve["step"], curve["loss"], strict=True) if step > 0.9 * last]
    return {"first_loss": curve["loss"][0], "final_train_loss": sum(tail) / len(tail)}
