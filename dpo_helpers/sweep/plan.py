"""Plans an experiment as a grid, runs what has no result yet, and appends every result at once; it trains
nothing.
"""

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import product
from pathlib import Path

from dpo_helpers.config import RunConfig
from dpo_helpers.errors import TrainingStopped, UserError
from dpo_helpers.files import copy_file, hash_file, read_json, read_rows

DATA_KINDS = ("generated", "longer", "refusal")
SCHEMA = 2  # of a line in results.jsonl


@dataclass(frozen=True)
class Variation:
    """What a run changes in its rows, beside RunConfig. The held-out rows are honest in every case.

    data: "generated", or easy rows: "longer" (chosen is always the longer one), "refusal" (rejected is always
    the same). label_noise: share of training rows with chosen and rejected exchanged. training_rows: how many
    are used, 0 for all. data_file: a file of one's own instead of generated rows.
    """

    data: str = "generated"
    label_noise: float = 0.0
    training_rows: int = 0
    data_file: str = ""

    def __post_init__(self):
        if self.data not in DATA_KINDS:
            raise UserError(f"data = {self.data!r}：{', '.join(DATA_KINDS)} のどれかにしてください。")
        if not (isinstance(self.label_noise, (int, float)) and 0 <= self.label_noise <= 0.5):
            raise UserError(f"label_noise = {self.label_noise!r}：0 以上 0.5 以下の数にしてください。")
        if not (isinstance(self.training_rows, int) and self.training_rows >= 0):
            raise UserError(f"training_rows = {self.training_rows!r}：0（すべて）以上の整数にしてください。")
        if self.data_file and (self.data != "generated" or not Path(self.data_file).is_file()):
            raise UserError(
                f"data_file = {self.data_file!r}：ファイルがないか、data と一緒に使われています。"
                "パスを確かめ、data は書かないでください。"
            )


KNOBS = tuple(item.name for item in fields(RunConfig))
VARIATION_NAMES = tuple(item.name for item in fields(Variation))


@dataclass(frozen=True)
class Experiment:
    """One run to be done: `setting` is what it changes against the experiment's common values, without the
    seed.
    """

    setting: tuple
    config: RunConfig
    variation: Variation

    @cached_property
    def identity(self) -> str:
        """What makes a run the same run: its configuration, its rows, its base, and the version of this
        record.
        """
        from dpo_helpers.model.embedded import EMBEDDED, find_embedded_folder

        name, variation = self.config.model_name, asdict(self.variation)
        base = find_embedded_folder(name).name if name in EMBEDDED else name
        rows = hash_file(self.variation.data_file) if self.variation.data_file else ""
        parts = [SCHEMA, self.config.as_dict(), variation | {"data_file": rows}, base]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def make_plan(settings: dict | list[dict], common: dict | None = None, seeds=(42,)) -> list[Experiment]:
    """Return every setting with every seed.

    `settings` is a list of changes, or {name: [values]} of which every combination is meant. A name is a knob
    of RunConfig or of Variation. UserError for unknown names, values out of range and an empty grid, before
    anything runs.
    """
    if isinstance(settings, dict):
        if wrong := [name for name, values in settings.items() if not isinstance(values, list)]:
            raise UserError(
                f"グリッドの {', '.join(wrong)} は、値を [ ] に並べて書いてください。例：[0.1, 0.2]"
            )
        settings = [
            dict(zip(settings, values, strict=True)) for values in product(*settings.values()) if settings
        ]
    if not settings or not seeds:
        raise UserError("グリッドが空です。試す値（と seeds の乱数シード）を、少なくとも一つ書いてください。")
    plan = []
    for setting, seed in product(settings, seeds):
        if not isinstance(setting, dict) or "seed" in setting:
            raise UserError(
                f"グリッドの {setting!r} は使えません。名前と値で書き、乱数シードは seeds に並べてください。"
            )
        values = {**(common or {}), **setting, "seed": seed}
        if unknown := [name for name in values if name not in KNOBS + VARIATION_NAMES]:
            known = ", ".join(KNOBS + VARIATION_NAMES)
            raise UserError(f"グリッドに知らない項目があります：{', '.join(unknown)}。使える項目：{known}")
        config = RunConfig().replace(
            {name: value for name, value in values.items() if name in KNOBS}, "グリッド"
        )
        variation = Variation(**{name: value for name, value in values.items() if name in VARIATION_NAMES})
        plan.append(Experiment(tuple(sorted(setting.items())), config, variation))
    return plan


def load_grid(path) -> list[Experiment]:
    """Read {"settings": …, "common": {…}, "seeds": […]}; without `seeds`, 42, 43 and 44."""
    grid = read_json(path, "グリッドのファイル")
    known = isinstance(grid, dict) and not set(grid) - {"settings", "common", "seeds"}
    if not known or not isinstance(grid.get("seeds", []), list):
        raise UserError(
            f'{path} は {{"settings": ..., "common": {{...}}, "seeds": [...]}} の形で書いてください。'
        )
    return make_plan(grid.get("settings", {}), grid.get("common"), grid.get("seeds", [42, 43, 44]))


class Results:
    """The file of results, one JSON line each, appended and never rewritten; and its copy, where there is
    one.
    """

    def __init__(self, path, mirror=None):
        self.path, self.mirror = Path(path), Path(mirror) / Path(path).name if mirror else None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            _drop_half_line(self.path)
        elif self.mirror and self.mirror.is_file():
            copy_file(self.mirror, self.path)  # a fresh machine starts from the copy
        records = read_rows(self.path, "実験の結果") if self.path.is_file() else []
        if any(not isinstance(record, dict) or record.get("schema") != SCHEMA for record in records):
            raise UserError(
                f"{self.path} は別のバージョンの結果です。何も変えていません。"
                "結果のファイルに別の名前を指定してください。"
            )
        self.records = {record["id"]: record for record in records}

    def append(self, record: dict) -> None:
        """Write a result to the disk before anything else happens; a copy that fails is announced and
        tried again.
        """
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records[record["id"]] = record
        if self.mirror:
            try:
                copy_file(self.path, self.mirror)
            except OSError as error:
                print(
                    f"⚠️ 結果を {self.mirror} にコピーできませんでした（{error}）。実験は続け、"
                    "次のときに試します。"
                )


def _drop_half_line(path: Path) -> None:
    """Cut off a last line that was half-written when its process was killed: that run is done again."""
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
        print(f"{path} の最後の行は書きかけでした（途中で止まったため）。その設定をもう一度実行します。")


def run_plan(plan: list[Experiment], results: Results, workshop, retry_failed: bool = False) -> list[tuple]:
    """Run in the workshop what has no result yet; return (experiment, record) of the whole plan, in its
    order.

    A run that fails or meets NaN is a record with a reason and is not repeated, unless `retry_failed` (a
    failure only). Raises TrainingStopped for the stop button; every result so far is on disk.
    """
    from tqdm.auto import tqdm

    wanted, known = {experiment.identity: experiment for experiment in plan}, results.records
    again = {name for name, record in known.items() if retry_failed and record["status"] == "failed"}
    missing = [name for name in wanted if name not in known or name in again]
    print(
        f"{len(wanted)} 個の設定のうち、{len(wanted) - len(missing)} 個は結果があります。残りを実行します。"
    )
    # runs on one base and seed share much
    missing.sort(key=lambda name: (wanted[name].config.model_name, wanted[name].config.seed))
    try:
        for name in tqdm(missing, desc="実験", unit="回", disable=not missing):
            results.append(_run_one(wanted[name], workshop))
    except KeyboardInterrupt:
        done = sum(name in known for name in wanted)
        raise TrainingStopped(
            f"停止しました。{len(wanted)} 個のうち {done} 個の結果は {results.path} にあります。"
            "もう一度実行すると残りだけを行います。",
            "interrupted",
            done,
        ) from None
    return [(experiment, known[experiment.identity]) for experiment in plan]


def _run_one(experiment: Experiment, workshop) -> dict:
    """Return the record of one run, whatever became of it: one setting that cannot run must not cost the
    others.
    """
    start, status, reason, metrics = time.perf_counter(), "ok", "", {}
    try:
        metrics = workshop.measure(experiment.config, experiment.variation)
    except Exception as error:
        broken = type(error).__name__ == "BrokenNumbers"
        status = "nan" if broken else "failed"
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        reason = (
            f"ステップ {reason.split()[-1]} の次で勾配が NaN か無限大になりました。" if broken else reason
        )
        print(f"⚠️ {dict(experiment.setting)} seed {experiment.config.seed}：{reason}")
    return {
        "schema": SCHEMA,
        "id": experiment.identity,
        "config": experiment.config.as_dict(),
        "variation": asdict(experiment.variation),
        "status": status,
        "reason": reason,
        "metrics": metrics,
        "device": workshop.machine.name,
        "seconds": round(time.perf_counter() - start, 3),
    }
