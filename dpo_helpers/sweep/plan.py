"""Plans an experiment, runs what is missing of it, and keeps every result at once; nothing here trains or
draws.
"""

import hashlib
import json
import time
from dataclasses import asdict, dataclass, fields
from functools import cache, cached_property
from itertools import product

from dpo_helpers.config import RunConfig
from dpo_helpers.errors import TrainingStopped, UserError
from dpo_helpers.files import hash_file, read_json
from dpo_helpers.sweep.results import SCHEMA, Results, identify
from dpo_helpers.sweep.runs import VARIATION_NAMES, Variation

KNOBS = tuple(item.name for item in fields(RunConfig))


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
        return identify(
            self.config,
            asdict(self.variation),
            find_base(self.config),
            hash_rows(self.config, self.variation),
        )


def find_base(config: RunConfig) -> str:
    """Name the base model; that of the embedded one changes with whatever decides its weights."""
    from dpo_helpers.keep.run import find_own_base

    own = find_own_base(config)
    return own.name if own else config.model_name


def hash_rows(config: RunConfig, variation: Variation) -> str:
    """Name the rows by what they are made from: a file's content, or the generated rows before anything is
    done to them.
    """
    if variation.data_file:
        return hash_file(variation.data_file)[:16]
    return _hash_generated(config.num_samples, config.seed, config.held_out_fraction)


@cache
def _hash_generated(*settings) -> str:
    from dpo_helpers.data.generate import generate_preferences

    rows = generate_preferences(*settings)
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()[:16]


def make_plan(
    settings: dict | list[dict], common: dict | None = None, seeds: list[int] = (42,)
) -> list[Experiment]:
    """Return every setting with every seed.

    `settings` is a list of changes, or {name: [values]} of which every combination is meant. A name is a knob
    of RunConfig or of Variation. Raises UserError for unknown names, values out of range and an empty grid,
    before anything runs.
    """
    if isinstance(settings, dict):
        if wrong := [name for name, values in settings.items() if not isinstance(values, list)]:
            raise UserError(
                f"グリッドの {', '.join(wrong)} は、値を [ ] に並べて書いてください。例：[0.1, 0.2]"
            )
        settings = (
            [dict(zip(settings, values, strict=True)) for values in product(*settings.values())]
            if settings
            else []
        )
    if not settings or not seeds:
        raise UserError("グリッドが空です。試す値（と seeds の乱数の種）を、少なくとも一つ書いてください。")
    plan = []
    for setting, seed in product(settings, seeds):
        if not isinstance(setting, dict) or "seed" in setting:
            raise UserError(
                f"グリッドの {setting!r} は使えません。名前と値の組で書き、乱数の種は seeds "
                "に並べてください。"
            )
        values = {**(common or {}), **setting, "seed": seed}
        if unknown := [name for name in values if name not in KNOBS + VARIATION_NAMES]:
            raise UserError(
                f"グリッドに知らない項目があります：{', '.join(unknown)}。使える項目："
                f"{', '.join(KNOBS + VARIATION_NAMES)}"
            )
        config = RunConfig().replace(
            {name: value for name, value in values.items() if name in KNOBS}, "グリッド"
        )
        variation = Variation(**{name: value for name, value in values.items() if name in VARIATION_NAMES})
        plan.append(Experiment(tuple(sorted(setting.items())), config, variation))
    return plan


def run_plan(plan: list[Experiment], results: Results, workshop, retry_failed: bool = False) -> list[tuple]:
    """Run in the workshop what has no result yet; return (experiment, record) of the whole plan, in its
    order.

    A run that fails or meets NaN is a record with a reason and is not repeated, unless `retry_failed` (a
    failure only). Raises TrainingStopped for the stop button; every result so far is on disk.
    """
    from tqdm.auto import tqdm

    wanted = {experiment.identity: experiment for experiment in plan}
    missing = [
        name
        for name in wanted
        if name not in results.records or (retry_failed and results.records[name]["status"] == "failed")
    ]
    print(
        f"{len(wanted)} 個の設定のうち、{len(wanted) - len(missing)} 個は結果があります。"
        f"残りの {len(missing)} 個を実行します。"
    )
    missing.sort(
        key=lambda name: (find_base(wanted[name].config), wanted[name].config.seed)
    )  # each base is loaded once
    try:
        for name in tqdm(missing, desc="実験", unit="回", disable=not missing):
            results.append(_run_one(wanted[name], name, workshop))
    except KeyboardInterrupt:
        done = sum(name in results.records for name in wanted)
        raise TrainingStopped(
            f"停止しました。{len(wanted)} 個のうち {done} 個の結果は {results.path} "
            "にあります。もう一度実行すると残りだけを行います。",
            "interrupted",
            done,
        ) from None
    finally:
        results.close()
    return [(experiment, results.records[experiment.identity]) for experiment in plan]


def _run_one(experiment: Experiment, name: str, workshop) -> dict:
    """Return the record of one run, whatever became of it."""
    from importlib.metadata import version

    from dpo_helpers.machine import clear_memory
    from dpo_helpers.train.callbacks import BrokenNumbers

    start, status, reason, metrics = time.perf_counter(), "ok", "", {}
    try:
        metrics = workshop.measure(experiment.config, experiment.variation)
    except BrokenNumbers as broken:
        status, reason = "nan", f"ステップ {broken.step} の次で勾配が NaN か無限大になりました。"
    except Exception as error:  # one setting that cannot run must not cost the others
        status, reason = (
            "failed",
            str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}",
        )
    if reason:
        clear_memory()
        print(f"⚠️ {dict(experiment.setting)} seed {experiment.config.seed}：{reason}")
    packages = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")
    return {
        "schema": SCHEMA,
        "id": name,
        "config": experiment.config.as_dict(),
        "variation": asdict(experiment.variation),
        "base": find_base(experiment.config),
        "rows": hash_rows(experiment.config, experiment.variation),
        "status": status,
        "reason": reason,
        "metrics": metrics,
        "versions": {package: version(package) for package in packages},
        "device": workshop.machine.name,
        "seconds": round(time.perf_counter() - start, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def load_grid(path) -> list[Experiment]:
    """Read {"settings": …, "common": {…}, "seeds": […]}; without `seeds`, 42, 43 and 44."""
    grid = read_json(path, "グリッドのファイル")
    known = {"settings", "common", "seeds"}
    if not isinstance(grid, dict) or set(grid) - known or not isinstance(grid.get("seeds", []), list):
        raise UserError(
            f'{path} は {{"settings": ..., "common": {{...}}, "seeds": [...]}} の形で書いてください。'
        )
    return make_plan(grid.get("settings", {}), grid.get("common"), grid.get("seeds", [42, 43, 44]))
