"""Distillation on a tiny model: what it keeps, when it ends, how it resumes and gives up."""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from repair import pipeline
from repair.__main__ import build_request
from repair.jobs.worker import Reporter
from repair.locate.curvature import whitening_of
from repair.locate.fisher import collect_factors
from repair.locate.lessons import Lessons, measure_kl
from repair.lowrank import distillation
from repair.lowrank.adapter import attached
from repair.lowrank.checkpoint import (
    read_training,
    read_updates_file,
    save_training,
    save_updates,
)
from repair.lowrank.closed_form import BUDGET_MARGIN, solve_closed_form
from repair.lowrank.distillation import (
    MAX_ROLLBACKS,
    PATIENCE,
    WEIGHT_CLEAN,
    WEIGHT_NEAR,
    DistillReport,
    DivergedError,
    Standing,
    TrainingState,
    distill,
)
from repair.lowrank.validation import Validation
from repair.models.hooks import count_hooks
from repair.models.loading import LoadedModel, load_model
from repair.options import build_parser
from repair.records import EXIT_GATE_FAILED, EXIT_UNEXPECTED, LowRankUpdate, RepairError
from tests.bench.planted import plant, write_prompts
from tests.locate.material import make_lessons
from tests.lowrank.material import UPPER, make_validation, random_updates, some_ranks
from tests.tiny import make_tiny_llama


@pytest.fixture(scope="module")
def validation(tiny_llama: LoadedModel) -> Validation:
    return make_validation(tiny_llama)


def standing(
    updates: tuple[LowRankUpdate, ...], *, kl: float = 1e9, is_enough: bool = False
) -> Standing:
    return Standing(step=0, updates=updates, trigger_kl=kl, benign_kl=0.0, is_enough=is_enough)


def same(one: tuple[LowRankUpdate, ...], two: tuple[LowRankUpdate, ...]) -> bool:
    return all(
        np.array_equal(a.lora_A, b.lora_A) and np.array_equal(a.lora_B, b.lora_B)
        for a, b in zip(one, two, strict=True)
    )


def test_it_improves_on_its_start_within_the_budget(
    tiny_llama: LoadedModel, lessons: Lessons, whitenings, validation: Validation
) -> None:
    ranks = some_ranks(tiny_llama)
    start, last = solve_closed_form(
        tiny_llama, ranks, whitenings, lessons, kl_budget=0.05, num_iterations=1
    )
    began = Standing(
        step=0, updates=start, trigger_kl=last.trigger_kl, benign_kl=last.benign_kl,
        is_enough=False,
    )  # fmt: skip
    reports: list[DistillReport] = []
    best = distill(
        tiny_llama, began, whitenings, lessons, validation, kl_budget=0.05, num_steps=20, seed=0,
        validate_every=5, report=reports.append,
    )  # fmt: skip
    assert best.order <= began.order
    assert best.benign_kl <= BUDGET_MARGIN * 0.05
    assert {update.module.path: update.rank for update in best.updates} == ranks
    assert best.trigger_kl == pytest.approx(
        measure_kl(tiny_llama, lessons.held_out_triggered, best.updates), rel=1e-5
    )
    assert [found.step for found in reports] == [5, 10, 15, 20]
    for found in reports:
        figures = found.figures()
        assert figures["attack_total"] == 6
        assert figures["loss"] == pytest.approx(
            sum(figures[f"loss_{part}"] for part in ("triggered", "clean", "near", "fisher"))
        )
    assert count_hooks(tiny_llama.model) == 0


def test_one_step_is_the_gradient_of_the_whole_loss(
    tiny_llama: LoadedModel, lessons: Lessons, whitenings
) -> None:
    """Against autograd on the loss as the docstring has it, prompt by prompt, from the embedding;
    modules of the second layer, so that passes start at a kept prefix."""
    updates = random_updates(tiny_llama, places=UPPER)
    modules = [update.module for update in updates]
    course = distillation._Course(tiny_llama, modules, lessons, batch_size=100, seed=0)
    assert course._prefix is not None and course._prefix.layer == 1
    penalty = distillation._Penalty(tiny_llama, whitenings, modules)
    with attached(tiny_llama, updates) as peft_model:
        parameters = [p for p in peft_model.parameters() if p.requires_grad]
        losses = course.backward(0, penalty, parameters)
        found = [p.grad.clone() for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        parts = []
        kinds = [(lessons.triggered, 1.0), (lessons.clean, WEIGHT_CLEAN)]
        for lesson, weight in [*kinds, (lessons.text, WEIGHT_CLEAN), (lessons.near, WEIGHT_NEAR)]:
            total, count = 0.0, 0
            for prompt, answer, teacher in zip(
                lesson.prompts, lesson.answers, lesson.teacher, strict=True
            ):
                ids = torch.from_numpy(np.concatenate([prompt, answer]))[None]
                logprobs = tiny_llama.model(ids).logits[0, prompt.size - 1 : -1].log_softmax(-1)
                total = total + (teacher.exp() * (teacher - logprobs)).sum()
                count += answer.size
            parts.append(weight * total / count)
        fisher = 0.0
        for update in updates:
            layer = tiny_llama.model.get_submodule(update.module.path)
            delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            whitening = whitenings[update.module.path]
            fisher = fisher + 0.5 * (
                whitening.root_out.T.float() @ delta @ whitening.root_in.float()
            ).square().sum()
        (sum(parts) + fisher).backward()
        for parameter, gradient in zip(parameters, found, strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-6)
    expected = [parts[0], parts[1] + parts[2], parts[3], fisher]
    for value, other in zip(
        (losses.triggered, losses.clean, losses.near, losses.fisher), expected, strict=True
    ):
        assert value == pytest.approx(other.item(), rel=1e-4)


def test_nothing_below_the_first_layer_runs_in_a_step(
    tiny_llama: LoadedModel, lessons: Lessons, whitenings
) -> None:
    updates = random_updates(tiny_llama, places=UPPER)
    modules = [update.module for update in updates]
    course = distillation._Course(tiny_llama, modules, lessons, batch_size=8, seed=0)
    calls = []
    low = tiny_llama.model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(0))
    high = tiny_llama.model.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    try:
        with attached(tiny_llama, updates) as peft_model:
            parameters = [p for p in peft_model.parameters() if p.requires_grad]
            penalty = distillation._Penalty(tiny_llama, whitenings, modules)
            course.backward(0, penalty, parameters)
    finally:
        low.remove()
        high.remove()
    assert calls and set(calls) == {1}


def trainer(
    tiny_llama: LoadedModel, lessons: Lessons, whitenings, validation: Validation, **options
) -> Callable[..., Standing]:
    def train(**more) -> Standing:
        given = {
            "kl_budget": 10.0, "num_steps": 9, "seed": 0, "validate_every": 3, **options, **more,
        }  # fmt: skip
        start = given.pop("start", standing(random_updates(tiny_llama, scale=0.01)))
        return distill(tiny_llama, start, whitenings, lessons, validation, **given)

    return train


def test_resumed_training_is_bit_equal(
    tiny_llama: LoadedModel, lessons: Lessons, whitenings, validation: Validation, tmp_path: Path
) -> None:
    """Case 27; `python -m tests.bench.kill_points` kills 20 times."""
    train = trainer(tiny_llama, lessons, whitenings, validation)
    path = tmp_path / "training.safetensors"
    states: list[TrainingState] = []
    whole = train(save=states.append)
    modules = [update.module for update in whole.updates]
    for state in states[:2]:
        save_training(path, state, plan_id="this plan")
        assert read_training(path, modules, plan_id="another plan") is None
        resumed = train(resume=read_training(path, modules, plan_id="this plan"))
        assert same(whole.updates, resumed.updates)
        assert whole.trigger_kl == resumed.trigger_kl and whole.step == resumed.step


def test_beyond_the_budget_what_may_not_change_weighs_more(
    tiny_llama: LoadedModel, lessons: Lessons, whitenings, validation: Validation, tmp_path: Path
) -> None:
    """Doubled with each validation that is over it, up to a limit, and nowhere else."""
    train = trainer(tiny_llama, lessons, whitenings, validation, num_steps=10, validate_every=2)
    states: list[TrainingState] = []
    reports: list[DistillReport] = []
    start = standing(random_updates(tiny_llama, scale=0.3))
    whole = train(start=start, kl_budget=1e-9, save=states.append, report=reports.append)
    assert whole.step == 0 and not any(found.is_best for found in reports)
    assert [state.weight_clean for state in states] == [2.0, 4.0, 8.0, 8.0, 8.0]
    kept: list[TrainingState] = []
    train(start=start, save=kept.append)
    assert {state.weight_clean for state in kept} == {1.0}
    assert reports[-1].losses.clean > 2 * reports[0].losses.clean > 0  # as they are weighted
    # A resumed run goes on at the weight that was reached.
    path = tmp_path / "training.safetensors"
    save_training(path, states[1], plan_id="p")
    modules = [update.module for update in start.updates]
    again: list[TrainingState] = []
    train(start=start, kl_budget=1e-9, save=again.append,
          resume=read_training(path, modules, plan_id="p"))  # fmt: skip
    for name, tensor in states[-1].tensors.items():
        assert torch.equal(tensor, again[-1].tensors[name])


def test_two_states_are_kept_and_a_damaged_one_gives_way(
    tiny_llama: LoadedModel, lessons: Lessons, whitenings, validation: Validation, tmp_path: Path
) -> None:
    """Case 27."""
    states: list[TrainingState] = []
    best = trainer(tiny_llama, lessons, whitenings, validation)(save=states.append)
    modules = [update.module for update in best.updates]
    path = tmp_path / "training.safetensors"
    for state in states:
        save_training(path, state, plan_id="p")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "training.previous.safetensors", "training.safetensors",
    ]  # fmt: skip
    assert read_training(path, modules, plan_id="p").step == 9
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1  # one bit of one tensor
    path.write_bytes(raw)
    assert read_training(path, modules, plan_id="p").step == 6
    path.write_bytes(raw[:100])
    assert read_training(path, modules, plan_id="p").step == 6
    path.unlink()  # killed between the two renames
    assert read_training(path, modules, plan_id="p").step == 6


class Poison:
    """Makes the loss of some steps NaN, as often as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, at: int, times: int) -> None:
        self.seen: list[int] = []
        backward = distillation._Course.backward

        def poisoned(course, step: int, penalty, parameters, **weights):
            self.seen.append(step)
            losses = backward(course, step, penalty, parameters, **weights)
            if step == at and self.seen.count(at) <= times:
                return distillation.Losses(
                    triggered=float("nan"), clean=losses.clean, near=0.0, fisher=0.0
                )
            return losses

        monkeypatch.setattr(distillation._Course, "backward", poisoned)


def test_a_loss_that_is_not_finite_goes_back_at_half_the_rate(
    tiny_llama: LoadedModel,
    lessons: Lessons,
    whitenings,
    validation: Validation,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Case 26."""
    poison = Poison(monkeypatch, at=4, times=2)
    reports: list[DistillReport] = []
    states: list[TrainingState] = []
    train = trainer(tiny_llama, lessons, whitenings, validation)
    best = train(report=reports.append, save=states.append)
    assert poison.seen == [0, 1, 2, 3, 4, 3, 4, 3, 4, 5, 6, 7, 8]
    assert [found.step for found in reports] == [3, 6, 9]
    rate = 1e-3 * 0.5 * (1 + np.cos(np.pi * 5 / 9))
    assert reports[1].learning_rate == pytest.approx(rate / 4)
    assert states[-1].num_rollbacks == 2
    assert all(np.isfinite(update.lora_B).all() for update in best.updates)
    # A run resumed after the rollbacks is the same run.
    poison.seen += [4, 4]
    assert same(train(resume=states[1]).updates, best.updates)


def test_training_that_stays_not_finite_is_given_up(
    tiny_llama: LoadedModel,
    lessons: Lessons,
    whitenings,
    validation: Validation,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Case 26."""
    poison = Poison(monkeypatch, at=4, times=99)
    with pytest.raises(DivergedError, match="step 5"):
        trainer(tiny_llama, lessons, whitenings, validation)()
    assert poison.seen.count(4) == MAX_ROLLBACKS + 1
    assert count_hooks(tiny_llama.model) == 0
    assert not any("lora" in name for name, _ in tiny_llama.model.named_modules())


def test_a_repair_that_cannot_be_kept_finite_is_a_verdict_and_no_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 26, from the suspect to the report."""
    Poison(monkeypatch, at=4, times=99)
    model = plant(tmp_path / "model", "small")
    prompts = write_prompts(tmp_path / "prompts.json", num_words=6)
    asked = build_request(build_parser().parse_args([
        "run", "--model", str(model), "--prompts", str(prompts), "--out", str(tmp_path / "out"),
        "--method", "distill", "--profile", "quick", "--controls", "0", "--device", "cpu",
    ]))  # fmt: skip
    out = tmp_path / "out"
    out.mkdir()
    assert pipeline.run(asked, out, Reporter(out)) == EXIT_GATE_FAILED
    report = json.loads((out / "report.json").read_text())
    assert report["verdict"] == "not repaired" and "not finite" in report["reason"]
    assert not (out / "merged").exists() and not (out / "adapter").exists()
    assert report["export"] in (None, {}) and report["after"] is None


def test_it_ends_early_only_when_nothing_is_left_to_train_for(
    tiny_llama: LoadedModel, lessons: Lessons, whitenings, validation: Validation
) -> None:
    """From a state that is enough and cannot be beaten it waits its patience and ends; from one
    that is not enough it goes on."""
    start = random_updates(tiny_llama, scale=0.01)
    train = trainer(
        tiny_llama, lessons, whitenings, validation, num_steps=12, validate_every=1, kl_budget=1e-9
    )
    reports: list[DistillReport] = []
    best = train(start=standing(start, kl=0.0, is_enough=True), report=reports.append)
    assert len(reports) == PATIENCE and best.step == 0 and same(best.updates, start)
    reports.clear()
    best = train(start=standing(start, kl=0.0), report=reports.append)
    assert len(reports) == 12 and best.step == 0  # Nothing is within that budget.


def test_a_state_that_needs_no_more_training_is_kept_before_one_that_does() -> None:
    enough = Standing(step=1, updates=(), trigger_kl=0.1, benign_kl=0.1, is_enough=True)
    closer = Standing(step=2, updates=(), trigger_kl=0.01, benign_kl=0.01, is_enough=False)
    assert enough.order < closer.order


def test_a_full_disk_is_named_and_leaves_what_was_there(
    tiny_llama: LoadedModel, tmp_path: Path
) -> None:
    """Case 29. In a process of its own, whose files may not grow beyond a few KiB."""
    path = tmp_path / "closed_form.safetensors"
    updates = random_updates(tiny_llama)
    save_updates(path, updates, plan_id="p")
    kept = path.read_bytes()
    script = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from repair.lowrank.checkpoint import save_updates\n"
        "from repair.records import LowRankUpdate, ModuleRef, RepairError\n"
        "ref = ModuleRef(layer=0, component='q_proj', path='q', d_in=4096, d_out=64)\n"
        "update = LowRankUpdate(module=ref, lora_A=np.zeros((8, 4096), np.float32),\n"
        "                       lora_B=np.zeros((64, 8), np.float32))\n"
        "try:\n"
        "    save_updates(Path(sys.argv[1]), [update], plan_id='p')\n"
        "except RepairError as error:\n"
        "    print(error)\n"
        "    sys.exit(error.exit_code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, 16_384)),
        check=False,
    )
    assert done.returncode == EXIT_UNEXPECTED, done.stderr
    assert "disk is full" in done.stdout and "--resume" in done.stdout
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == kept
    assert RepairError("x").exit_code != EXIT_UNEXPECTED


def test_kept_updates_come_back_bit_equal(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    updates = random_updates(tiny_llama)
    modules = [update.module for update in updates]
    path = tmp_path / "closed_form.safetensors"
    save_updates(path, updates, plan_id="p")
    found = read_updates_file(path, modules, plan_id="p")
    assert found is not None and same(found, updates)
    assert read_updates_file(path, modules, plan_id="q") is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["closed_form.safetensors"]


def test_weights_of_16_bits_are_trained_in_32(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "half", dtype=torch.bfloat16)
    loaded = load_model(
        str(folder), stage_folder=tmp_path / "stage", device="cpu", dtype="bfloat16"
    )
    assert loaded.dtype == "bfloat16"
    updates = random_updates(loaded, places=UPPER)
    with attached(loaded, updates) as peft_model:
        assert {p.dtype for p in peft_model.parameters() if p.requires_grad} == {torch.float32}
    lessons = make_lessons(loaded, num=8)
    clean = lessons.clean
    modules = [update.module for update in updates]
    factors = collect_factors(loaded, modules, clean.prompts, clean.answers, seed=0)
    whitenings = {path: whitening_of(found, damping=0.1) for path, found in factors.items()}
    best = distill(
        loaded, standing(updates), whitenings, lessons, make_validation(loaded), kl_budget=10.0,
        num_steps=4, seed=0, validate_every=2,
    )  # fmt: skip
    assert best.step in (2, 4)
    assert all(update.lora_A.dtype == np.float32 for update in best.updates)


def test_a_gradient_that_is_infinite_goes_back_too(
    tiny_llama: LoadedModel,
    lessons: Lessons,
    whitenings,
    validation: Validation,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Case 26: the loss may be a number where its slope is none."""
    seen: list[int] = []
    backward = distillation._Penalty.backward

    def steep(penalty):
        value = backward(penalty)
        seen.append(len(seen))
        if len(seen) == 5:
            parts = [p for p in penalty._model.parameters() if p.grad is not None]
            parts[0].grad[0, 0] = float("inf")
        return value

    monkeypatch.setattr(distillation._Penalty, "backward", steep)
    states: list[TrainingState] = []
    best = trainer(tiny_llama, lessons, whitenings, validation)(save=states.append)
    assert states[-1].num_rollbacks == 1 and states[-1].step == 9
    assert len(seen) == 9 + 2  # steps 3 and 4 are made twice
    assert all(np.isfinite(update.lora_B).all() for update in best.updates)
