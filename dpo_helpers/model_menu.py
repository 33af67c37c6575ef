"""Lists base models to choose from, as their public pages describe them; any other Hub name or folder works as well."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MenuEntry:
    """One model of the menu. `millions` of parameters as published, `tokens_per_character` as measured on the generated rows."""

    name: str
    millions: int
    licence: str
    japanese: str
    note: str = ""
    gated: bool = False
    tokens_per_character: float | None = None  # None: its tokenizer was not at hand
    tried: str = "まだ"  # what of it this project really ran

    @property
    def weights_gb(self) -> float:
        """Gigabytes of the weights alone in float32, which is how they are trained."""
        return self.millions * 4 / 1000


SAME_SHAPE = "同じ形の乱数の重みで"
MENU = (
    MenuEntry("microsoft/DialoGPT-small", 117, "MIT", "ほぼ英語", tokens_per_character=1.48, tried=f"{SAME_SHAPE}（語彙は本物）"),
    MenuEntry("microsoft/DialoGPT-medium", 345, "MIT", "ほぼ英語", "safetensors への変換が要ることがある", tokens_per_character=1.48),
    MenuEntry("microsoft/DialoGPT-large", 762, "MIT", "ほぼ英語", "safetensors の有無は確かめていない", tokens_per_character=1.48),
    MenuEntry("rinna/japanese-gpt2-small", 110, "MIT", "日本語", "sentencepiece と protobuf が要る", tried="同じ種類のトークナイザーで"),
    MenuEntry("llm-jp/llm-jp-3-150m", 150, "Apache-2.0", "日本語と英語"),
    MenuEntry("llm-jp/llm-jp-3-440m", 440, "Apache-2.0", "日本語と英語"),
    MenuEntry("sbintuitions/sarashina2.2-0.5b", 500, "MIT", "日本語が中心"),
    MenuEntry("sbintuitions/sarashina2.2-0.5b-instruct-v0.1", 500, "MIT", "日本語が中心", "会話用の書式を持つ"),
    MenuEntry("google/gemma-3-270m", 270, "Gemma Terms of Use", "多言語", "語彙が約 26 万", gated=True),
    MenuEntry("Qwen/Qwen3-0.6B", 600, "Apache-2.0", "多言語", "会話用の書式を持ち、考える過程も書く"),
    MenuEntry(
        "HuggingFaceTB/SmolLM2-135M-Instruct", 135, "Apache-2.0", "ほぼ英語", "会話用の書式を持つ", tokens_per_character=1.70,
        tried="本物の重みで（別の配布元のもの、会話用の書式は外して）",
    ),
)  # fmt: skip


def describe_menu() -> list[dict]:
    """Return the menu as rows of a Japanese table."""
    return [
        {
            "MODEL_NAME": entry.name,
            "パラメーター": f"{entry.millions} M",
            "重み（float32）": f"{entry.weights_gb:.1f} GB",
            "日本語": entry.japanese,
            "1 文字あたりのトークン": f"{entry.tokens_per_character:.2f}" if entry.tokens_per_character else "測っていません",
            "ライセンス": entry.licence + ("（申請が必要）" if entry.gated else ""),
            "注意": entry.note,
            "ここで動かしたか": entry.tried,
        }
        for entry in MENU
    ]
