"""Upload one export to the Hub: private by default, only the files we know, never a surprise.

The repository is made first, then the folder's allow-listed files go up in one commit or pull
request. What is not proven here: the Hub's own rules; the tests use a local stand-in for it.
"""

import json
import os
import re
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx

from repair.publish.manifest import check_manifest
from repair.records import RepairError

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
ALLOWED_NAMES = {
    "adapter": ("adapter_model.safetensors", "adapter_config.json", "README.md"),
    "merged": (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "model-[0-9]*-of-[0-9]*.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "chat_template.jinja",
        "README.md",
    ),
}


def read_verdict(folder: Path) -> str:
    """Return the verdict in the folder's report; raise RepairError where there is none."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        return str(report["verdict"])
    except (OSError, ValueError, KeyError, TypeError):
        raise RepairError(
            f"{folder} holds no report.json with a verdict. Give the output folder of a run."
        ) from None


def push(
    folder: Path,
    *,
    repo: str,
    kind: str,
    is_public: bool = False,
    is_pull_request: bool = False,
    is_forced: bool = False,
) -> str:
    """Upload `folder/KIND` to the model repository `repo` and return the address of the result.

    A new repository is private unless `is_public`; an existing one keeps its visibility, and
    is refused when it is public but a private one was asked for. Raises RepairError for a bad
    name, a missing export, a verdict other than `repaired` (unless forced), a missing token,
    and whatever the Hub refuses.
    """
    if not REPO_ID.fullmatch(repo):
        raise RepairError(f"--repo {repo!r} is not a repository name. Use the form OWNER/NAME.")
    verdict = read_verdict(folder)
    if verdict != "repaired" and not is_forced:
        raise RepairError(
            f"The verdict of {folder} is {verdict!r}, and only 'repaired' is uploaded. "
            "Read its report.md; --force uploads it all the same."
        )
    export = folder / kind
    names = ALLOWED_NAMES[kind]
    if not export.is_dir() or not any(export.glob("*.safetensors")):
        raise RepairError(
            f"{folder} holds no {kind} export. Run again with --export {kind}, or choose the "
            "other --kind."
        )
    for path in export.iterdir():
        if path.is_symlink() or not any(path.match(name) for name in names):
            raise RepairError(
                f"{export} holds {path.name!r}, which no export of ours has. Nothing was "
                "uploaded; remove it, or run again."
            )
    token = os.environ.get("HF_TOKEN") or get_token()
    if not token:
        raise RepairError(
            "No Hub token was found. Set HF_TOKEN, or log in with `hf auth login`; the token "
            "needs the right to write."
        )
    problems = check_manifest(folder)
    if problems:
        raise RepairError(
            f"{folder} is not what its manifest says: {problems[0]} Only an unchanged export is "
            "uploaded; run the repair again."
        )
    try:
        return _upload(
            HfApi(token=token),
            export,
            repo=repo,
            is_public=is_public,
            is_pull_request=is_pull_request,
        )
    except HFValidationError as error:
        raise RepairError(f"The Hub does not accept the name {repo!r}: {error}") from None
    except HfHubHTTPError as error:
        reason = error.server_message or str(error).splitlines()[0]
        raise RepairError(
            f"The Hub refused the upload to {repo}: {reason[:300]} Nothing of this folder has "
            "changed; check the token's rights and the name, then push again."
        ) from None
    except (httpx.HTTPError, OSError) as error:
        raise RepairError(
            f"The Hub could not be reached ({type(error).__name__}). Check the network and push "
            "again; the export is unchanged."
        ) from None


def _upload(
    api: HfApi, export: Path, *, repo: str, is_public: bool, is_pull_request: bool
) -> str:
    if is_pull_request:
        if not api.repo_exists(repo):
            raise RepairError(
                f"{repo} does not exist, or the token may not see it, so there is nothing to "
                "open a pull request on. Leave --pull-request out to make it."
            )
    else:
        api.create_repo(repo, private=not is_public, exist_ok=True)
        # An existing repository keeps its visibility: never publish by accident.
        if not is_public and api.model_info(repo).private is False:
            raise RepairError(
                f"{repo} exists and is public. Add --public to upload there, or choose another "
                "name."
            )
    commit = api.upload_folder(
        repo_id=repo,
        folder_path=export,
        allow_patterns=list(ALLOWED_NAMES[export.name]),
        commit_message="Upload a repaired model",
        create_pr=is_pull_request,
    )
    return str(commit.pr_url or commit.commit_url)
