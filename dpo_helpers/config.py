"""Holds what a user decides: the settings of one training run, the switches of the notebook, their ranges."""

from dataclasses import asdict, dataclass, field, fields

from dpo_helpers.errors import UserError
from dpo_helpers.files import read_json, write_json

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


def _knob(default, note, allowed):
    return field(default=default, metadata={"note": note, "allowed": allowed})


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes; paths, devices and storage are arguments elsewhere.

    A value outside its range raises UserError with every violation at once. `allowed` is a closed interval
    (low, high), a tuple of choices, or None for free text.
    """

    model_name: str = _knob(
        "microsoft/DialoGPT-small", "ベースモデル。Hub の名前、ローカルのフォルダ、または embedded", None
    )
    quantization: str = _knob(
        "none",
        "ベースモデルの重みを 4-bit にするか（4bit は NVIDIA の GPU だけ。bitsandbytes を使う）",
        ("none", "4bit"),
    )
    num_samples: int = _knob(1000, "生成する行数（学習用と評価用の合計）", (30, 50_000))
    held_out_fraction: float = _knob(
        0.3, "評価用に取り分ける行の割合（自分のデータでは質問の割合）", (0.1, 0.5)
    )
    seed: int = _knob(42, "乱数シード", (0, 2**31 - 1))
    num_train_epochs: float = _knob(1.0, "DPO のエポック数", (0.01, 100.0))
    per_device_train_batch_size: int = _knob(
        1, "一度に計算するペアの数（trainer が fast なら、自動で増やす）", (1, 256)
    )
    gradient_accumulation_steps: int = _knob(
        4, "何回分の勾配をためて更新するか（メモリには影響しない）", (1, 1024)
    )
    learning_rate: float = _knob(5e-6, "DPO の学習率", (1e-9, 1.0))
    max_length: int = _knob(128, "質問と回答を合わせた長さの上限（トークン）", (16, 8192))
    beta: float = _knob(0.1, "参照モデルから離れにくくする強さ（大きいほど離れない）", (0.001, 10.0))
    loss_type: str = _knob("sigmoid", "DPO の損失の種類", LOSS_TYPES)
    sft_weight: float = _knob(
        1.0,
        "loss_type に +sft があるとき、良い回答を書く練習の項の重み（大きいほど書く力を残す）",
        (0.01, 100.0),
    )
    trainer: str = _knob(
        "fast",
        "DPO の計算のしかた。fast は同じ損失を少ない計算で（sigmoid か sigmoid+sft）、stock は TRL のまま",
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
        _settle(self)

    @property
    def effective_batch_size(self) -> int:
        """Pairs per optimizer step on one device."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def trains_fast(self) -> bool:
        """The fast trainer computes the sigmoid loss, with or without an SFT term; others take TRL's own
        path.
        """
        return self.trainer == "fast" and self.loss_type in ("sigmoid", "sigmoid+sft")

    @property
    def lora_alpha(self) -> float:
        """LoRA's alpha, from the scale that matters: alpha = scale * r (Hu et al. 2021, section 4.1)."""
        return self.lora_scale * self.lora_rank

    def as_dict(self) -> dict:
        return asdict(self)

    def save(self, path) -> None:
        write_json(path, asdict(self))

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


@dataclass(frozen=True)
class Switches:
    """What the notebook does beside training: where it runs, reads and saves. None of it changes what is
    learned.
    """

    data_file: str = _knob("", "自分のデータのファイルか、Hub のデータセット名。空なら自動生成", None)
    use_drive: bool = _knob(True, "Google Drive に途中経過と結果を保存するか", None)
    run_name: str = _knob("run", "結果を置くフォルダの名前", None)
    resume: str = _knob("自動", "前の続きから（自動）か、新しく始めるか", ("自動", "最初から"))
    device: str = _knob("auto", "使うデバイス", ("auto", "cuda", "cpu"))
    config_file: str = _knob("", "実験ノートブックが書いた設定ファイル。空なら設定のセルの値", None)
    columns: dict = field(
        default_factory=dict,
        metadata={"note": '列の名前が違うとき：{"質問文": "prompt"} のように書く', "allowed": None},
    )
    upload_file: bool = _knob(False, "データのファイルをアップロードするか", None)
    drop_bad_rows: bool = _knob(False, "誤りのある行を除いて続けるか（オフなら止まる）", None)
    download_zip: bool = _knob(False, "結果の zip をダウンロードするか", None)
    unmount_drive: bool = _knob(False, "最後に Google Drive を切り離すか", None)
    hub_repo: str = _knob("ユーザー名/モデル名", "共有するときの Hugging Face Hub のリポジトリ", None)
    share: bool = _knob(False, "共有するファイルとモデルカードを表示するか", None)
    push: bool = _knob(False, "Hugging Face Hub に実際に送るか", None)

    def __post_init__(self):
        _settle(self)


def read_form(names: dict) -> tuple[RunConfig, Switches]:
    """Read the notebook's parameter cell: forms in capitals, and the rest in the dictionary MORE.

    `names` are the notebook's globals. A name that is unknown, or given in both places, raises UserError, as
    a value out of its range does. A `config_file` takes the place of the run's settings.
    """
    knobs = [item.name for item in fields(RunConfig)]
    known = knobs + [item.name for item in fields(Switches)]
    values = {name: names[name.upper()] for name in known if name.upper() in names}
    more = _read_more(names.get("MORE", {}))
    if unknown := [name for name in more if name not in known]:
        raise UserError(
            f"MORE に知らない項目があります：{', '.join(unknown)}。使える項目：{', '.join(known)}"
        )
    if twice := [name.upper() for name in more if name in values]:
        raise UserError(
            f"{', '.join(twice)} は上のフォームにあります。MORE からは消して、フォームの値を変えてください。"
        )
    values |= more
    switches = Switches(**{name: value for name, value in values.items() if name not in knobs})
    if switches.config_file:
        print(f"学習の設定は {switches.config_file} から読みます（設定のセルの値は使いません）。")
        return RunConfig.load(switches.config_file), switches
    return RunConfig(**{name: value for name, value in values.items() if name in knobs}), switches


def _read_more(more) -> dict:
    """Return what the dictionary MORE says, with every name in small letters."""
    if not isinstance(more, dict):
        raise UserError('MORE は {"beta": 0.3} のように、名前と値を : でつないで { } の中に書いてください。')
    names = [str(name).lower() for name in more]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"MORE に {', '.join(twice)} が二度あります。どちらか一つにしてください。")
    return dict(zip(names, more.values(), strict=True))


def describe_settings(config: RunConfig) -> str:
    """Say in Japanese what differs from the default settings, with what each of it means."""
    notes = {item.name: item.metadata["note"] for item in fields(config)}
    changed = RunConfig().differences(config)
    lines = [f"・{line}（{notes[line.split(':')[0]]}）" for line in changed]
    return "\n".join(["既定から変えた設定：", *lines]) if lines else "すべて既定の設定です。"


def _settle(settings) -> None:
    """Convert every value to its declared type, or raise UserError with everything that is wrong."""
    problems = [text for item in fields(settings) if (text := _settle_one(settings, item))]
    if problems:
        advice = "設定に誤りがあります。次の値を直して、もう一度実行してください。"
        raise UserError("\n".join([advice, *problems]))


def _settle_one(settings, item) -> str | None:
    value, allowed = getattr(settings, item.name), item.metadata["allowed"]
    try:
        value = _convert(value, item.type)
    except (ValueError, OverflowError):  # the latter: an infinite number for an integer
        return f"  {item.name} = {value!r}：{_TYPE_NAMES[item.type]}で指定してください。"
    object.__setattr__(settings, item.name, value)
    if item.type is str:
        if not value and item.default:
            return f"  {item.name}：空にはできません。"
        if allowed and value not in allowed:
            return f"  {item.name} = {value!r}：{', '.join(allowed)} のどれかを選んでください。"
    elif item.type not in (bool, dict) and not allowed[0] <= value <= allowed[1]:
        return f"  {item.name} = {value!r}：{allowed[0]:g} 以上 {allowed[1]:g} 以下にしてください。"
    return None


_TYPE_NAMES = {int: "整数", float: "数値", str: "文字列", bool: "True か False ", dict: "{ } の形"}


def _convert(value, kind):
    """Convert form and command-line values: "5e-6" is a float, 1.0 an integer, True neither."""
    if kind in (str, bool, dict):
        if not isinstance(value, kind):
            raise ValueError(value)
        return value.strip() if kind is str else value
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(value)
    number = float(value)
    if number != number or (kind is int and number != int(number)):
        raise ValueError(value)
    return kind(number)
