import json
import random
import shutil

import pytest

from dpo_helpers.__main__ import make_parser, run_data
from dpo_helpers.config import RunConfig
from dpo_helpers.data.own_rows import load_preferences
from dpo_helpers.data.tokens import (
    build_token_report,
    describe_token_report,
    drop_unusable,
    encode_answers,
    encode_prompts,
    find_end_of_turn,
    find_opening,
    measure_rows,
    plot_token_report,
    settle_template,
)
from dpo_helpers.errors import UserError
from dpo_helpers.model.load import load_tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|endoftext|>{% "
    "endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_row(question: str, chosen: str, rejected: str) -> dict:
    return {"prompt": f"質問: {question}\n回答:\n", "chosen": chosen, "rejected": rejected}


@pytest.fixture(scope="module")
def mixed_rows(rows):
    """Ordinary rows, one with a prompt of 150 tokens and more, one whose answers differ late, two that merge
    over the boundary (the second in its 40th token), and one that ends with the end mark already.
    """
    return [
        *rows[:20],
        make_row("とても長い質問です。" * 20, "はい。", "いいえ。"),
        make_row("長い回答は？", "同じ文です。" * 30 + "良い。", "同じ文です。" * 30 + "悪い。"),
        {"prompt": "Question: q\nAnswer: ", "chosen": "yes", "rejected": "no"},
        {"prompt": "x" + " y" * 38 + " ", "chosen": "yes, it is", "rejected": "no, it is not"},
        make_row("終わりは？", "はい。<|endoftext|>", "いいえ。"),
    ]


@pytest.fixture(scope="module")
def small_model(tmp_path_factory, gpt2_tokenizer):
    """The folder of a random one-layer model with GPT-2's real vocabulary, whose tokens do merge over a
    space.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small")
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=256)).save_pretrained(folder)
    gpt2_tokenizer.save_pretrained(folder)
    return folder


def prepare(rows, folder, tmp_path, max_length, chat=False):
    """Return the token ids of (prompt, chosen, rejected) as the installed trainer prepared them, and its
    tokenizer.
    """
    from dpo_helpers.keep.run import Run
    from dpo_helpers.machine import Stopwatch, find_machine
    from dpo_helpers.train.trainers import build_dpo_trainer

    if chat:
        folder = shutil.copytree(folder, tmp_path / "chat")
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    config = RunConfig(model_name=str(folder), max_length=max_length, sft_epochs=0)
    machine = find_machine("cpu")
    run = Run(tmp_path / "run", config, machine, Stopwatch())
    trainer = build_dpo_trainer(run, config, machine, rows, rows[:2])
    prepared = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in trainer.train_dataset]
    return prepared, trainer.processing_class


@pytest.mark.versions
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("max_length", [40, 150])
def test_the_counts_are_those_of_the_installed_trainer(mixed_rows, small_model, tmp_path, max_length, chat):
    prepared, tokenizer = prepare(mixed_rows, small_model, tmp_path, max_length, chat)
    report = build_token_report(measure_rows(mixed_rows, tokenizer, max_length), max_length)
    without_answer = [row for row in prepared if len(row[0]) >= max_length]
    if report["trl_drops"]:
        assert not without_answer and report["rows_without_answer"] == len(mixed_rows) - len(prepared) > 0
    else:
        assert len(prepared) == len(mixed_rows) and report["rows_without_answer"] == len(without_answer) > 0
    learnable = [row for row in prepared if len(row[0]) < max_length]
    assert (
        report["rows_equal_after_cut"]
        == sum((p + c)[:max_length] == (p + r)[:max_length] for p, c, r in learnable)
        > 0
    )
    cut = sum(len(p) + max(len(c), len(r)) > max_length for p, c, r in prepared)
    assert report["rows_cut"] == cut + len(mixed_rows) - len(
        prepared
    )  # a dropped row is one that would be cut
    assert report["rows_merged_at_boundary"] == (0 if chat else 2)


TURN = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
ASSISTANT = "{% if add_generation_prompt %}<|assistant|>"
# (template, what ends a turn, how many notes); the special tokens are added to the tokenizer
TEMPLATES = {
    "plain": (TURN + "<|endoftext|>{% endfor %}" + ASSISTANT + "{% endif %}", "<|endoftext|>", 0),
    "an end of turn that is not EOS": (
        TURN + "<|end|>\n{% endfor %}" + ASSISTANT + "{% endif %}",
        "<|end|>",
        0,
    ),
    "an opened thought": (TURN + "<|end|>\n{% endfor %}" + ASSISTANT + "<think>\n{% endif %}", "<|end|>", 1),
    "a system of its own": (
        "<|system|>親切に。<|end|>\n" + TURN + "<|end|>\n{% endfor %}" + ASSISTANT + "{% endif %}",
        "<|end|>",
        0,
    ),
    "today's date": (
        "<|system|>{{ strftime_now('%d %b %Y') }}<|end|>"
        + TURN
        + "<|end|>{% endfor %}"
        + ASSISTANT
        + "{% endif %}",
        "<|end|>",
        1,
    ),
}


@pytest.fixture
def chat_model(small_model, tmp_path):
    """A function that gives the folder of the small model with a chat template and its tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def make(template: str):
        tokenizer = AutoTokenizer.from_pretrained(small_model)
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]}
        )
        tokenizer.chat_template = template
        model = AutoModelForCausalLM.from_pretrained(small_model)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        notes = settle_template(tokenizer)
        for part in (model, tokenizer):
            part.save_pretrained(tmp_path / "chat")
        return tmp_path / "chat", notes

    return make


@pytest.mark.versions
@pytest.mark.parametrize(("template", "end", "count"), TEMPLATES.values(), ids=TEMPLATES)
def test_training_scores_and_answers_begin_and_end_at_one_place(
    template, end, count, chat_model, rows, tmp_path
):
    folder, notes = chat_model(template)
    prepared, tokenizer = prepare(rows[:4], folder, tmp_path, 128)
    asked = encode_prompts(tokenizer, [row["prompt"] for row in rows[:4]])
    assert len(notes) == count and find_opening(tokenizer) == ""
    assert tokenizer.convert_ids_to_tokens(find_end_of_turn(tokenizer)) == end
    for i, (prompt, chosen, rejected) in enumerate(prepared):
        for side, answer in (("chosen", chosen), ("rejected", rejected)):
            [(start, whole)] = encode_answers(tokenizer, [(rows[i]["prompt"], rows[i][side])])
            assert (asked[i], start, whole) == (prompt, prompt, prompt + answer)
            assert tokenizer.decode(answer).startswith(rows[i][side] + end)


def test_a_date_in_a_template_is_the_same_on_every_day(gpt2_tokenizer):
    import copy

    tokenizer = copy.deepcopy(gpt2_tokenizer)
    tokenizer.chat_template = (
        "{{ strftime_now('%d %b %Y') }}|{{ strftime_now(\"%Y\") }}{{ messages[0]['content'] }}"
    )
    with pytest.raises(ValueError):  # a template without the assistant's turn has no answer to look behind
        settle_template(tokenizer)
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False)
        == "01 Jan 2025|2025q"
    )


@pytest.mark.versions
def test_after_the_unusable_rows_are_gone_the_trainer_keeps_every_row_and_each_has_something_to_learn(
    mixed_rows, small_model, tmp_path
):
    tokenizer = load_tokenizer(str(small_model))
    kept, dropped = drop_unusable(mixed_rows, tokenizer, 40)
    assert (
        len(kept) + len(dropped) == len(mixed_rows) and mixed_rows[-2] in dropped
    )  # at 1.16 alone, this one would stay
    prepared, _ = prepare(kept, small_model, tmp_path, 40)
    assert len(prepared) == len(kept)
    assert all(len(p) < 40 and (p + c)[:40] != (p + r)[:40] for p, c, r in prepared)


def test_the_rows_that_all_versions_can_use_do_not_depend_on_the_installed_one(
    mixed_rows, gpt2_tokenizer, monkeypatch
):
    usable = {}
    for release in ("0.29.1", "1.16.0"):
        monkeypatch.setattr("dpo_helpers.data.tokens.version", lambda _, release=release: release)
        measured = measure_rows(mixed_rows, gpt2_tokenizer, 60)
        usable[release] = [row.usable for row in measured]
        assert build_token_report(measured, 60)["trl_drops"] == (release == "1.16.0")
    assert usable["0.29.1"] == usable["1.16.0"]


def test_a_limit_beyond_what_the_model_can_take_is_told_before_the_training(small_model):
    from dpo_helpers.model.load import load_base_model

    with pytest.raises(UserError, match=r"MAX_LENGTH = 257 .*256 以下にしてください"):
        load_base_model(RunConfig(model_name=str(small_model), max_length=257))


class Characters:
    """A tokenizer of one token a character, but "ab" is one token; the end mark is $."""

    chat_template, eos_token = None, "$"

    def __call__(self, texts):
        return {"input_ids": [[ord(c) for c in text.replace("ab", "Z")] for text in texts]}


def measure(prompt, chosen, rejected, max_length):
    return measure_rows(
        [{"prompt": prompt, "chosen": chosen, "rejected": rejected}], Characters(), max_length
    )[0]


def test_a_row_is_measured_by_hand():
    row = measure("pp", "xyz", "xy", max_length=6)
    assert (row.tokens, row.answer_tokens, row.answer_characters) == (6, 7, 5)
    assert (row.cut, row.without_answer, row.equal, row.merged, row.usable) == (
        False,
        False,
        False,
        False,
        True,
    )
    assert measure("pp", "xyz", "xy", max_length=5)[3:] == (True, False, False, False, True)
    assert measure("pp", "xyz", "xy", max_length=4)[3:] == (True, False, True, False, False)
    assert measure("pp", "xyz", "xy", max_length=2)[3:] == (True, True, False, False, False)


def test_a_token_over_the_boundary_is_counted():
    assert measure("pa", "b", "c", max_length=10).merged and not measure("pa", "c", "d", max_length=10).merged


def test_an_end_mark_that_is_there_already_is_not_added_again():
    assert encode_answers(Characters(), [("p", "a$"), ("p", "c")]) == [
        ([112], [112, 97, 36]),
        ([112], [112, 99, 36]),
    ]


def test_the_report_sums_up_and_its_table_is_japanese():
    rows = [{"prompt": "p", "chosen": "c" * (i + 1), "rejected": "d"} for i in range(200)]
    report = build_token_report(measure_rows(rows, Characters(), 128), 128)
    assert (report["rows"], report["longest"], report["max_length_for_99_percent"]) == (200, 202, 200)
    assert (
        sum(len(row["chosen"]) + 2 > 200 for row in rows) == 2
    )  # of 200 rows, 1 % would be cut at 200 tokens
    assert report["rows_cut"] == 74 and report["rows_usable"] == 200 and report["rows_without_answer"] == 0
    assert report["tokens_per_character"] == round((sum(range(2, 202)) + 400) / (sum(range(1, 201)) + 200), 3)
    table = describe_token_report(report)
    assert {"項目": "途中で切られる行", "値": 74, "読み方": "回答の終わりが失われる"} in table
    assert json.loads(json.dumps(report)) == report


def test_random_rows_split_into_usable_and_unusable_ones_at_every_limit():
    draw = random.Random(0)
    for _ in range(300):
        words = ["".join(draw.choice("abx") for _ in range(draw.randint(1, 9))) for _ in range(3)]
        rows, limit = [dict(zip(("prompt", "chosen", "rejected"), words, strict=True))], draw.randint(1, 20)
        row = measure_rows(rows, Characters(), limit)[0]
        if row.usable:
            assert drop_unusable(rows, Characters(), limit) == (rows, [])
        else:
            with pytest.raises(UserError, match="収まる行がありません"):
                drop_unusable(rows, Characters(), limit)


def test_generated_rows_have_no_row_to_complain_of(rows, gpt2_tokenizer):
    report = build_token_report(measure_rows(rows, gpt2_tokenizer, 128), 128)
    assert (
        report["rows_usable"] == 1000
        and report["longest"] <= 128
        and 1.2 <= report["tokens_per_character"] <= 2.0
    )
    assert (
        report["rows_cut"]
        == report["rows_without_answer"]
        == report["rows_equal_after_cut"]
        == report["rows_merged_at_boundary"]
        == 0
    )


def test_the_histogram_shows_the_lengths_and_the_limit(rows, gpt2_tokenizer, tmp_path):
    figure = plot_token_report(measure_rows(rows[:50], gpt2_tokenizer, 128), 128, tmp_path / "tokens.png")
    axis = figure.axes[0]
    assert sum(bar.get_height() for bar in axis.patches) == 50 and axis.lines[0].get_xdata()[0] == 128
    assert (tmp_path / "tokens.png").stat().st_size > 5000


def run(*words) -> int:
    return run_data(make_parser().parse_args(["data", *map(str, words)]))


def test_the_terminal_generates_checks_and_reports(tmp_path, small_model, rows, capsys):
    file = tmp_path / "rows.jsonl"
    assert run("--count", 1000, "--seed", 42, "--output", file) == 0
    assert list(load_preferences(file)) == rows
    capsys.readouterr()
    assert run("--check", file, "--tokenizer", small_model, "--max-length", 128, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["rows_kept"], result["rows_reported"], result["tokens"]["rows"]) == (1000, 0, 1000)
    assert run("--check", file, "--tokenizer", small_model, "--max-length", 16, "--on-error", "drop") == 1
    output = capsys.readouterr()
    assert "使える行：0、誤りのある行：1,000" in output.out and "2行目: 長すぎて" in output.err


def test_the_terminal_tells_wrong_rows_with_1_and_an_unreadable_file_as_a_user_error(tmp_path, capsys):
    file, out, dropped = tmp_path / "own.csv", tmp_path / "out.jsonl", tmp_path / "dropped.jsonl"
    file.write_text("q,良い回答,悪い回答\nAとは？,はい,いいえ\nBとは？,同じ,同じ\n", encoding="utf-8")
    assert run("--check", file, "--column", "prompt=q", "--output", out) == 1 and not out.exists()
    assert "3行目: chosen と rejected が同じです" in capsys.readouterr().err
    assert (
        run(
            "--check",
            file,
            "--column",
            "prompt=q",
            "--on-error",
            "drop",
            "--output",
            out,
            "--dropped-file",
            dropped,
        )
        == 0
    )
    assert json.loads(out.read_text(encoding="utf-8"))["prompt"] == "質問: Aとは？\n回答:\n"
    assert json.loads(dropped.read_text(encoding="utf-8"))["place"] == "3行目"
    capsys.readouterr()
    assert run("--check", file, "--json") == 1
    assert json.loads(capsys.readouterr().out)["rows_reported"] == 2
    for words in (
        ["--check", tmp_path / "absent.csv"],
        [],
        ["--count", 0, "--output", out],
        ["--output", out, "--tokenizer", "./absent"],
    ):
        with pytest.raises(UserError):
            run(*words)
