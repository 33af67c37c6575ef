"""Holds the settings of one training run: the values, their allowed ranges, and their JSON file."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

# Losses that TRL offers from 0.29.1 on and that need nothing but pairs of answers.
LOSS_TYPES = (
    "sigmoid",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "aot",
    "apo_zero",
    "apo_down",
    "sigmoid+sft",
)
TRAINERS = ("fast", "stock")
REPORT_TARGETS = ("none", "tensorboard", "trackio", "wandb")


class UserError(Exception):
    """A problem that the user can solve; its Japanese text says what, where and what to do next."""

    def _render_traceback_(self):
        # IPython calls this hook: a beginner reads the message alone, without forty lines of library frames.
        return ["", f"⚠️ {self}"]


class TrainingStopped(UserError):
    """The training ended early; `reason` is "nan" or "interrupted"."""

    def __init__(self, text: str, reason: str, step: int):
        super().__init__(text)
        self.reason, self.step = reason, step


def read_json(path, what: str):
    """Return what a JSON file holds, with or without a byte order mark; `what` names it in the UserError
    where it cannot be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{what} {path} が見つかりません。パスを確かめてください。") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{what} {path} を読めません（{error}）。JSON の書き方を確かめてください。") from None


def _knob(default, note, allowed):
    return field(default=default, metadata={"note": note, "allowed": allowed})


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes; paths, devices and storage are arguments elsewhere.

    A value outside its range raises UserError with every violation at once. `allowed` is a closed interval
    (low, high), a tuple of choices, or None for free text.
    """

    model_name: str = _knob(
        "microsoft/DialoGPT-small", "ベースモデル。Hub の名前、ローカルのフォルダー、または embedded", None
    )
    quantization: str = _knob(
        "none",
        "ベースモデルの重みを 4-bit にするか（4bit は NVIDIA の GPU だけ。bitsandbytes を使う）",
        ("none", "4bit"),
    )
    num_samples: int = _knob(1000, "生成する行数（学習用と評価用の合計）", (30, 50_000))
    held_out_fraction: float = _knob(0.2, "評価用に取り分ける概念の割合", (0.1, 0.5))
    seed: int = _knob(42, "乱数の種", (0, 2**31 - 1))
    num_train_epochs: float = _knob(1.0, "DPO のエポック数", (0.01, 100.0))
    per_device_train_batch_size: int = _knob(
        1, "一度に計算する組の数（trainer が fast なら、まとめられるだけ自動で増やす）", (1, 256)
    )
    gradient_accumulation_steps: int = _knob(
        4, "何回分の勾配をためて更新するか（メモリーには影響しない）", (1, 1024)
    )
    learning_rate: float = _knob(5e-6, "DPO の学習率", (1e-9, 1.0))
    max_length: int = _knob(128, "質問と回答を合わせた長さの上限（トークン）", (16, 8192))
    beta: float = _knob(0.1, "参照モデルから離れにくくする強さ（大きいほど離れない）", (0.001, 10.0))
    loss_type: str = _knob("sigmoid", "DPO の損失の種類", LOSS_TYPES)
    trainer: str = _knob(
        "fast",
        "DPO の計算のしかた。fast は同じ損失を少ない計算で（sigmoid のとき）、stock は TRL のまま",
        TRAINERS,
    )
    lora_rank: int = _knob(16, "LoRA のランク r", (1, 1024))
    lora_scale: float = _knob(16.0, "LoRA の倍率 alpha / r（学習率と並ぶ、効き目の強さ）", (0.01, 1024.0))
    lora_targets: str = _knob(
        "all-linear", "LoRA を付ける層。all-linear、default（PEFT の既定）、またはコンマ区切りの層名", None
    )
    sft_epochs: float = _knob(2.0, "DPO の前の教師あり学習のエポック数（0 で行わない）", (0.0, 100.0))
    sft_learning_rate: float = _knob(1e-4, "教師あり学習の学習率", (1e-9, 1.0))
    max_grad_norm: float = _knob(1.0, "勾配クリッピングの上限（L2 ノルム）", (0.001, 1000.0))
    logging_steps: int = _knob(5, "何ステップごとに記録するか", (1, 10_000))
    checkpoint_steps: int = _knob(25, "何ステップごとにチェックポイントと評価を行うか", (1, 100_000))
    report_to: str = _knob("none", "記録の送り先", REPORT_TARGETS)

    def __post_init__(self):
        problems = [text for item in fields(self) if (text := self._settle(item))]
        if problems:
            raise UserError(
                "設定に誤りがあります。次の値を直して、もう一度実行してください。\n" + "\n".join(problems)
            )

    def _settle(self, item) -> str | None:
        """Convert one value to its declared type, or say in Japanese what is wrong with it."""
        value, allowed = getattr(self, item.name), item.metadata["allowed"]
        try:
            value = _convert(value, item.type)
        except ValueError:
            return f"  {item.name} = {value!r}：{_TYPE_NAMES[item.type]}で指定してください。"
        object.__setattr__(self, item.name, value)
        if item.type is str:
            if not value:
                return f"  {item.name}：空にはできません。"
            if allowed and value not in allowed:
                return f"  {item.name} = {value!r}：{', '.join(allowed)} のどれかを選んでください。"
        elif not allowed[0] <= value <= allowed[1]:
            return f"  {item.name} = {value!r}：{allowed[0]:g} 以上 {allowed[1]:g} 以下にしてください。"
        return None

    @property
    def effective_batch_size(self) -> int:
        """Pairs per optimizer step on one device."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def trains_fast(self) -> bool:
        """The fast trainer computes the sigmoid loss alone; another loss takes TRL's own path."""
        return self.trainer == "fast" and self.loss_type == "sigmoid"

    @property
    def lora_alpha(self) -> float:
        """LoRA's alpha, from the scale that matters: alpha = scale * r (Hu et al. 2021, section 4.1)."""
        return self.lora_scale * self.lora_rank

    @classmethod
    def from_form(cls, names: dict, file: str = "") -> "RunConfig":
        """Read the notebook's form variables, the knobs' names in capitals, or, where one is given, a file
        instead of them.
        """
        if file:
            print(f"設定は {file} から読みます（設定のセルの値は使いません）。")
            return cls.load(file)
        return cls(
            **{item.name: names[item.name.upper()] for item in fields(cls) if item.name.upper() in names}
        )

    def as_dict(self) -> dict:
        return asdict(self)

    def save(self, path) -> None:
        """Write the JSON file aside and rename it: a process killed meanwhile leaves no half of it."""
        aside = Path(f"{path}.new")
        aside.write_text(json.dumps(asdict(self), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        aside.replace(path)

    @classmethod
    def load(cls, path) -> "RunConfig":
        """Read a JSON file that `save` wrote, or a hand-written one with some of the knobs."""
        return cls().replace(read_json(path, "設定ファイル"), source=str(path))

    def replace(self, values: dict, source: str = "設定") -> "RunConfig":
        """Return a copy with some values changed; an unknown name raises UserError with the known ones."""
        known = [item.name for item in fields(self)]
        unknown = (
            [name for name in values if name not in known]
            if isinstance(values, dict)
            else ["（オブジェクトではありません）"]
        )
        if unknown:
            raise UserError(
                f"{source} に知らない項目があります：{', '.join(unknown)}。使える項目：{', '.join(known)}"
            )
        return RunConfig(**{**asdict(self), **values})

    def differences(self, other: "RunConfig") -> list[str]:
        """Name every knob that differs, as `name: self → other`."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{name}: {mine[name]} → {theirs[name]}" for name in mine if mine[name] != theirs[name]]


_TYPE_NAMES = {int: "整数", float: "数値", str: "文字列"}


def _convert(value, kind):
    """Convert form and command-line values: "5e-6" is a float, 1.0 an integer, True neither."""
    if isinstance(value, bool) or value is None:
        raise ValueError(value)
    if kind is str:
        if not isinstance(value, str):
            raise ValueError(value)
        return value.strip()
    number = float(value) if isinstance(value, (str, int, float)) else None
    if number is None or number != number or (kind is int and number != int(number)):
        raise ValueError(value)
    return kind(number)
