"""Sends files to the Hugging Face Hub, and says in a sentence what kept them from going; it chooses none."""

import tempfile
from pathlib import Path

from dpo_helpers.errors import UserError


def check_name(repo: str) -> None:
    """Refuse a name that no repository can have."""
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except ValueError:
        text = "は使えません。「ユーザー名/モデル名」の形に、英数字と - _ . で書いてください。"
        raise UserError(f"リポジトリの名前 {repo} {text}") from None


def send_files(folder: Path, names: list[str], contents: dict[str, bytes], repo: str, public: bool) -> None:
    """Send a folder's files of these names, those in `contents` as they stand there."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if get_token() is None:
        raise UserError(
            "Hugging Face のトークンがありません。https://huggingface.co/settings/tokens で Write の権限の"
            "トークンを作り、Colab では左の鍵の印（シークレット）に HF_TOKEN の名前で入れて、"
            "ほかでは hf auth login を実行してください。"
        )
    try:
        with tempfile.TemporaryDirectory() as staged:
            for name in names:
                if name in contents:
                    (Path(staged) / name).write_bytes(contents[name])
                else:
                    (Path(staged) / name).symlink_to((folder / name).resolve())
            HfApi().create_repo(repo, private=not public, exist_ok=True)
            HfApi().upload_folder(
                repo_id=repo, folder_path=staged, commit_message="DPO で学習したモデルを追加"
            )
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            advice = "書き込む権限がありません。トークンの Write の権限と、ユーザー名を確かめてください"
        else:
            advice = f"エラーが返りました（{error}）。少し待ってから、もう一度実行してください"
        raise UserError(f"{repo}：{advice}。") from error
    except (OSError, HTTPError) as error:
        raise UserError(
            f"Hugging Face Hub に送れませんでした（{error}）。ネットワークを確かめて、"
            "もう一度実行してください（送り終えた分は送り直しません）。"
        ) from error
    print(f"送りました：https://huggingface.co/{repo}")
