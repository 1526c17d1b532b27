"""The stand-in is strict: what the Hub refuses, it refuses too, by the real client."""

import httpx
import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from tests.hub.server import Hub

BIG = b"x" * 2000
GOOD_CARD = b"---\nlicense: mit\n---\n# A model\n"


@pytest.fixture
def api(hub: Hub) -> HfApi:
    hub.add_repo("ana/model", {"README.md": GOOD_CARD})
    return HfApi(token="hf_writer")


def commit(api: HfApi, files: dict[str, bytes], **options: object) -> None:
    additions = [CommitOperationAdd(name, data) for name, data in files.items()]
    api.create_commit("ana/model", additions, commit_message="x", **options)


def test_bytes_without_the_announced_hash(hub: Hub) -> None:
    answer = httpx.put(f"{hub.url}/large/{'0' * 64}", content=BIG)
    assert answer.status_code == 400 and hub.large == {}


def test_a_large_file_that_was_never_sent(hub: Hub, api: HfApi) -> None:
    lines = (
        '{"key": "header", "value": {"summary": "x"}}\n'
        '{"key": "lfsFile", "value": {"path": "a.safetensors", "oid": "00", "size": 2000}}\n'
    )
    answer = httpx.post(
        f"{hub.url}/api/models/ana/model/commit/main", content=lines,
        headers={"Authorization": "Bearer hf_writer"},
    )  # fmt: skip
    assert answer.status_code == 400 and len(hub.repos["ana/model"].commits) == 1


def test_a_stale_parent(hub: Hub, api: HfApi) -> None:
    head = hub.repos["ana/model"].refs["main"]
    commit(api, {"a.txt": b"1"}, parent_commit=head)
    with pytest.raises(HfHubHTTPError) as caught:
        commit(api, {"a.txt": b"2"}, parent_commit=head)
    assert caught.value.response.status_code == 412


@pytest.mark.parametrize(
    "card",
    [
        b"---\nbase_model: /home/ana/suspect\n---\n",
        b"---\nbase_model_relation: cousin\n---\n",
        b"---\ntags: backdoor\n---\n",
        b"---\nlicense: [mit\n---\n",
    ],
)
def test_a_card_whose_metadata_is_not_valid(hub: Hub, api: HfApi, card: bytes) -> None:
    with pytest.raises(ValueError, match="Invalid metadata"):
        commit(api, {"README.md": card})
    assert len(hub.repos["ana/model"].commits) == 1


@pytest.mark.parametrize("token", ["hf_reader", "hf_stranger", "hf_unknown"])
def test_tokens_without_the_right(hub: Hub, api: HfApi, token: str) -> None:
    with pytest.raises(HfHubHTTPError) as caught:
        commit(HfApi(token=token), {"a.txt": b"1"})
    assert caught.value.response.status_code in (401, 403)


def test_an_expired_token(hub: Hub, api: HfApi) -> None:
    hub.accounts["hf_writer"].requests_left = 1
    api.whoami()
    with pytest.raises(HfHubHTTPError):
        api.whoami()
