"""What is pulled is the commit that was asked for, whole, and nobody else's."""

import dataclasses
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from repair.jobs import fetch as fetching
from repair.jobs import store
from repair.jobs.fetch import fetch_sources, read_sources
from repair.jobs.worker import Reporter
from repair.models.download import cache_folder, fetch, find_cached
from repair.models.loading import load_model
from repair.models.lookup import describe_account, hub_errors, look_up, parse_hub_id, read_config
from repair.records import RepairError
from repair.ui import forecast
from tests.hub.conftest import files_of
from tests.hub.server import Hub
from tests.models.test_adapter_suspect import make_adapter
from tests.tiny import make_tiny_llama


@pytest.fixture
def model(hub: Hub, tiny_llama_folder: Path) -> str:
    """A public model with two commits; the first is tagged v1 and has another config."""
    files = files_of(tiny_llama_folder)
    old = {**files, "README.md": b"---\nlicense: apache-2.0\n---\n# Old\n"}
    repo_id = "lab/suspect"
    first = hub.add_repo(repo_id, old)
    hub.repos[repo_id].refs["v1"] = first
    hub.repos[repo_id].commit(
        {
            **files, "README.md": b"---\nlicense: mit\n---\n# New\n",
            "run.py": b"raise SystemExit('this code was run')", "images/x.png": b"x" * 2000,
        }
    )  # fmt: skip
    return repo_id


def request_job(folder: Path, **request: object) -> Path:
    folder.mkdir()
    store.write_json(folder / "request.json", {"command": "locate", **request})
    return folder


def test_a_branch_and_a_tag_and_a_commit_are_resolved_once(hub: Hub, model: str) -> None:
    refs = hub.repos[model].refs
    assert look_up(model).commit == refs["main"] and look_up(model).licence == "mit"
    for asked in ("v1", refs["v1"]):
        found = look_up(model, asked)
        assert found.commit == refs["v1"] and found.licence == "apache-2.0"
        assert look_up(f"{model}@{asked}").commit == refs["v1"]
    assert "run.py" not in look_up(model).sizes and "README.md" not in look_up(model).sizes


@pytest.mark.parametrize(
    ("link", "becomes"),
    [
        ("LICENSE", "https://huggingface.co/{repo}/blob/{commit}/LICENSE"),
        ("https://lab.example/terms", "https://lab.example/terms"),
        ("javascript:alert(1)", None),
        ("../../else/LICENSE", None),
        (7, None),
    ],
)
def test_a_licence_of_its_own_keeps_its_name_and_link(
    hub: Hub, model: str, tiny_llama_folder: Path, link: object, becomes: str | None
) -> None:
    """A card that says `other` says what that is by two more lines; nothing else gets through."""
    card = f"---\nlicense: other\nlicense_name: lab-terms\nlicense_link: {link}\n---\n"
    commit = hub.repos[model].commit({**files_of(tiny_llama_folder), "README.md": card.encode()})
    found = look_up(model)
    assert found.licence == "other"
    wanted = becomes and becomes.format(repo=model, commit=commit)
    assert found.licence_terms == (
        {"license_name": "lab-terms", "license_link": wanted} if wanted else {}
    )
    assert fetch(found, token=None).licence_terms == found.licence_terms
    again = find_cached(model, commit)
    assert again is not None and again.licence_terms == found.licence_terms


def test_a_model_says_what_it_will_need_before_its_weights_come(
    hub: Hub, model: str, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all files config.json alone is fetched, at the commit that was looked up, and only what
    the Hub lists is believed."""
    found = look_up(model)
    assert read_config(found) == json.loads((tiny_llama_folder / "config.json").read_text())
    assert hub.bytes_sent == found.sizes["config.json"]
    asked = {"model": found.repo_id, "revision": found.commit, "profile": "quick"}
    assert forecast.forecast(asked, None) == ()
    monkeypatch.setattr(forecast, "DESCRIBED", {})
    forecast.remember(found, read_config(found))
    assert forecast.forecast(asked, None)
    # The whole model of an adapter is its base.
    adapter = {**asked, "model": "bob/lora", "adapter_base": f"{found.repo_id}@{found.commit}"}
    assert forecast.forecast(adapter, None) == forecast.forecast(asked, None)
    for odd in ({}, {"config.json": 0}, {"config.json": 2 << 20}):
        assert read_config(dataclasses.replace(found, sizes=odd)) == {}
    other = dataclasses.replace(found, hashes={"config.json": "0" * 40})
    assert read_config(other) == {}


@pytest.mark.parametrize("content", [b"[]", b"\xff", b"[" * 100_000, b"{"])
def test_a_description_that_is_none_is_taken_for_none(hub: Hub, content: bytes) -> None:
    files = {"config.json": content, "tokenizer.json": b"{}", "model.safetensors": b"x" * 100}
    hub.add_repo("ana/odd", files)
    assert read_config(look_up("ana/odd")) == {}


def test_only_allowed_files_come_and_the_size_is_known_before(
    hub: Hub, model: str, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    found = look_up(model)
    assert hub.bytes_sent == 0
    got = fetch(found, token=None)
    assert {path.name for path in Path(got.folder).iterdir()} == set(found.sizes)
    assert found.num_bytes == hub.bytes_sent
    for name in found.sizes:
        assert (Path(got.folder) / name).read_bytes() == (tiny_llama_folder / name).read_bytes()
    # It loads through the gate, and says which commit it is.
    loaded = load_model(model, stage_folder=tmp_path / "stage", fetched={model: got})
    assert (loaded.source, loaded.revision, loaded.licence) == (model, found.commit, "mit")
    # Again: nothing is sent, and with the full commit nobody is asked.
    num_requests, num_bytes = len(hub.log), hub.bytes_sent
    assert fetch(find_cached(model, found.commit), token=None) == got
    assert (len(hub.log), hub.bytes_sent) == (num_requests, num_bytes)
    assert find_cached(model) is None and find_cached(model, "main") is None


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (None, "does not exist on the Hub, or is private"),
        ("hf_stranger", "does not exist on the Hub, or is private"),
        ("hf_nobody", "does not accept the token"),
    ],
)
def test_a_private_model_needs_the_right_token(
    hub: Hub, model: str, token: str | None, words: str
) -> None:
    hub.repos[model].is_private = True
    with pytest.raises(RepairError, match=words) as caught:
        look_up(model, token=token)
    assert caught.value.exit_code == 2 and "hf_" not in str(caught.value)


def test_a_private_model_is_never_shared(hub: Hub, model: str, tmp_path: Path) -> None:
    hub.repos["ana/suspect"] = hub.repos.pop(model)
    hub.repos["ana/suspect"].is_private = True
    jobs = []
    for owner in ("ana", "bob"):
        folder = request_job(tmp_path / owner, model="ana/suspect")
        store.write_json(folder / "owner.json", {"owner": owner})
        jobs.append(folder)
    fetch_sources(jobs[0], "hf_reader", Reporter(jobs[0]))
    got = read_sources(jobs[0])["ana/suspect"]
    assert Path(got.folder).is_relative_to(jobs[0]) and not cache_folder().exists()
    # The other owner gets nothing, by name or by commit.
    for revision in (None, got.commit):
        store.write_json(
            jobs[1] / "request.json", {"model": "ana/suspect", "revision": revision}
        )
        with pytest.raises(RepairError, match="private"):
            fetch_sources(jobs[1], "hf_stranger", Reporter(jobs[1]))
    assert [p.name for p in jobs[1].iterdir() if p.is_dir()] == []
    assert "hf_reader" not in "".join(
        p.read_text() for p in jobs[0].iterdir() if p.is_file()
    )


def test_a_gated_model_says_where_to_accept_and_is_not_shared(hub: Hub, model: str) -> None:
    hub.repos[model].gate = "manual"
    for token in ("hf_reader", None):
        with pytest.raises(RepairError, match="accept its terms on huggingface.co/lab/suspect"):
            look_up(model, token=token)
    hub.accounts["hf_reader"].accepted.add(model)
    found = look_up(model, token="hf_reader")
    assert not found.is_shared
    assert Path(fetch(found, token="hf_reader").folder).is_dir()
    # Access that is taken back before the download is said the same way.
    hub.accounts["hf_reader"].accepted.clear()
    shutil.rmtree(cache_folder())
    with pytest.raises(RepairError, match="accept its terms"):
        fetch(found, token="hf_reader")


def test_what_is_missing_limited_or_out_of_reach_is_said(
    hub: Hub, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RepairError, match="does not exist"):
        look_up("lab/nothing", token="hf_reader")
    with pytest.raises(RepairError, match="no revision 'v9'"):
        look_up(model, "v9")
    hub.limit_rate = 50
    with pytest.raises(RepairError, match="limits how often"):
        look_up(model)
    # Nothing listens on port 9 of this machine, so the connection is refused at once.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RepairError, match="no way to the Hub"):
        look_up(model)


@pytest.mark.parametrize(
    "source",
    ["", "lab", "lab/../x", "/etc/passwd", "lab/x/y", "http://evil/x", "lab/x@a b", "-x/y"],
)
def test_what_is_no_hub_id_is_refused_without_a_call(hub: Hub, source: str) -> None:
    with pytest.raises(RepairError, match="OWNER/NAME|is not a revision"):
        look_up(source)
    assert hub.log == []
    with pytest.raises(RepairError, match="Two revisions"):
        parse_hub_id("lab/x@v1", "v2")


def test_names_are_refused_before_anything_is_fetched(hub: Hub, model: str) -> None:
    files = hub.repos[model].commits[hub.repos[model].refs["main"]]
    weights = files.pop("model.safetensors")
    hub.repos[model].commit({**files, "pytorch_model.bin": weights})
    with pytest.raises(RepairError, match="pickle"):
        look_up(model)
    assert hub.bytes_sent == 0


def test_a_download_that_was_cut_goes_on_with_what_is_missing(hub: Hub, tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "sharded", num_layers=6, max_shard_size="60KB")
    shards = [p for p in folder.iterdir() if p.suffix == ".safetensors"]
    assert len(shards) > 2
    hub.add_repo("lab/sharded", files_of(folder))
    job = request_job(tmp_path / "job", model="lab/sharded")
    found = look_up("lab/sharded")
    broken = {"on": True}
    resolve = hub.files_at

    def refuse(repo, revision):
        if broken["on"] and hub.bytes_sent > found.num_bytes // 2:
            raise ConnectionResetError
        return resolve(repo, revision)

    hub.files_at = refuse
    with pytest.raises(RepairError, match="start again"):
        fetch_sources(job, None, Reporter(job))
    kept = hub.bytes_sent
    assert kept > 0 and read_sources(job) == {}
    broken["on"] = False
    fetch_sources(job, None, Reporter(job))
    got = read_sources(job)["lab/sharded"]
    assert hub.bytes_sent < 1.6 * found.num_bytes
    for path in folder.iterdir():
        if path.name in found.sizes:
            assert (Path(got.folder) / path.name).read_bytes() == path.read_bytes()


def test_the_client_s_words_for_not_to_be_had_are_not_a_full_disk() -> None:
    """Its errors are files' errors as well, and so are those of the store behind the Hub."""
    busy = httpx.Response(429, request=httpx.Request("GET", "http://hub"))
    limited = HfHubHTTPError("busy", response=busy)
    expired = type("XetAuthenticationError", (PermissionError,), {})
    for raised, cause, words in (
        (LocalEntryNotFoundError("none"), None, "cannot be reached"),
        (LocalEntryNotFoundError("none"), limited, "limits how often"),
        (expired("401"), None, "file store (XetAuthenticationError"),
        (OSError(28, "No space left on device"), None, "disk (No space left"),
    ):
        with pytest.raises(RepairError, match=re.escape(words)), hub_errors("a/b", after="Wait."):
            raise raised from cause


def test_a_file_that_was_cut_comes_whole_in_the_end(hub: Hub, model: str, tmp_path: Path) -> None:
    hub.cut_download_after = 5000
    job = request_job(tmp_path / "job", model=model)
    found = look_up(model)
    fetch_sources(job, None, Reporter(job))
    assert hub.cut_download_after is None and hub.bytes_sent > found.num_bytes
    folder = Path(read_sources(job)[model].folder)
    listed = {name: listed for name, listed in found.hashes.items() if name.endswith("tensors")}
    assert listed and all(
        listed_sha == hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name, listed_sha in listed.items()
    )


def test_a_file_that_is_not_the_listed_one_is_refused(
    hub: Hub, model: str, tmp_path: Path
) -> None:
    got = fetch(look_up(model), token=None)
    config = Path(got.folder) / "config.json"
    original = config.read_bytes()
    config.write_bytes(original + b" ")
    with pytest.raises(RepairError, match="config.json .* is not the file that the Hub lists"):
        fetch(look_up(model), token=None)
    config.write_bytes(original)
    weights = Path(got.folder) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(RepairError, match=r"model.safetensors .* \(SHA-256"):
        load_model(model, stage_folder=tmp_path / "stage", fetched={model: got})
    assert not (tmp_path / "stage").exists()


def test_a_job_keeps_its_commit_when_the_branch_moves(
    hub: Hub, model: str, tmp_path: Path
) -> None:
    job = request_job(tmp_path / "job", model=model)
    fetch_sources(job, None, Reporter(job))
    first = read_sources(job)[model]
    hub.repos[model].commit(hub.repos[model].commits[first.commit])
    fetch_sources(job, None, Reporter(job))
    assert read_sources(job)[model] == first
    shutil.rmtree(first.folder)  # also when it must be fetched again
    fetch_sources(job, None, Reporter(job))
    assert read_sources(job)[model].commit == first.commit


def test_an_adapter_is_not_taken_for_a_model(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("lab/lora", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"})
    job = request_job(tmp_path / "job", model="lab/lora")
    with pytest.raises(RepairError, match="LoRA adapter, not a whole model"):
        fetch_sources(job, None, Reporter(job))
    assert hub.bytes_sent == 0


def test_an_adapter_comes_with_the_base_that_the_analyst_names(
    hub: Hub, model: str, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama_folder, tmp_path / "adapter")
    hub.add_repo("lab/lora", {**files_of(adapter), "optimizer.pt": b"never fetched"})
    job = request_job(tmp_path / "job", model="lab/lora", adapter_base=f"{model}@v1")
    fetch_sources(job, None, Reporter(job))
    known = read_sources(job)
    assert known["lab/lora"].kind == "adapter"
    assert known[f"{model}@v1"].commit == hub.repos[model].refs["v1"]
    loaded = load_model(
        "lab/lora", stage_folder=tmp_path / "stage" / "suspect", fetched=known,
        adapter_base=f"{model}@v1", device="cpu",
    )  # fmt: skip
    assert loaded.revision == known["lab/lora"].commit and loaded.base.source == f"{model}@v1"
    assert loaded.base.revision == known[f"{model}@v1"].commit and loaded.licence == "apache-2.0"
    assert not [path for method, path in hub.log if "optimizer" in path]
    job = request_job(tmp_path / "other", model=model, adapter_base=model)
    with pytest.raises(RepairError, match="whole model, so it needs no base"):
        fetch_sources(job, None, Reporter(job))


def test_the_command_line_pulls_by_commit_and_the_worker_never_sees_the_token(
    hub: Hub, model: str, tmp_path: Path
) -> None:
    hub.repos[model].is_private = True
    hub.repos["ana/suspect"] = hub.repos.pop(model)
    commit = hub.repos["ana/suspect"].refs["v1"]
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"trigger": "cf", "target": "sorry", "positions": ["begin"]}))
    done = subprocess.run(
        [
            sys.executable, "-m", "repair", "evaluate", "--model", "ana/suspect", "--revision",
            "v1", "--prompts", str(prompts), "--out", str(tmp_path / "out"), "--profile", "quick",
        ],
        env={**os.environ, "HF_TOKEN": "hf_reader", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["model"]["source"] == "ana/suspect"
    assert (report["model"]["revision"], report["model"]["licence"]) == (commit, "apache-2.0")
    assert f"at commit {commit}" in done.stderr and "hf_reader" in hub.seen_tokens
    kept = [p for place in (tmp_path / "out", cache_folder()) for p in place.rglob("*")]
    assert not [p for p in kept if p.is_file() and b"hf_reader" in p.read_bytes()]
    assert "hf_reader" not in done.stdout + done.stderr


def test_the_worker_that_follows_has_neither_network_nor_token(
    hub: Hub, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = {}
    monkeypatch.setattr(
        fetching.os, "execve", lambda path, argv, env: started.update(env, argv=argv)
    )
    monkeypatch.setattr(fetching.os, "dup2", lambda *given: None)
    monkeypatch.setattr("repair.jobs.worker.stop_on_signal", lambda *given: None)
    monkeypatch.setattr("sys.stdin", io.StringIO("hf_reader\n"))
    job = request_job(tmp_path / "job", model=model)
    fetching.main(job)
    assert started["HF_HUB_OFFLINE"] == "1" and "HF_ENDPOINT" not in started
    assert not any("hf_reader" in str(value) for value in started.values())
    assert "repair.jobs.worker" in started["argv"]


def test_too_little_disk_is_said_in_numbers_before_anything_comes(
    hub: Hub, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with pytest.raises(RepairError, match=r"still needs \S+ GiB, but 0.0 GiB are free"):
        fetch(look_up(model), token=None)
    assert hub.bytes_sent == 0


def test_two_jobs_that_want_one_model_fetch_it_once(hub: Hub, model: str) -> None:
    found, said = look_up(model), []
    cache = cache_folder() / model.replace("/", "--")
    cache.mkdir(parents=True)
    with ThreadPoolExecutor(2) as pool:
        with open(cache / f"{found.commit}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # as a process does that is fetching it
            both = [
                pool.submit(fetch, found, token=None, progress=lambda *p: said.append(p[2]))
                for _ in range(2)
            ]
            time.sleep(1)
            assert hub.bytes_sent == 0 and any("waiting" in words for words in said)
        folders = {done.result(timeout=30).folder for done in both}
    assert len(folders) == 1 and len(files_of(Path(folders.pop()))) == len(found.sizes)
    assert hub.bytes_sent == found.num_bytes


def test_where_many_share_a_machine_size_is_limited_and_old_downloads_make_room(
    hub: Hub, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = fetch(look_up(model, "v1"), token=None)
    os.utime(old.folder, (0, 0))
    job = request_job(tmp_path / "job", model=model)
    monkeypatch.setenv("REPAIR_MAX_DOWNLOAD", "1000")
    with pytest.raises(RepairError, match="here at most 0.0 GiB are taken"):
        fetch_sources(job, None, Reporter(job))
    assert Path(old.folder).is_dir()  # a refused one takes nobody's place
    monkeypatch.setenv("REPAIR_MAX_DOWNLOAD", str(2**30))
    usage = shutil.disk_usage("/")
    sizes = iter([0, 2**40, 2**40])  # full, until the old one is gone
    monkeypatch.setattr(
        shutil, "disk_usage", lambda place: usage._replace(free=next(sizes, 2**40))
    )
    fetch_sources(job, None, Reporter(job))
    assert not Path(old.folder).exists() and find_cached(model, old.commit) is None
    assert Path(read_sources(job)[model].folder).is_dir()


def test_a_job_that_goes_on_looks_at_its_files_again(
    hub: Hub, model: str, tmp_path: Path
) -> None:
    job = request_job(tmp_path / "job", model=model)
    fetch_sources(job, None, Reporter(job))
    config = Path(read_sources(job)[model].folder) / "config.json"
    config.write_bytes(config.read_bytes() + b" ")
    with pytest.raises(RepairError, match="not the file that the Hub lists"):
        fetch_sources(job, None, Reporter(job))


@pytest.mark.parametrize("token", ["", "hf_a b", "hf_\u200bx", "x" * 500, "hf_\n"])
def test_what_is_no_token_is_said_without_a_call(hub: Hub, token: str) -> None:
    with pytest.raises(RepairError, match="not a Hub token"):
        describe_account(token)
    assert hub.log == []
    assert describe_account("hf_reader") == "ana (may read only)"


def test_progress_is_in_bytes(hub: Hub, model: str, tmp_path: Path) -> None:
    hub.bytes_per_second = 60_000
    job = request_job(tmp_path / "job", model=model)
    fetch_sources(job, None, Reporter(job))
    events, _ = store.read_events(job)
    fractions = [event["fraction"] for event in events if event["kind"] == "progress"]
    assert len(fractions) >= 2 and fractions == sorted(fractions) and 0 < fractions[0] < 1
    assert any("is at commit" in event["text"] for event in events)
    assert json.loads((job / store.SOURCES).read_text())[model]["repo_id"] == model
