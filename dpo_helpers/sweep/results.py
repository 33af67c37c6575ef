"""Keeps the results of an experiment: one JSON line a run, appended, never rewritten, with a copy on
Drive; it runs nothing.
"""

import hashlib
import json
import os
import threading
from dataclasses import asdict
from pathlib import Path

from dpo_helpers.config import RunConfig
from dpo_helpers.errors import UserError
from dpo_helpers.files import copy_file
from dpo_helpers.sweep.runs import Variation

SCHEMA = 1  # of a line in results.jsonl
RECORD_KEYS = {
    "schema",
    "id",
    "config",
    "variation",
    "rows",
    "base",
    "status",
    "reason",
    "metrics",
    "versions",
    "device",
    "finished",
}
MIRROR_SECONDS = 30  # how long the end of a sweep waits for Drive


def identify(config: RunConfig, variation: dict, base: str, rows: str) -> str:
    """Return what makes a run the same run: its configuration, rows, base and the version of this record."""
    changed = {
        **asdict(Variation()),
        **variation,
        "data_file": bool(variation["data_file"]),
    }  # its content counts, not its place
    parts = [SCHEMA, config.as_dict(), changed, base, rows]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def parse_results(text: str, path) -> tuple[list[dict], str]:
    """Return (records, the half-written last line or ""); refuses another version and garbage anywhere
    else.
    """
    records, broken = [], ""
    *lines, last = text.split("\n")  # `last` is "" where the file ends as it should
    for number, line in enumerate([*lines, last], start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines) + 1:
                broken = line
                continue
            record = None
        if isinstance(record, dict) and record.get("schema", SCHEMA) != SCHEMA:
            raise UserError(
                f"{path} の {number} 行目は別のバージョン（schema {record['schema']}、"
                f"このプログラムは {SCHEMA}）の結果です。"
                "何も変えていません。結果のファイルに別の名前を指定してください。"
            )
        if not isinstance(record, dict) or not set(record) >= RECORD_KEYS:
            raise UserError(
                f"{path} の {number} 行目は実験の結果として読めません。何も変えていません。"
                "ファイルを直すか、別の名前を指定してください。"
            )
        records.append(record)
    return records, broken


class Results:
    """The file of results, one JSON line each, appended and never rewritten; and its copy on Drive, where
    there is one.
    """

    def __init__(self, path, mirror=None):
        self.path = Path(path)
        self.mirror = Path(mirror) / self.path.name if mirror else None
        self._copier, self._problem = None, None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.records = self._read_own()
        if self.mirror:
            self._take_from_mirror()

    def _read_own(self) -> dict[str, dict]:
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        records, broken = parse_results(text, self.path)
        if broken:
            aside = self.path.with_name(f"{self.path.name}.half-written")
            with open(aside, "a", encoding="utf-8") as file:
                file.write(broken + "\n")
            raw = self.path.read_bytes()
            os.truncate(self.path, raw.rfind(b"\n") + 1)
            print(
                f"{self.path} の最後の行は書きかけでした（途中で止まったため）。"
                f"{aside.name} に移し、その設定をもう一度実行します。"
            )
        elif text and not text.endswith("\n"):  # killed between the line and its end
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("\n")
        return {_identify_record(record): record for record in records}

    def _take_from_mirror(self) -> None:
        """Add what only the mirror has: a fresh machine starts from it, and no copy overwrites what was
        not read.
        """
        try:
            text = self.mirror.read_text(encoding="utf-8") if self.mirror.exists() else ""
            records, _ = parse_results(text, self.mirror)
        except (OSError, UnicodeDecodeError, UserError) as error:
            print(f"写し先の結果を読めないので、写しは作らずに続けます：{error}")
            self.mirror = None
            return
        new = []
        for record in records:
            own = self.records.get(_identify_record(record))
            if own is None or (own["status"] == "failed" and record["status"] != "failed"):
                new.append(record)
                self._write(record)
        if new:
            print(f"{self.mirror} にあった {len(new)} 個の結果を引き継ぎました。")

    def append(self, record: dict) -> None:
        """Write a result to the disk before anything else happens, then let the copy follow."""
        self._write(record)
        if self.mirror and not (self._copier and self._copier.is_alive()):
            self._copier = threading.Thread(
                target=self._copy, daemon=True
            )  # a Drive that hangs must not stop the runs
            self._copier.start()

    def _write(self, record: dict) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"結果を {self.path} に書けません（{error}）。空きを作るか別の場所を指定し、"
                "もう一度実行してください。"
            ) from error
        self.records[_identify_record(record)] = record

    def _copy(self) -> None:
        try:
            copy_file(self.path, self.mirror)
            self._problem = None
        except OSError as error:
            if self._problem is None:
                print(
                    f"⚠️ 結果を {self.mirror} に写せませんでした（{error}）。実験は続け、"
                    "次の結果のときにまた試します。"
                )
            self._problem = error

    def close(self) -> None:
        """Copy once more, so that the mirror holds the last result, and wait for it, but not for ever."""
        if not self.mirror or not self.path.exists():
            return
        if self._copier:
            self._copier.join(MIRROR_SECONDS)
        if not (self._copier and self._copier.is_alive()):
            self._copier = threading.Thread(target=self._copy, daemon=True)
            self._copier.start()
            self._copier.join(MIRROR_SECONDS)
        if self._copier.is_alive():
            print(f"⚠️ {self.mirror} が応答しません。結果は {self.path} にあります。")


def _identify_record(record: dict) -> str:
    """Name a record as a plan would: a knob that is newer than the record counts with its default."""
    config, variation = RunConfig().replace(record["config"], "結果のファイル"), record["variation"]
    return identify(config, variation, record["base"], record["rows"])
