"""Lets the reader ask a trained model, and vote blindly on its answers, with widgets (ipywidgets 7.7 and
8); `votes` keeps the votes.
"""

import html
import time
import unicodedata

from dpo_helpers.data.prompt import make_prompt, strip_question
from dpo_helpers.data.row_checks import REASONS
from dpo_helpers.errors import UserError
from dpo_helpers.judge.votes import describe_votes, order_roles, read_votes, record_vote
from dpo_helpers.model.answer import ANSWER_ROLES, answer_roles

# questions answered at once: a batch costs hardly more than one question, but the first vote waits for it
PAIRS_PER_CALL = 4
KEYS = {"a": 0, "あ": 0, "b": 1, "s": None}  # "あ" is what the key A writes while Japanese input is on
SHORTEST_LOOK_SECONDS = (
    0.5  # a click made while answers were generated arrives at once after them: it was not meant for these
)


def find_pairs(model, tokenizer, rows_or_questions, roles: list[str], votes: list[dict]):
    """Yield (question, {role: answer}) of what can be voted on: not of equal answers, nor of a pair that
    has its vote.
    """
    texts = [row if isinstance(row, str) else row["prompt"] for row in rows_or_questions]
    questions = [question for question in dict.fromkeys(map(strip_question, texts)) if question]
    voted = {(vote["prompt"], frozenset(vote["answers"])) for vote in votes}
    for start in range(0, len(questions), PAIRS_PER_CALL):
        batch = questions[start : start + PAIRS_PER_CALL]
        for question, answers in zip(batch, answer_roles(model, tokenizer, batch, roles), strict=True):
            different = frozenset(answers.values())
            if len(different) > 1 and (make_prompt(question), different) not in voted:
                yield question, answers


def draw_answers(answers: dict[str, str]) -> str:
    """Return HTML that shows {heading: answer} side by side, or below each other where the screen is
    narrow.
    """
    cell = (
        "flex:1 1 16em; border:1px solid #8888; border-radius:6px; padding:8px; "
        "white-space:pre-wrap; line-height:1.6"
    )
    cells = [
        f'<div style="{cell}"><b>{html.escape(name)}</b>\n{html.escape(text) or "（空の回答）"}</div>'
        for name, text in answers.items()
    ]
    return f'<div style="display:flex; flex-wrap:wrap; gap:8px">{"".join(cells)}</div>'


def describe_failure(what: str, error: Exception) -> str:
    """Tell an error in one line: what a widget's handler raises reaches no reader."""
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return (
        f"⚠️ {what}（{html.escape(reason[:300])}）。もう一度試し、続くときはこのセルを実行し直してください。"
    )


def ask_box(model, tokenizer, roles=tuple(ANSWER_ROLES)):
    """Return a widget that answers a typed question (Enter or the button) as each of the model's roles,
    side by side.
    """
    import ipywidgets

    # without continuous_update the value comes once, whole; a submit message could overtake the last letters
    # on a slow line
    text = ipywidgets.Text(
        placeholder="例：過学習とは何ですか？", continuous_update=False, layout=ipywidgets.Layout(width="70%")
    )
    button = ipywidgets.Button(description="質問する", button_style="primary")
    status, shown = ipywidgets.HTML("質問を書いて、Enter キーかボタンで送ってください。"), ipywidgets.HTML()

    def answer(_):
        question = strip_question(text.value)
        if not question:
            status.value = "質問が空です。上の欄に質問を書いてください。"
        elif status.value != (
            done := f"質問：{html.escape(question)}"
        ):  # leaving the box for the button sends a question twice
            status.value = "回答を作っています…"
            try:
                answers = answer_roles(model, tokenizer, [question], roles)[0]
                shown.value = draw_answers({ANSWER_ROLES[role]: said for role, said in answers.items()})
                status.value = done
            except Exception as error:
                status.value = describe_failure("回答を作れませんでした", error)

    button.on_click(answer)
    text.observe(answer, "value")
    return ipywidgets.VBox([ipywidgets.HBox([text, button]), status, shown])


def vote_box(model, tokenizer, rows_or_questions, path, seed: int, opponent: str = "reference"):
    """Return a widget for a blind vote between the policy and an earlier role; every vote goes to `path` at
    once.

    `opponent` is "reference" (the model before DPO, which is the base where there was no warm-up) or "base".
    """
    return _Voting(model, tokenizer, rows_or_questions, path, seed, opponent).widget


class _Voting:
    """Holds the pair on show from one message of the browser to the next."""

    def __init__(self, model, tokenizer, rows_or_questions, path, seed: int, opponent: str):
        import ipywidgets

        self.path, self.seed = path, seed
        roles = ["base" if "ref" not in model.peft_config else opponent, "policy"]
        self.pairs = find_pairs(model, tokenizer, rows_or_questions, roles, read_votes(path))
        self.shown, self.said, self.result = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        self.buttons = [
            ipywidgets.Button(description=text) for text in ("A が良い", "B が良い", "同じくらい／両方だめ")
        ]
        for button, choice in zip(self.buttons, (0, 1, None), strict=True):
            button.layout.width = "auto"
            button.on_click(lambda _, choice=choice: self.vote(choice))
        self.key = ipywidgets.Text(
            placeholder="キー a / b / s でも投票できます", layout=ipywidgets.Layout(width="20em")
        )
        self.key.observe(self.take_key, "value")
        choices = ipywidgets.HBox([*self.buttons, self.key], layout=ipywidgets.Layout(flex_flow="row wrap"))
        self.widget = ipywidgets.VBox([self.shown, choices, self.said, self.result])
        self.show_next()

    def show_next(self) -> None:
        """Put the next pair on show as A and B; the buttons stay as they are, so that the keyboard's focus
        does.
        """
        self.pair, self.result.value = None, html.escape(describe_votes(read_votes(self.path)))
        self.shown.value = "回答を作っています…"
        try:
            question, answers = next(self.pairs)
        except StopIteration:
            self.shown.value = (
                "投票できる質問はもうありません（回答が同じ質問と、投票が済んだ質問は出しません）。"
            )
        except Exception as error:
            self.shown.value = describe_failure("回答を作れませんでした", error)
        else:
            order = order_roles(question, list(answers), self.seed)
            letters = {letter: answers[role] for letter, role in zip("AB", order, strict=True)}
            self.shown.value = f"<b>質問：{html.escape(question)}</b>{draw_answers(letters)}"
            self.pair, self.shown_at = (question, answers, order), time.monotonic()

    def take_key(self, change) -> None:
        key = unicodedata.normalize("NFKC", change["new"]).strip().lower()
        if change["new"]:
            self.key.value = ""
        if key in KEYS:
            self.vote(KEYS[key])

    def vote(self, choice: int | None) -> None:
        """Record the choice (0 is A, 1 is B, None is neither), say who was who, and go on."""
        if self.pair is None or time.monotonic() - self.shown_at < SHORTEST_LOOK_SECONDS:
            return
        question, answers, order = self.pair
        try:
            obstacle = record_vote(self.path, question, answers, None if choice is None else order[choice])
        except (OSError, UserError) as error:
            self.said.value = describe_failure("投票を保存できませんでした", error)
            return
        names = "、".join(
            f"{letter} は「{ANSWER_ROLES[role]}」" for letter, role in zip("AB", order, strict=True)
        )
        note = f"学習用の行にはなりません（{REASONS[obstacle]}）。" if obstacle in REASONS else ""
        self.said.value = f"投票しました。「{html.escape(question)}」の {names}でした。{note}"
        self.show_next()
