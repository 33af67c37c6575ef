"""Says in Japanese why the Hugging Face Hub gave nothing, for models and data sets alike; it asks nothing."""

TOKEN_PAGE = "https://huggingface.co/settings/tokens"
NEW_TOKEN = (
    f"{TOKEN_PAGE} で Read の権限のトークンを作り直して HF_TOKEN に入れるか、HF_TOKEN を消してください。"
)
BUSY = "少し待ってから、もう一度実行してください。"


def explain_hub_error(error: BaseException, what: str) -> str:
    """Return what failed and what to do next; `what` names it, e.g. モデル owner/name.

    The libraries wrap errors in each other ("not in the cache" around "too many requests"), so the whole
    chain is looked at, and the most telling link wins.
    """
    chain = list(_follow_causes(error))
    for explain in (_explain_request, _explain_answer):
        for link in chain:
            if text := explain(link, what):
                return f"{what} を取得できません。{text}"
    return (
        f"{what} を取得できません。Hugging Face Hub につながらず、手元にも保存されていません。"
        "ネットワークを確かめて、もう一度実行してください。"
    )


def _follow_causes(error: BaseException | None):
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _explain_request(error: BaseException, what: str) -> str:
    """What is wrong on this side, before anything was asked."""
    name, text = type(error).__name__, str(error)
    if isinstance(error, UnicodeEncodeError) or "Illegal header value" in text:
        return f"トークン（HF_TOKEN）に使えない文字や改行が入っています。コピーし直すか、{NEW_TOKEN}"
    if "SOCKS" in text:
        return (
            "プロキシの設定（ALL_PROXY など）が SOCKS ですが、それに要るパッケージがありません。"
            "pip install socksio PySocks を実行し、ランタイムを再起動してください。"
        )
    if name == "ProxyError":
        return "プロキシ（HTTPS_PROXY など）が応答しません。設定が正しいかを確かめてください。"
    if name == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE がオンで、手元にも保存されていません。オフにしてから実行してください。"
    return ""


def _explain_answer(error: BaseException, what: str) -> str:
    """What the Hub's own answer says."""
    name, status = type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)
    if name == "GatedRepoError":
        return (
            "利用の条件に同意した人だけが使えます。Hugging Face のページで条件に同意し、"
            f"{TOKEN_PAGE} で作った Read の権限のトークンを HF_TOKEN に入れてください"
            "（Colab では、左の鍵の印のシークレットに入れて、ノートブックからのアクセスをオンにします）。"
        )
    if name in ("RepositoryNotFoundError", "DatasetNotFoundError", "HFValidationError") and status != 429:
        return "Hugging Face Hub に見つかりません。名前のつづりと、非公開ならトークンを確かめてください。"
    if status == 401:
        return f"トークン（HF_TOKEN）が古いか無効です。{NEW_TOKEN}"
    if status == 403:
        return f"トークン（HF_TOKEN）に、これを読む権限がありません。{NEW_TOKEN}"
    if status == 429:
        return f"Hugging Face Hub が混み合っていて、アクセスを制限しています。{BUSY}"
    if status and status >= 500:
        return f"Hugging Face Hub が一時的に応答できません（{status}）。{BUSY}"
    return ""
