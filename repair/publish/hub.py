"""Upload to the Hub: checked before any long work, private by default, never a surprise.

    check_plan (what was typed) -> look_at_targets (who asks, what is there) -> upload -> verify

One repository holds one kind of export: an adapter beside a whole model would be put on it by
whoever loads it. Large files go up one by one, which the Hub remembers, so that a push that was
cut goes on with the rest; then everything becomes visible in one commit on the state that was
looked at, and the Hub's list of hashes is compared with ours. Free of torch.

What is not proven here: the Hub's own rules, which the tests' stand-in only resembles.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from repair.models.lookup import HUB_ID, git_hash, hub_errors, listed_hash
from repair.records import RepairError

KINDS = ("adapter", "merged", "both")
_LOADED = re.compile(r"[^/]*[.](safetensors|safetensors[.]index[.]json|bin|pt|pth|gguf)|adapter_.*")
_EMPTY = {".gitattributes"}  # what the Hub itself puts into a new repository


@dataclass(frozen=True, slots=True, kw_only=True)
class PushPlan:
    """What the analyst decided about an upload."""

    repo: str  # OWNER/NAME
    kind: str = "merged"  # adapter, merged, or both, in two repositories
    is_public: bool = False
    is_pull_request: bool = False
    is_forced: bool = False  # also when the verdict is not `repaired`
    shows_trigger: bool = False  # otherwise hashed
    base_model: str | None = None  # the suspect's Hub id, where it may be named

    def targets(self) -> dict[str, str]:
        """Return {kind of export: repository}."""
        if self.kind != "both":
            return {self.kind: self.repo}
        return {"merged": self.repo, "adapter": f"{self.repo}-adapter"}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, flat: Mapping[str, Any]) -> "PushPlan":
        return cls(**flat)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One repository as it stands before the upload."""

    repo: str
    exists: bool
    is_private: bool
    head: str | None  # its latest commit
    files: dict[str, str]  # name -> hash, as the Hub lists them

    def describe(self, plan: PushPlan) -> str:
        """Return what will happen, in one sentence."""
        if plan.is_pull_request:
            return f"A pull request on {self.repo} will be opened; nothing there is changed."
        seen = "private" if self.is_private else "PUBLIC: anyone can see it"
        if set(self.files) - _EMPTY:
            return f"{self.repo} holds an earlier upload, which is replaced; it is {seen}."
        if self.exists:
            return f"{self.repo} is there, empty, and {seen}; it will be filled."
        return f"{self.repo} will be made, {seen}."


def missing_kind(folder: Path, plan: PushPlan) -> str | None:
    """Return the first kind of export that the plan wants and `folder` does not hold, or None."""
    for kind in plan.targets():
        if not any((folder / kind).glob("*.safetensors")):
            return kind
    return None


def check_plan(plan: PushPlan) -> None:
    """Raise RepairError for names and choices that cannot be; calls nobody."""
    if plan.kind not in KINDS:
        raise RepairError(f"{plan.kind!r} is not {', '.join(KINDS)}. Choose one.")
    for repo in plan.targets().values():
        if not HUB_ID.fullmatch(repo) or "--" in repo or ".." in repo:
            raise RepairError(
                f"{repo[:200]!r} is not a repository name. Use the form OWNER/NAME, with letters, "
                "digits, and single - . or _ between them."
            )
    if plan.base_model is not None and not HUB_ID.fullmatch(plan.base_model):
        raise RepairError(
            f"{plan.base_model[:200]!r} is not the Hub id of a base model. Use OWNER/NAME, or "
            "leave it out."
        )


def look_at_targets(plan: PushPlan, token: str | None) -> list[Target]:
    """Return the repositories that the plan writes to; everything a token can tell is checked.

    A few short requests, nothing is changed. Raises RepairError for no token, one that may only
    read, an owner who is somebody else, a name that is taken, and a repository more visible than
    was asked for.
    """
    check_plan(plan)
    if not token:
        raise RepairError(
            "No Hub token was found. On a Space, sign in at the top of the page. Elsewhere set "
            "HF_TOKEN, log in with `hf auth login`, or give it in the app; the token needs the "
            "right to write."
        )
    api = HfApi(token=token)
    with hub_errors("The Hub account"):
        account = api.whoami()
    _check_account(plan, account)
    targets = [_look_at(api, repo, plan) for repo in plan.targets().values()]
    if not all(target.exists for target in targets):
        _check_may_create(plan, account)
    return targets


def upload(
    target: Target,
    files: Mapping[str, Path | bytes],
    *,
    hashes: Mapping[str, str],
    plan: PushPlan,
    token: str,
    title: str,
    progress: Callable[[float, float, str], None],
) -> str:
    """Upload `files` (name in the repository -> file here or bytes); return the address.

    `hashes` are the known SHA-256 of files here. Raises RepairError for whatever the Hub refuses
    and when what it lists afterwards is not what was sent.
    """
    api, repo = HfApi(token=token), target.repo
    listed = {name: _hashes(content, hashes.get(name)) for name, content in files.items()}
    with hub_errors(repo, after="What is there already is not sent again: start again."):
        if not target.exists and not plan.is_pull_request:
            api.create_repo(repo, private=not plan.is_public)
            target = _look_at(api, repo, plan)
        if not plan.is_pull_request and _holds(target.files, listed):
            return f"{api.endpoint}/{repo}"  # a push that was cut behind its commit
        if plan.is_pull_request and (found := _earlier_pull_request(api, repo, title, listed)):
            return found
        additions = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        total = sum(addition.upload_info.size for addition in additions)
        done = 0
        for addition in additions:
            size = addition.upload_info.size
            progress(done, total, f"{addition.path_in_repo}, {size / 2**20:.1f} MiB")
            try:
                api.preupload_lfs_files(repo, [addition], create_pr=plan.is_pull_request)
            except RuntimeError as error:  # the client hides the Hub's own answer in one
                raise error.__cause__ or error from None
            done += size
        try:
            commit = api.create_commit(
                repo,
                [*additions, *_deletions(target, files, plan)],
                commit_message=title,
                create_pr=plan.is_pull_request,
                parent_commit=target.head,
            )
        except ValueError as error:  # of the card's metadata, by the Hub's own check
            said = ascii(str(error))[1:-1][:300]
            raise RepairError(f"The Hub refuses the upload: {said}") from None
        progress(total, total, "comparing hashes")
        revision = commit.pr_revision or commit.oid
        remote = _listed_files(api, repo, revision)
        is_whole = plan.is_pull_request or _holds(remote, listed)
        if not is_whole or not _has(remote, listed):
            raise RepairError(
                f"What {repo} lists after the upload is not what was sent. Do not use it: delete "
                "it on the Hub and push again."
            )
    return str(commit.pr_url or f"{api.endpoint}/{repo}")


def _check_account(plan: PushPlan, account: Mapping[str, Any]) -> None:
    """Raise RepairError when the token cannot write where the plan wants to."""
    token = (account.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise RepairError(
            "The Hub token may only read. Make one with the right to write (Hub settings, Access "
            "tokens), and push again."
        )
    if token.get("role") == "fineGrained" and not plan.is_pull_request:
        _check_scopes(plan, token.get("fineGrained"))
    owners = [account.get("name"), *(org.get("name") for org in account.get("orgs") or [])]
    owner = plan.repo.split("/")[0]
    if owner not in owners and not plan.is_pull_request:
        raise RepairError(
            f"The Hub token is {owners[0]}'s, who is not {owner!r} and no member of it. Use the "
            f"form {owners[0]}/NAME, or open a pull request."
        )


def _check_may_create(plan: PushPlan, account: Mapping[str, Any]) -> None:
    """Raise RepairError for a member of an organization who may only read there."""
    owner = plan.repo.split("/")[0]
    for org in account.get("orgs") or []:
        if org.get("name") == owner and org.get("roleInOrg") in ("read", "no_access"):
            raise RepairError(
                f"{account.get('name')} may only read in {owner}, and make no repository there. "
                "Ask an admin of it for the right to write, or use another name."
            )


def _check_scopes(plan: PushPlan, scopes: Any) -> None:
    """Raise RepairError for a token of chosen rights, none of which lets it write there."""
    for repo in plan.targets().values():
        try:
            granted = {
                permission
                for scope in scopes["scoped"]
                if scope["entity"].get("name") in (repo, repo.split("/")[0])
                for permission in scope["permissions"]
            }
        except (KeyError, TypeError, AttributeError):  # The Hub says it otherwise: it decides.
            return
        if "repo.write" not in granted:
            raise RepairError(
                f"The Hub token has chosen rights, and none of them lets it write to {repo}. Give "
                "it write access to that repository or its owner (Hub settings, Access tokens)."
            )


def _look_at(api: HfApi, repo: str, plan: PushPlan) -> Target:
    """Return a repository as it stands; raises RepairError when the plan cannot be done to it."""
    with hub_errors(repo):
        try:
            info = api.model_info(repo, files_metadata=True)
        except RepositoryNotFoundError:
            if plan.is_pull_request:
                raise RepairError(
                    f"{repo} does not exist, or the token may not see it, so there is nothing to "
                    "open a pull request on. Leave --pull-request out to make it."
                ) from None
            return Target(
                repo=repo, exists=False, is_private=not plan.is_public, head=None, files={}
            )
        if not plan.is_pull_request:
            api.auth_check(repo, write=True)
    files = {f.rfilename: listed_hash(f) for f in info.siblings or []}
    if not plan.is_pull_request:
        if info.private is False and not plan.is_public:
            raise RepairError(
                f"{repo} exists and is public. Ask for a public upload, or choose another name."
            )
        if set(files) - _EMPTY and "manifest.json" not in files:
            raise RepairError(
                f"The name {repo} is taken: it holds {len(files)} files. Choose another name, or "
                "open a pull request on it."
            )
    return Target(
        repo=repo, exists=True, is_private=bool(info.private), head=info.sha, files=files
    )


def _earlier_pull_request(
    api: HfApi, repo: str, title: str, listed: Mapping[str, tuple[str, str]]
) -> str | None:
    """Return an open pull request that holds the same already: the answer to it was lost."""
    for found in api.get_repo_discussions(repo, discussion_type="pull_request"):
        is_ours = found.title == title and found.status in ("open", "draft")
        if is_ours and _has(_listed_files(api, repo, f"refs/pr/{found.num}"), listed):
            return found.url
    return None


def _listed_files(api: HfApi, repo: str, revision: str) -> dict[str, str]:
    info = api.model_info(repo, revision=revision, files_metadata=True)
    return {file.rfilename: listed_hash(file) for file in info.siblings or []}


def _deletions(
    target: Target, files: Mapping[str, Any], plan: PushPlan
) -> list[CommitOperationDelete]:
    """Return what must go, so that nobody loads it beside what comes.

    Of an earlier upload of ours everything else; of somebody's model, weights and adapters.
    """
    old = set(target.files) - set(files) - _EMPTY
    if plan.is_pull_request:
        old = {name for name in old if _LOADED.fullmatch(name)}
    return [CommitOperationDelete(path_in_repo=name) for name in sorted(old)]


def _has(remote: Mapping[str, str], listed: Mapping[str, tuple[str, str]]) -> bool:
    """Tell whether all our files are there; the Hub lists one of the two hashes of each."""
    return all(remote.get(name) in hashes for name, hashes in listed.items())


def _holds(remote: Mapping[str, str], listed: Mapping[str, tuple[str, str]]) -> bool:
    """Tell whether our files are there, and no others."""
    return _has(remote, listed) and set(remote) - _EMPTY == set(listed)


def _hashes(content: Path | bytes, sha256: str | None) -> tuple[str, str]:
    """Return SHA-256 and git's SHA-1; the latter is only of small files, which the Hub lists so."""
    if isinstance(content, Path) and content.stat().st_size > 2**24:
        if sha256 is None:
            with content.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return sha256, sha256
    data = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.sha256(data).hexdigest(), git_hash(data)
