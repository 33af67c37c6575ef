"""Compare generate_response on a list of questions with the same questions one by one, alternating.

    python tools/bench_generate.py MODEL_FOLDER|embedded outputs/bench_generate.json [--threads 2] [--rounds 5] [--questions 32]

It counts how many greedy answers are the same both ways. Take a trained model for that: random weights make
near ties, which the rounding of another batch size decides otherwise.
"""

import argparse
import json
import statistics
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("result", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=80)
    arguments = parser.parse_args()
    import torch

    from dpo_helpers.config import RunConfig
    from dpo_helpers.data.generate import generate_preferences
    from dpo_helpers.model.answer import generate_response
    from dpo_helpers.model.load import load_base_model
    from dpo_helpers.tables import quiet_libraries

    torch.set_num_threads(arguments.threads)
    quiet_libraries()
    model, tokenizer = load_base_model(RunConfig(model_name=arguments.model))
    questions = list(dict.fromkeys(row["prompt"] for row in generate_preferences(1000, seed=42)))[
        : arguments.questions
    ]
    limit = {"max_new_tokens": arguments.max_new_tokens}

    def answer_alone():
        return [generate_response(model, tokenizer, question, **limit) for question in questions]

    def answer_together():
        return generate_response(model, tokenizer, questions, **limit)

    ways, seconds, cpu_seconds, answers = {"alone": answer_alone, "together": answer_together}, {}, {}, {}
    generate_response(model, tokenizer, questions[:2], **limit)  # caches and imports
    for _ in range(arguments.rounds):
        for name, answer in ways.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            answers[name] = answer()
            seconds.setdefault(name, []).append(time.perf_counter() - start)
            cpu_seconds.setdefault(name, []).append(time.process_time() - cpu_start)

    def compare(times):
        return round(
            statistics.median(a / b for a, b in zip(times["alone"], times["together"], strict=True)), 2
        )

    result = {
        "model": arguments.model,
        "questions": len(questions),
        "ratio": compare(seconds),
        "ratio_of_cpu_seconds": compare(
            cpu_seconds
        ),  # what to look at where other programs share the machine
        "seconds": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
        "same_answers": sum(a == b for a, b in zip(answers["alone"], answers["together"], strict=True)),
        "mean_characters": round(statistics.mean(map(len, answers["together"])), 1),
        "threads": arguments.threads,
    }
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    print(json.dumps(result, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
