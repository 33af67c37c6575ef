"""What the experiment notebook says of its results, one sentence a claim: the notebook's prose and the
tests read the same table.
"""

from dpo_helpers.sweep.tables import Claim


def _pair(name: str, first, second, **same) -> tuple[dict, dict]:
    return {name: first, **same}, {name: second, **same}


LOSS, ACCURACY, RATIO = "held_out.loss", "held_out.accuracy", "held_out.log_ratio"
CLAIMS = (
    Claim(
        1,
        *_pair("learning_rate", 5e-6, 1e-3, lora_scale=16.0),
        LOSS,
        "lower",
        "LoRA の倍率 16 では、学習率 5e-6 より 1e-3 のほうが評価の損失が低い",
    ),
    Claim(
        1,
        *_pair("lora_scale", 2.0, 128.0, learning_rate=1e-4),
        LOSS,
        "lower",
        "学習率が 1e-4 のままでも、LoRA の倍率を 2 から 128 に上げると評価の損失が下がる",
    ),
    Claim(
        1,
        {"learning_rate": 1e-3, "lora_scale": 16.0},
        {"learning_rate": 1e-2, "lora_scale": 128.0},
        "answers.ends",
        "lower",
        "学習率 1e-2 と倍率 128 を組み合わせると、最後まで書けた回答が減る（壊れ始める）",
    ),
    Claim(
        2,
        *_pair("beta", 0.02, 1.0),
        "distance",
        "lower",
        "β を 0.02 から 1 に上げると、参照モデルからの距離が縮まる",
    ),
    Claim(
        2,
        *_pair("beta", 0.02, 1.0),
        RATIO,
        "lower",
        "β を 0.02 から 1 に上げると、良い回答と悪い回答の差（対数比）も小さくなる",
    ),
    Claim(
        3,
        *_pair("loss_type", "sigmoid", "robust"),
        RATIO,
        "higher",
        "robust は sigmoid より、二つの回答の差（対数比）を大きく広げる",
    ),
    Claim(
        3,
        *_pair("loss_type", "sigmoid", "robust"),
        ACCURACY,
        "lower",
        "それでも robust の正解率は sigmoid より低い",
    ),
    Claim(
        3,
        *_pair("loss_type", "sigmoid", "sigmoid+sft"),
        RATIO,
        "lower",
        "sigmoid+sft は sigmoid より、二つの回答の差を小さくしか広げない",
    ),
    Claim(
        4,
        *_pair("training_rows", 25, 200),
        LOSS,
        "lower",
        "学習用の行を 25 から 200 に増やすと、評価の損失が下がる",
    ),
    Claim(
        4,
        *_pair("label_noise", 0.0, 0.4, loss_type="sigmoid"),
        LOSS,
        "higher",
        "行の 4 割を入れ替えると、評価の損失が上がる",
    ),
    Claim(
        5,
        *_pair("data", "generated", "refusal"),
        ACCURACY,
        "lower",
        "いつも同じ断り方のデータで学習すると、正直な評価データでの正解率は下がる",
    ),
    Claim(
        5,
        {"data": "refusal"},
        {"data": "refusal"},
        "easy_held_out.accuracy",
        "higher",
        "それでも、同じ作り方の簡単な評価データで測ると、正解率はずっと高く見える",
        first_metric=ACCURACY,
    ),
    Claim(
        6,
        *_pair("model_name", "embedded-small", "embedded-large"),
        "seconds.training",
        "higher",
        "大きいモデルほど、学習に時間がかかる",
    ),
    Claim(
        7,
        *_pair("sft_epochs", 0.0, 3.0),
        "seconds.shared",
        "higher",
        "教師あり学習を 3 エポック行うと、その分だけ時間がかかる",
    ),
)


def list_claims(section: int) -> list[Claim]:
    return [claim for claim in CLAIMS if claim.section == section]
