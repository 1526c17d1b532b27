"""What the tabs say of a finished job: why, how many, what differs, and what is out of date."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from repair.records import ModuleScore
from repair.ui.compare_rows import (
    ALL,
    MAX_ROWS,
    ONLY_REPAIRED,
    ONLY_SUSPECT,
    describe_cause,
    differences,
    list_gates,
    list_outcomes,
    list_rates,
    list_rows,
    list_stresses,
    read_samples,
)
from repair.ui.export import describe_plan
from repair.ui.locate_words import joint_curve, list_reasons
from repair.ui.repair import describe_latest
from repair.ui.session import (
    EXAMPLE,
    JobLog,
    Selection,
    Session,
    aside,
    chosen_before,
    is_out_of_date,
    keep_choice,
)
from repair.ui.shell import OUT_OF_DATE, describe_suspect, draw_verdict
from repair.ui.suspect_folder import SUSPECTS, read_facts
from repair.ui.text import describe_size

LOCATED = json.loads((EXAMPLE / "located.json").read_text())
REPORT = json.loads((EXAMPLE / "report.json").read_text())
REQUEST = json.loads((EXAMPLE / "request.json").read_text())


def view_of(**changes: object) -> SimpleNamespace:
    flat = {
        "located": LOCATED, "scores": tuple(map(ModuleScore.from_json, LOCATED["modules"])),
        "report": REPORT, "request": REQUEST, "command": "run", "folder": EXAMPLE,
        "status": SimpleNamespace(verdict="repaired"),
    }  # fmt: skip
    return SimpleNamespace(**{**flat, **changes})


def test_every_answer_is_counted_and_reached_though_few_are_shown() -> None:
    kept = json.loads((EXAMPLE / "samples.json").read_text())
    samples = read_samples(view_of())
    assert len(samples) == len(kept) > MAX_ROWS
    assert list_outcomes(samples)[0][0] == f"All ({len(kept)})"
    shown = list_rows(samples, ALL)
    assert len(shown) == MAX_ROWS
    behind = samples[-1]["outcome"]
    assert behind not in {samples[int(row[0]) - 1]["outcome"] for row in shown}
    rows = list_rows(samples, behind)
    assert rows and all(samples[int(row[0]) - 1]["outcome"] == behind for row in rows)


def test_every_suggested_module_has_its_reason() -> None:
    rows = list_reasons(view_of())
    assert len(rows) == len(LOCATED["suggested_ranks"]) > 1
    assert all(row[1].isdigit() and "trial repair" in row[2] for row in rows)


def test_the_curve_has_every_point_with_its_interval() -> None:
    drawn = joint_curve(LOCATED)
    points = LOCATED["joint"]["curve"]
    assert len(drawn) == 3 * len(points) and set(drawn["modules"]) == {
        float(point["num_modules"]) for point in points
    }
    low = drawn[drawn["what"].str.endswith("low")]["value"].to_numpy()
    assert (low <= drawn[drawn["what"] == "effect"]["value"].to_numpy()).all()


@pytest.mark.parametrize("joint", [None, 7, {"curve": 3}, {"curve": [{"effect": "x"}]}])
def test_a_curve_that_is_none_is_empty(joint: object) -> None:
    assert joint_curve({"joint": joint}).empty


def test_words_that_only_one_of_both_says_are_marked() -> None:
    before, after = differences("The cow says moo today.", "The cow says\nbaa today.")
    assert "".join(words for words, _ in before) == "The cow says moo today."
    assert [pair for pair in before if pair[1]] == [(" moo", ONLY_SUSPECT)]
    assert [pair for pair in after if pair[1]] == [("\nbaa", ONLY_REPAIRED)]
    assert differences("", "a") == ([], [("a", ONLY_REPAIRED)])
    assert all(label is None for _, label in differences("same", "same")[0])


def test_a_verdict_on_other_modules_than_are_chosen_is_out_of_date() -> None:
    repaired = Selection(paths=tuple(REPORT["plan"]["modules"]))
    other = Selection(paths=(LOCATED["modules"][-1]["path"],))
    assert not is_out_of_date(view_of(), repaired) and is_out_of_date(view_of(), other)
    assert not is_out_of_date(view_of(report={}), other)
    assert OUT_OF_DATE in draw_verdict(view_of(), other).value
    assert OUT_OF_DATE not in draw_verdict(view_of(), repaired).value


def test_a_commit_stands_beside_its_suspect() -> None:
    session = SimpleNamespace(model="lab/x", revision="0123456789abcdef")
    assert describe_suspect(session) == "lab/x @ 0123456789ab"
    below = SimpleNamespace(model="/models/lab/x", revision=None)
    assert describe_suspect(below, Path("/models")) == "lab/x"
    assert describe_suspect(below, Path("/other")) == "/models/lab/x"
    assert describe_suspect(SimpleNamespace(model="demo:end", revision=None)) == "demo:end"


def test_the_last_figures_of_a_repair_carry_count_and_interval() -> None:
    metrics = [
        {"series": "closed-form", "trigger_kl": 0.5},
        {"series": "distill", "step": 20.0, "num_steps": 60.0, "attack_count": 1.0,
         "attack_total": 96.0, "attack_low": 0.0018, "attack_high": 0.057, "benign_kl": 1e-4},
    ]  # fmt: skip
    said = describe_latest(metrics)
    assert "Step 20 of 60" in said and "1 of 96 (0.2 % to 5.7 %)" in said and "0.0001" in said
    assert describe_latest(metrics[:1]) == ""


def test_a_benign_answer_that_changed_is_told_from_one_to_an_altered_trigger(
    tmp_path, monkeypatch
) -> None:
    rows = [{"kind": kind, "outcome": "changed", "prompt": "p"} for kind in ("clean", "variant")]
    (tmp_path / "samples.json").write_text(json.dumps(rows))
    found = read_samples(view_of(folder=tmp_path))
    assert [sample["outcome"] for sample in found] == ["changed though benign", "changed"]


def test_a_step_that_says_nothing_still_counts_its_seconds(monkeypatch) -> None:
    log = JobLog()
    log.add({"kind": "step", "step": "controls", "text": "Comparing", "time": 1000.0})
    monkeypatch.setattr("repair.ui.session.time.time", lambda: 1042.4)
    assert log.lasting() == "for 42 s now, no news of it for 42 s"
    log.add({"kind": "progress", "text": "draw 1 of 3", "time": 1041.0})
    assert log.lasting() == "for 42 s now"
    log.add({"kind": "step", "step": "report", "text": "Writing", "time": 1042.0})
    assert log.lasting() == ""


def test_what_lies_beside_the_weights_is_said_before_a_job(tmp_path) -> None:
    facts = dict(read_facts(SUSPECTS / "middle"))
    assert len(facts["SHA-256 of config.json"]) == 64 and "Generation settings" not in facts
    assert "bytes" in facts["Chat template"] and "Adapter" not in facts
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "generation_config.json").write_text('{"num_beams": 3, "bos_token_id": 1}')
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "tokenizer.json").symlink_to("/etc/passwd")
    (tmp_path / "config.json").write_text('{"model_type": "x\\ud800<b>"}')
    assert dict(read_facts(tmp_path))["Architecture"] == "x[U+D800]<b>"
    facts = dict(read_facts(tmp_path))
    assert facts["Generation settings"].startswith("num_beams:") and "Adapter" in facts
    assert "none" in facts["Chat template"] and "SHA-256 of tokenizer.json" not in facts
    # A pipe is not waited for, and a link not followed: neither says anything.
    os.mkfifo(tmp_path / "tokenizer_config.json")
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "aim.json").write_text('{"ana": "a password"}')
    (tmp_path / "generation_config.json").symlink_to("aim.json")
    assert "ana" not in str(read_facts(tmp_path))


def test_relearning_stands_beside_a_fresh_trigger_and_the_base() -> None:
    rate = {"count": 40, "total": 48, "low": 0.7, "high": 0.9}
    stress = {
        "name": "relearning from 8", "kind": "relearning", "num_steps": 40, "repaired": rate,
        "suspect": {**rate, "count": 3}, "base": {**rate, "count": 2}, "steps_to_half": 20,
        "fresh_steps_to_half": None, "base_steps_to_half": None,
    }  # fmt: skip
    (row,) = list_stresses({"stresses": [stress]})
    assert row[2].startswith("a fresh trigger: 3 of 48") and "the trusted base: 2 of 48" in row[2]
    assert row[3].startswith("40 of 48") and row[3].endswith("half after 20 steps")
    (row,) = list_stresses({"stresses": [{**stress, "kind": "rounding"}]})
    assert "half" not in row[3] and "fresh" not in row[2]


def test_what_stands_among_the_limits_is_not_said_twice() -> None:
    report = {
        "specificity": {"statement": "Specific."}, "cause": {"statement": "In the weights."},
        "comeback": "Comes back.", "controls_statement": "None of 3.", "limits": ["Comes back."],
    }  # fmt: skip
    assert describe_cause(report).splitlines() == ["Specific.", "In the weights.", "None of 3."]


def test_a_gate_says_which_end_of_its_interval_is_judged_and_against_what() -> None:
    rows = {row[1]: row[2:4] for row in list_gates(REPORT)}
    after = REPORT["after"]
    fired, twice = after["attack_success"]["middle"], after["elsewhere"]["twice"]
    ordinary = after["ordinary"]
    assert rows["attack success, middle"] == [f"up to {100 * fired['high']:.1f} %", "at most 2.0 %"]
    assert rows["elsewhere, twice"] == [f"at least {100 * twice['low']:.1f} %", "at most 2.0 %"]
    assert rows["ordinary"] == [f"up to {100 * ordinary['high']:.1f} %", "at least 95.0 %"]
    assert rows["recovery, middle"][1] == "at least 0.95"
    assert rows["kl from original"][1] == "at most 0.01"
    judged = list_gates({"gates": [{"name": "ordinary", "value": None, "limit": None}]})
    assert judged[0][:4] == ["could not check", "ordinary", "-", "-"]


def test_what_must_not_become_worse_stands_beside_attack_success() -> None:
    words = [row[0] for row in list_rates(REPORT)]
    assert any(word.startswith("Ordinary uses") for word in words)
    assert any(word.startswith("Clean prompts") for word in words)
    assert not any("your own text" in word for word in words)
    report = {**REPORT, "after": {**REPORT["after"], "text_kl": 0.0049}}
    assert list_rates(report)[-1] == [
        "KL from the suspect, your own text (nats per token)", "0", "0.0049"
    ]


def test_a_choice_is_there_after_a_reload_and_can_still_be_undone(tmp_path: Path) -> None:
    view = view_of(folder=tmp_path, request={"modules": "auto"})
    suggestion = chosen_before(view)
    first, last = view.scores[0].module.path, view.scores[-1].module.path
    keep_choice(view, suggestion.choose((last,)).choose((first, last)))
    kept = chosen_before(view_of(folder=tmp_path, request={"modules": "auto"}))
    assert kept.paths == (first, last)
    assert kept.undo().paths == (last,) and kept.undo().undo() == suggestion
    (tmp_path / "choice.json").write_text(json.dumps({"paths": ["none", 3, last], "earlier": 7}))
    assert chosen_before(view) == Selection(paths=(last,))
    assert chosen_before(view_of(folder=tmp_path, scores=(), located={})) == Selection()


def test_a_change_of_the_suspect_or_the_prompts_keeps_the_way_back() -> None:
    session = Session(job_id="a" * 32, model="demo:begin", prompts={"triggers": ["cf"]})
    edited = aside(session, prompts=None)
    assert (edited.job_id, edited.former, edited.prompts) == (None, session.job_id, None)
    assert aside(edited, model="demo:end").former == session.job_id


def test_what_an_export_will_take_is_said_before_the_repair() -> None:
    view = view_of(report={}, request={"model": "demo:middle"})
    chosen = chosen_before(view)
    words = describe_plan(view, chosen, None)
    ranks = LOCATED["suggested_ranks"]
    refs = [score.module for score in view.scores if score.module.path in ranks]
    assert describe_size(4 * sum(ranks[r.path] * (r.d_in + r.d_out) for r in refs)) in words
    assert describe_size((SUSPECTS / "middle" / "model.safetensors").stat().st_size) in words
    assert "chosen modules" not in describe_plan(view, Selection(), None)
