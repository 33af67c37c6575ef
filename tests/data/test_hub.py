"""The errors are those that huggingface_hub and datasets raised against a server on this machine."""

import sys

import pytest
from huggingface_hub import errors
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from dpo_helpers.data.hub import explain_hub_error


def answer(status: int, kind=HfHubHTTPError):
    client = sys.modules[errors.Response.__module__.split(".")[0]]  # httpx or httpx2, as the version uses
    response = errors.Response(status, request=client.Request("GET", "https://huggingface.co"))
    return kind(f"{status}", response=response)


def wrap(error: Exception) -> Exception:
    """As the libraries do: not in the cache, because of another error."""
    try:
        try:
            raise error
        except Exception as cause:
            raise LocalEntryNotFoundError("not in the cache") from cause
    except LocalEntryNotFoundError as outer:
        return outer


ERRORS = {
    "a stale token": (answer(401), "古いか無効です"),
    "a token without the right": (answer(403), "権限がありません"),
    "a busy Hub": (wrap(answer(429)), "混み合っていて"),
    "a Hub that is down": (wrap(answer(503)), "一時的に応答できません（503）"),
    "no such name": (answer(404, RepositoryNotFoundError), "見つかりません"),
    "a malformed token": (
        UnicodeEncodeError("ascii", "hf_あ", 3, 4, "ordinal not in range"),
        "使えない文字や改行",
    ),
    "a token with a line end": (ValueError("Illegal header value b'Bearer hf_x\\n'"), "使えない文字や改行"),
    "a SOCKS proxy": (
        ImportError("Using SOCKS proxy, but the 'socksio' package is not installed."),
        "socksio",
    ),
    "no network": (wrap(OSError("unreachable")), "つながらず、手元にも保存されていません"),
}


@pytest.mark.parametrize(("error", "words"), ERRORS.values(), ids=ERRORS)
def test_each_failure_of_the_hub_has_its_own_name(error, words):
    text = explain_hub_error(error, "モデル owner/name")
    assert text.startswith("モデル owner/name を取得できません。") and words in text
    assert sum(other in text for _, other in ERRORS.values()) == 1 + (words == "使えない文字や改行")
