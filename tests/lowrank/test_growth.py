"""What more would buy: which choices are tried, what is measured, and that nothing is applied."""

import numpy as np
import pytest
import torch

from repair.locate.lessons import measure_kl
from repair.locate.steps import measure_curvature
from repair.lowrank.closed_form import solve_closed_form
from repair.lowrank.growth import measure_growth
from repair.models.hooks import count_hooks
from repair.models.loading import LoadedModel
from repair.plan import growth_choices
from repair.records import RepairPlan
from tests.locate.material import make_lessons
from tests.locate.test_ranking import curvature_of, rank
from tests.lowrank.material import make_validation


def choices_for(loaded: LoadedModel, *, with_curves: bool) -> tuple[RepairPlan, list]:
    """The map's order is that of the modules; the last ones are chosen."""
    num = len(loaded.modules)
    rising = [0.05 * i for i in range(num)]
    ranking = rank(loaded, rising, [1.0] * num, [0.1 * (i + 1) for i in range(num)])
    chosen = tuple(ref.path for ref in loaded.modules[-2:])
    plan = RepairPlan(
        modules=chosen, ranks=dict.fromkeys(chosen, 3), method="auto", kl_budget=0.05, seed=0
    )
    asked = []

    def curvature(paths: list[str]):
        asked.extend(paths)
        return curvature_of(loaded, [1.0] * num)

    found = growth_choices(plan, ranking, curvature, loaded.modules, with_curves=with_curves)
    assert set(asked) == {path for _, ranks in found for path in ranks}
    return plan, found


def test_the_chosen_modules_grow_by_the_best_others(tiny_llama: LoadedModel) -> None:
    plan, found = choices_for(tiny_llama, with_curves=False)
    best = [ref.path for ref in tiny_llama.modules]
    assert [kind for kind, _ in found] == ["next", "next", "next"]
    for (_, ranks), count in zip(found, (1, 2, 4), strict=True):
        assert set(ranks) == {*plan.modules, *best[:count]}
        assert list(ranks) == sorted(ranks, key=best.index)
        assert sum(ranks.values()) == 6 + 3 * count


def test_curves_go_over_modules_and_over_rank(tiny_llama: LoadedModel) -> None:
    plan, found = choices_for(tiny_llama, with_curves=True)
    modules = [ranks for kind, ranks in found if kind == "modules"]
    assert [len(ranks) for ranks in modules] == [1, 2, 4, 8]
    ranks = [ranks for kind, ranks in found if kind == "rank"]
    assert all(set(one) == set(plan.modules) for one in ranks)
    totals = [sum(one.values()) for one in ranks]
    assert totals == sorted(set(totals)) and {2, 6} <= set(totals)
    assert totals[-1] == 8  # Two modules of four singular values each: there is no more.


def test_a_point_is_the_closed_form_and_changes_nothing(tiny_llama: LoadedModel) -> None:
    lessons = make_lessons(tiny_llama, num=16)
    curvature = measure_curvature(tiny_llama, tiny_llama.modules[:4], lessons, seed=0)
    ranks = {tiny_llama.modules[1].path: 2, tiny_llama.modules[3].path: 2}
    ids = torch.tensor([[1, 60, 61, 62]])
    with torch.no_grad():
        before = tiny_llama.model(ids).logits
    (point,) = measure_growth(
        tiny_llama, [("next", ranks)], lambda paths: curvature.whitenings, lessons,
        make_validation(tiny_llama), kl_budget=0.5,
    )  # fmt: skip
    updates, last = solve_closed_form(
        tiny_llama, ranks, curvature.whitenings, lessons, kl_budget=0.5
    )
    assert point.trigger_kl == pytest.approx(last.trigger_kl)
    kinds = lessons.held_out_clean, lessons.held_out_text
    assert point.benign_kl == pytest.approx(
        max(measure_kl(tiny_llama, lesson, updates) for lesson in kinds), rel=1e-4
    )
    flat = point.to_json()
    assert flat["num_modules"] == 2 and flat["total_rank"] == 4
    assert flat["attack_success"]["total"] == 6 and np.isfinite(flat["trigger_kl"])
    with torch.no_grad():
        assert torch.equal(tiny_llama.model(ids).logits, before)
    assert count_hooks(tiny_llama.model) == 0
