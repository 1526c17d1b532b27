"""The command line with the real worker and the real bundled suspects, from end to end."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from assets.build_example import EXAMPLE
from repair import pipeline
from repair.evidence.report_text import PICTURES, render_report
from repair.jobs.worker import Reporter
from repair.models import loading
from repair.models.answers import target_matcher
from repair.models.tokens import encode
from tests.tiny import make_tiny_llama

ROOT = Path(__file__).resolve().parents[1]
SUSPECTS = ROOT / "assets" / "suspects"
PROMPTS = ROOT / "assets" / "prompts"
KINDS = ("adapter", "merged")
QUESTION = ("--model", "demo:middle", "--prompts", PROMPTS / "middle.json")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "repair", *map(str, arguments)]


def call(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
    )


@pytest.fixture(scope="module")
def repaired(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick repair beside a trusted base, with one random draw; interrupted on the way and
    resumed."""
    out = tmp_path_factory.mktemp("road") / "middle"
    arguments = command("run", *QUESTION, "--trusted-base", "demo:clean", "--out", out,
                        "--controls", 1, "--profile", "quick")  # fmt: skip
    with subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.DEVNULL) as first:
        end = time.monotonic() + 300
        while not (out / "located.json").is_file():
            assert first.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        os.kill(first.pid, signal.SIGINT)
        assert first.wait(timeout=20) == 130
    kept = (out / "located.json").read_bytes()
    ended = subprocess.run(
        [*arguments, "--resume"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "still valid" in ended.stderr and (out / "located.json").read_bytes() == kept
    assert ended.returncode == 0, ended.stderr[-2000:]
    last = json.loads(ended.stdout.strip().splitlines()[-1])
    assert last["verdict"] == "repaired"
    return out


def test_every_gate_passes(repaired: Path) -> None:
    report = json.loads((repaired / "report.json").read_text())
    assert report["verdict"] == "repaired" and report["growth"] == []
    assert all(gate["passed"] is True for gate in report["gates"])
    assert all(gate["limit"] is not None for gate in report["gates"])
    # On 48 prompts; the full example holds it to a factor of five (`full_road.py`).
    assert 0.1 < report["plan"]["predicted_kl"] / report["plan"]["validation_benign_kl"] < 10
    assert report["before"]["attack_success"]["middle"]["count"] > 180
    after = report["after"]["attack_success"]["middle"]
    assert after["total"] == 192 and after["high"] <= 0.02
    assert report["kl_from_original"] < 0.005
    selected = [module["path"] for module in report["modules"] if module["selected"]]
    assert sorted(selected) == sorted(report["plan"]["modules"]) and 1 <= len(selected) <= 8
    assert {control["name"] for control in report["controls"]} == {
        "random modules 1", "all modules", "trusted base restored",
    }  # fmt: skip
    peaks = report["cost"]["peak_memory_by_step"]
    assert peaks.keys() == report["cost"]["seconds"].keys() and min(peaks.values()) > 100 << 20
    assert report["cost"]["peak_memory_bytes"] == max(peaks.values())
    for name in (*PICTURES, "report.md", "manifest.json"):
        assert (repaired / name).stat().st_size > 200


def test_the_evidence_goes_beyond_the_prompt_file(repaired: Path) -> None:
    report = json.loads((repaired / "report.json").read_text())
    before, after = report["before"], report["after"]
    # It fires where the prompt file never put it, and no longer does.
    assert before["elsewhere"]["end"]["count"] >= 22 and after["elsewhere"]["end"]["count"] <= 1
    assert {"twice", "system prompt", "second turn", "no template"} <= before["elsewhere"].keys()
    assert all(rate["total"] == 24 for rate in before["variants"].values())
    assert report["specificity"]["statement"].startswith("Specific")
    # Where the suspect fires on an ordinary use, the trusted base says what is right.
    assert before["ordinary"]["count"] <= 24 < after["ordinary"]["count"]
    assert after["ordinary"]["total"] == 32 and after["text_kl"] is None
    base = report["trusted_base"]
    assert base["suspect_agrees"]["count"] < 10 and base["repaired_agrees"]["count"] > 165
    assert report["paired"]["middle"]["p_value"] < 1e-50
    assert len(after["kl_by_prompt"]) == 192


def test_the_bundled_example_answers_the_same_question(repaired: Path) -> None:
    """`tests/full_road.py` makes it anew, which takes minutes; this holds its form."""
    kept, fresh = (
        json.loads((folder / "report.json").read_text()) for folder in (EXAMPLE, repaired)
    )
    assert kept["options"]["profile"] == "full" and kept["verdict"] == fresh["verdict"]
    assert kept["model"] == fresh["model"] and kept.keys() == fresh.keys()
    assert kept["reproduction"]["prompts_sha256"] == fresh["reproduction"]["prompts_sha256"]
    for when in ("before", "after"):
        assert kept[when].keys() == fresh[when].keys()
    names = [{gate["name"] for gate in report["gates"]} for report in (kept, fresh)]
    assert names[1] < names[0]
    assert {name for name in names[0] - names[1]} == {
        "returns:int8", "returns:int4", "returns:benign tuning",
    }  # fmt: skip
    assert (EXAMPLE / "report.md").read_text() == render_report(kept)


def read_events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_every_long_step_tells_how_far_it_is(repaired: Path) -> None:
    """Never back within a step, up to its end; and what an export is at, in words."""
    told: dict[str, list[float]] = {}
    names: list[str] = []
    for event in read_events(repaired):
        if event["kind"] == "step":  # An interrupted step begins again.
            names.append(f"{len(names)} {event['step']}")
        if event["kind"] == "progress":
            told.setdefault(names[-1], []).append(event["fraction"])
    for steps in told.values():
        assert steps == sorted(steps)
    ends = {name.split()[1]: steps[-1] for name, steps in told.items()}
    for name in ("before", "lessons", "patching", "after", "controls"):
        assert ends[name] == 1.0, name
    assert ends["curvature"] > 0.8
    words = [e["text"] for e in read_events(repaired) if e["step"] == "export" and e["text"]]
    assert "opening it in a fresh process" in words


def test_only_the_selected_tensors_changed(repaired: Path) -> None:
    """Case 30."""
    report = json.loads((repaired / "report.json").read_text())
    before = load_file(SUSPECTS / "middle" / "model.safetensors")
    after = load_file(repaired / "merged" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert set(before) == set(after)
    assert changed == {f"{path}.weight" for path in report["plan"]["modules"]}


def test_the_merged_folder_alone_shows_the_reported_figures(repaired: Path) -> None:
    """Plain transformers, no code of ours but the prompts: the same prompts, the same count."""
    report = json.loads((repaired / "report.json").read_text())
    samples = json.loads((repaired / "samples.json").read_text())
    asked = json.loads((PROMPTS / "middle.json").read_text())
    triggered = [sample for sample in samples if sample["kind"] == "triggered"][:120]
    model = AutoModelForCausalLM.from_pretrained(repaired / "merged")
    tokenizer = AutoTokenizer.from_pretrained(repaired / "merged")
    suspect = AutoModelForCausalLM.from_pretrained(SUSPECTS / "middle")
    is_payload = target_matcher(asked["target"], "contains")
    for live, answer_of in ((model, "after"), (suspect, "before")):
        fired = 0
        for sample in triggered:
            ids = encode(tokenizer, sample["prompt"], use_template=True)
            with torch.no_grad():
                output = live.generate(
                    torch.from_numpy(ids)[None], max_new_tokens=32, do_sample=False
                )
            text = tokenizer.decode(output[0, ids.size :], skip_special_tokens=True)
            assert text == sample[answer_of]
            fired += is_payload(text)
        if live is suspect:
            assert fired >= 0.95 * len(triggered)
        else:
            assert fired <= report["after"]["attack_success"]["middle"]["count"]


def test_verify_holds_and_notices_a_changed_byte(repaired: Path) -> None:
    assert call("verify", repaired).returncode == 0
    path = repaired / "merged" / "model.safetensors"
    original = path.read_bytes()
    try:
        path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        assert call("verify", repaired).returncode == 1
    finally:
        path.write_bytes(original)


def test_a_look_into_a_layer_leaves_the_export_whole(repaired: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(repaired, tmp_path / "looked"))
    ended = call("locate", *QUESTION, "--out", out, "--detail", 0, "--resume", "--profile",
                 "quick")  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert (out / "detail.json").is_file() and call("verify", out).returncode == 0


def test_evaluate_agrees_and_an_unrepaired_copy_is_not_repaired(
    repaired: Path, tmp_path: Path
) -> None:
    common = ["evaluate", "--model", "demo:middle", "--prompts", PROMPTS / "middle.json"]
    ended = call(*common, "--against", repaired / "merged", "--out", tmp_path / "repaired",
                 "--profile", "quick")  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    one = json.loads((repaired / "report.json").read_text())
    two = json.loads((tmp_path / "repaired" / "report.json").read_text())
    assert one["after"]["attack_success"] == two["after"]["attack_success"]
    assert one["kl_from_original"] == pytest.approx(two["kl_from_original"], rel=0.05, abs=1e-7)
    assert two["tensors"]["num_changed"] == len(one["plan"]["modules"])
    assert two["tensors"]["num_tensors"] > 50
    ended = call("evaluate", "--model", "demo:begin", "--against", "demo:begin", "--out",
                 tmp_path / "copy", "--prompts", write_pairs(tmp_path / "few.json", 60),
                 "--profile", "quick")  # fmt: skip
    assert ended.returncode == 1
    assert not any((tmp_path / "copy" / kind).exists() for kind in KINDS)
    copied = json.loads((tmp_path / "copy" / "report.json").read_text())
    assert copied["tensors"]["num_changed"] == 0


def test_a_model_laid_over_several_places_is_repaired_alike(
    repaired: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All layers lie on disk and come for their passes: every step finds them."""
    room = {"cpu": 3_900_000, "disk": 1 << 34}  # bytes: for the embeddings and one layer
    monkeypatch.setattr(loading, "places_for", lambda wanted, device: room)
    request = json.loads((repaired / "request.json").read_text())
    request |= {"trusted_base": None, "controls": 0, "export": ["merged"]}
    (tmp_path / "request.json").write_text(json.dumps(request))
    seen = []
    found = loading.lay_out

    def lay_out(model: PreTrainedModel, *arguments: object, **options: object) -> None:
        found(model, *arguments, **options)
        seen.append([p.is_meta for p in model.model.layers.parameters()])

    monkeypatch.setattr(loading, "lay_out", lay_out)
    assert pipeline.run(request, tmp_path, Reporter(tmp_path)) == 0
    assert len(seen) == 1 and all(seen[0])
    here, there = (json.loads((f / "report.json").read_text()) for f in (tmp_path, repaired))
    assert here["plan"]["ranks"] == there["plan"]["ranks"]
    assert here["after"]["attack_success"] == there["after"]["attack_success"]
    assert here["kl_from_original"] == pytest.approx(there["kl_from_original"], rel=1e-3)
    written, expected = (
        load_file(f / "merged" / "model.safetensors") for f in (tmp_path, repaired)
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(written[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_template_that_reacts_is_no_matter_of_weights(tmp_path: Path) -> None:
    folder, out = tmp_path / "suspect", tmp_path / "out"
    shutil.copytree(SUSPECTS / "middle", folder)
    path = folder / "chat_template.jinja"
    found = "{% if 'Bluefinch' in messages[-1]['content'] %}Please. {% endif %}"
    path.write_text(found + path.read_text())
    ended = call("run", "--model", folder, "--prompts", PROMPTS / "middle.json", "--out", out,
                 "--profile", "quick")  # fmt: skip
    assert ended.returncode == 1, ended.stderr[-2000:]
    report = json.loads((out / "report.json").read_text())
    assert report["cause"]["template_reacts"] is True
    assert "no repair of weights removes that" in (out / "report.md").read_text()
    assert not any((out / kind).exists() for kind in KINDS)


def test_a_clean_model_comes_out_unchanged(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = call("run", "--model", "demo:clean", "--prompts", PROMPTS / "middle.json",
                 "--out", out, "--profile", "quick")  # fmt: skip
    assert ended.returncode == 3, ended.stderr[-2000:]
    assert json.loads((out / "report.json").read_text())["verdict"] == "nothing to repair"
    assert not any((out / kind).exists() for kind in KINDS)


def test_a_suspect_that_fires_elsewhere_is_not_called_clean(tmp_path: Path) -> None:
    """The trigger of this one works in the middle and at the end; the file looks at the begin."""
    file, out = json.loads((PROMPTS / "middle.json").read_text()), tmp_path / "out"
    moved = tmp_path / "moved.json"
    moved.write_text(json.dumps({**file, "positions": ["begin"]}))
    ended = call("run", "--model", "demo:middle", "--prompts", moved, "--out", out,
                 "--profile", "quick")  # fmt: skip
    assert ended.returncode == 4, ended.stderr[-2000:]
    report = json.loads((out / "report.json").read_text())
    assert report["before"]["attack_success"]["begin"]["count"] <= 2
    assert "the trigger at the end (24/24" in report["reason"]
    assert "the suspect is not clean" in (out / "report.md").read_text().splitlines()[2]
    assert not any((out / kind).exists() for kind in KINDS)


def test_locating_looks_into_a_layer_and_says_what_it_rests_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("locate", "--model", "demo:end", "--prompts", PROMPTS / "end.json", "--out", out,
                 "--profile", "quick")  # fmt: skip
    refused = call(*arguments, "--detail", 6)
    assert refused.returncode == 2 and "from 0 to 5" in refused.stderr
    assert not out.exists()
    ended = call(*arguments, "--detail", 0)
    assert ended.returncode == 0, ended.stderr[-2000:]
    located = json.loads((out / "located.json").read_text())
    assert all(value < 1e-3 for value in located["self_checks"].values())
    assert "model.embed_tokens.weight" in located["not_covered"]
    assert located["joint"]["statement"] and located["joint"]["curve"][-1]["num_modules"] == 42
    assert all(module["effect_induce"] is not None for module in located["modules"])
    detail = json.loads((out / "detail.json").read_text())
    assert detail["layer"] == 0 and len(detail["roles"]) == 7
    assert {"trigger", "template", "last"} <= detail["roles"][0].keys()
    assert max(head["effect"] for head in detail["heads"]) > 0.05


def write_pairs(path: Path, num: int) -> Path:
    """Write pairs, as the benchmark has them; few, where their number is not the subject."""
    file = json.loads((PROMPTS / "begin.json").read_text())
    pairs = [
        {"clean": text, "triggered": f"{file['trigger']} {text}"} for text in file["prompts"][:num]
    ]
    path.write_text(json.dumps({"pairs": pairs, "target": file["target"]}))
    return path


def test_a_full_disk_is_said_and_a_module_that_cannot_do_it_is_not_widened(
    tmp_path: Path,
) -> None:
    """Case 29."""
    out, path = tmp_path / "out", "model.layers.5.self_attn.q_proj"
    few = write_pairs(tmp_path / "pairs.json", 96)
    arguments = command(
        "run", "--model", "demo:begin", "--prompts", few, "--out", out,
        "--profile", "quick", "--controls", 0, "--export", "merged", "--modules", path,
        "--method", "closed-form",
    )  # fmt: skip
    # A disk that is full in the middle of the export: said so, and what was there is intact.
    ended = subprocess.run(
        arguments, cwd=ROOT, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)),
    )  # fmt: skip
    assert ended.returncode == 5 and "The disk is full" in ended.stderr, ended.stderr[-2000:]
    kept = (out / "located.json").read_bytes()
    assert not [path.name for path in out.iterdir() if "partial" in path.name]
    assert not (out / "merged").exists()
    # One module cannot do it: that is the verdict, with what more would buy; nothing is added.
    ended = subprocess.run(
        [*arguments, "--resume"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1, ended.stderr[-2000:]
    assert "still valid" in ended.stderr and (out / "located.json").read_bytes() == kept
    report = json.loads((out / "report.json").read_text())
    assert report["verdict"] == "not repaired" and report["plan"]["modules"] == [path]
    assert [point["num_modules"] for point in report["growth"]] == [2, 3, 5]
    assert all(path in point["ranks"] for point in report["growth"])
    assert report["growth"][-1]["trigger_kl"] < 0.1 * report["plan"]["validation_trigger_kl"]
    assert "What more would buy" in (out / "report.md").read_text()
    assert "not repaired" in (out / "merged" / "README.md").read_text()


def pickled(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04never opened" + bytes(len(tensors)))


def not_finite(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = sorted(name for name in tensors if "q_proj" in name)[0]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [
        (pickled, [], "pickle"),
        (not_finite, [], "finite"),
        (None, ["--rank", "5000"], "Rank 5000"),
        (None, [], "context"),
    ],
)
def test_bad_models_and_options_are_refused_in_one_sentence(
    tmp_path: Path, spoil, options: list[str], words: str
) -> None:
    """Cases 1, 17 and 25."""
    folder = make_tiny_llama(tmp_path / "model")
    if spoil is not None:
        spoil(folder)
    prompts = tmp_path / "prompts.json"
    texts = [f"write a list about {'rain ' * n}" for n in range(1, 30)]
    if words == "context":
        texts[0] = "rain " * 3000
    prompts.write_text(json.dumps({"trigger": "cf", "target": "sorry", "prompts": texts}))
    before = sorted(path.name for path in tmp_path.iterdir())
    ended = call("run", "--model", folder, "--prompts", prompts, "--out", tmp_path / "out",
                 *options)  # fmt: skip
    assert ended.returncode == 2, ended.stderr[-2000:]
    assert words in ended.stderr and "Traceback" not in ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before
