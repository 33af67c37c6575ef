"""Says which folders a start may use: their names, whose they are, links, and this machine's lock.

A folder is a run's by its run.json, not by its name: `v3.2` is a start of `v3` only where its record says so.
"""

import errno
import json
import os
import re
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from dpo_helpers.config import RunConfig
from dpo_helpers.errors import UserError
from dpo_helpers.files import exists, list_names, read_bytes
from dpo_helpers.folders import raise_error

RECORD = "run.json"  # says whose folder it is: the run it is a start of, its settings, the owner's token
FORMAT = 2  # of run.json; what an older notebook left has none
LOCK = "run.lock"
OURS = re.compile(rf"(sft|dpo)-\d+(\.partial)?|writing-\w+|warmed-up|without-scaler|base_model\w*|{LOCK}")
REMAINS = {"run_config.json", "slot-0", "slot-1"}  # what is in a folder that some version of ours wrote
FRESH = "RESUME を「最初から」（ターミナルでは --resume never）にしてください。"
OTHER_NAME = "RUN_NAME（ターミナルでは --run-dir か --mirror）に、新しいフォルダの名前を書いてください。"


def read_record(folder) -> dict | None:
    """Return a folder's run.json, {} where it is cut off or garbage, None where there is none."""
    if (content := read_bytes(Path(folder) / RECORD)) is None:
        return None
    try:
        value = json.loads(content)
        sound = type(value["number"]) is int and all(type(value[key]) is str for key in ("first", "owner"))
        return value if sound and type(value["settings"]) is dict else {}
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}


def find_checkpoints(folder: Path) -> Path:
    """Return where a run's checkpoints lie: beside its folder, which is the result alone."""
    return folder.with_name(f"{folder.name}.checkpoints")


def make_refusal(where, different: list[str]) -> UserError:
    return UserError(
        f"{where} は別の設定の結果なので、続きにも上書きにも使いません。違い：{'、'.join(different)}\n"
        f"設定を元に戻すか、RUN_NAME（RUN_DIR）に別の名前を書くか、{FRESH}"
    )


def check_apart(folder: Path, mirror: Path | None = None) -> None:
    """Refuse a mirror in the run's folder or the reverse: each run would copy the copies."""
    for own in (folder.resolve(), find_checkpoints(folder).resolve()) if mirror else ():
        if mirror.resolve().is_relative_to(own) or own.is_relative_to(mirror.resolve()):
            raise UserError(f"--mirror の {mirror} と結果の {folder} は、互いの外に置いてください。")


def add_number(root: Path, number: int) -> Path:
    """Return the folder of one of a name's starts: name, name.2, name.3 and so on."""
    return root if number == 1 else root.with_name(f"{root.name}.{number}")


def _find_starts(root: Path) -> dict[int, dict]:
    """Return {number: record} of the folders that say of themselves that they are starts of this one."""
    starts, own = {}, read_record(root)
    if own is not None:
        starts[1] = own
    for name in list_names(root.parent):
        record = read_record(root.parent / name) if name.startswith(f"{root.name}.") else None
        if record and record["first"] == root.name and name == f"{root.name}.{record['number']}":
            starts[record["number"]] = record
    return starts


def choose_number(roots: list[Path], config: RunConfig, resume: str) -> int:
    """Return which start of the name to go on with, or the first free one for a fresh start."""
    found = [(number, root, record) for root in roots for number, record in _find_starts(root).items()]
    if resume == "never":
        number = max([0, *(number for number, *_ in found)]) + 1
        while any(list_names(add_number(root, number)) for root in roots):
            number += 1
        if number > 1:
            print(f"新しく始めます。前の結果は残し、{add_number(roots[0], number)} を使います。")
        return number
    changes = {(number, root): _differences(record, config) for number, root, record in found}
    same = {number for number, _ in changes} - {number for (number, _), names in changes.items() if names}
    if changes and not same:
        number, root = max((place for place, names in changes.items() if names), key=lambda place: place[0])
        raise make_refusal(add_number(root, number), changes[number, root])
    if (number := max(same, default=1)) > 1:
        print(f"{add_number(roots[0], number)} の続きを使います。")
    return number


def _differences(record: dict, config: RunConfig) -> list[str]:
    """Name the settings that differ from a record's; of one that is cut off none: the checkpoint's decide."""
    if not record:
        return []
    if record.get("format") != FORMAT:
        return [f"ノートブックのバージョン: {record.get('format')} → {FORMAT}"]
    return RunConfig().replace(record["settings"]).differences(config)


def check_ours(place: Path, config: RunConfig) -> None:
    """Refuse a folder that is not new, empty, or a run's of these settings."""
    if foreign := [name for name in list_names(find_checkpoints(place)) if not OURS.fullmatch(name)]:
        raise UserError(
            f"{find_checkpoints(place)} に、学習のものではない {foreign[0]} があります。{OTHER_NAME}"
        )
    names, record = set(list_names(place)) - {f"{RECORD}.new"}, read_record(place)
    remains = names & REMAINS
    if record and (different := _differences(record, config)):
        raise make_refusal(place, different)
    if not names or record or (record == {} and (names == {RECORD} or remains)):
        return
    if remains:
        raise UserError(
            f"{place} は、前のバージョンのノートブックが書いたものなので、続きには使えません。"
            f"何も変えていません。結果はそのまま残ります。\n{OTHER_NAME}"
        )
    raise UserError(
        f"{place} には、この学習のものではないファイルがあります（{min(names)} など）。"
        f"何も変えていません。\n{OTHER_NAME}"
    )


def make_absolute(name) -> Path:
    """Return the absolute path of a folder that a user named; refuse what is no name of its own."""
    path = Path(os.path.abspath(os.path.expanduser(str(name))))
    try:
        os.lstat(f"{path}.checkpoints")
    except (OSError, ValueError) as error:  # a null character or a lone surrogate is a ValueError
        if getattr(error, "errno", errno.ENAMETOOLONG) == errno.ENAMETOOLONG:
            text = f"{str(name)!r:.60} はフォルダの名前に使えません。RUN_NAME に短い名前を書いてください。"
            raise UserError(text) from None
    if str(name).strip() in ("", ".", "..") or Path.cwd().is_relative_to(path):
        raise UserError(
            f"「{name}」は作業中のフォルダなので使えません。RUN_NAME に、run のような名前を書いてください。"
        )
    return path


def refuse_links(folder: Path) -> None:
    """Refuse a folder with a link that leads outside: what is written there would be written through it."""
    for root, folders, files in os.walk(folder, onerror=raise_error):
        for path in (Path(root) / name for name in (*folders, *files)):
            if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
                raise UserError(
                    f"{path} は外のファイルへのリンクなので、書き換えません。リンクを消してください。"
                )


@contextmanager
def hold_lock(folder: Path, called: Path):
    """Hold this machine's lock on a folder, made if need be; where the body raises, leave nothing new.

    `called` is what messages call it. The lock is the caller's to release where the body does not raise.
    """
    made = [path for path in (folder, *folder.parents) if not exists(path)]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(folder / LOCK), timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"フォルダ {called} は、別のノートブックかターミナルが使っています。混ざるので、始めません。\n"
            "そちらを止めるか、別の名前（例：run-2）を RUN_NAME に書いてから、もう一度実行してください。"
        ) from None
    try:
        yield lock
    except BaseException:
        lock.release()
        if made:
            (folder / LOCK).unlink(missing_ok=True)
        for path in made:
            with suppress(OSError):  # not empty: it was not refused, but cut off later
                path.rmdir()
        raise


def explain_unreadable(error: OSError, place: Path) -> UserError:
    """Return what to say where a start cannot know what is there already, and so must not begin."""
    return UserError(
        f"{error.filename or place} を読み書きできません（{error.strerror or error}）。"
        "前の続きがあるかもしれないので、まだ始めません。\n"
        "少し待って、もう一度実行してください。続くときは、書き込める場所を RUN_DIR に指定してください。"
        "Google Drive なら、接続するセルからやり直すか、"
        "USE_DRIVE をオフ（ターミナルでは --mirror を省く）にします。"
    )
