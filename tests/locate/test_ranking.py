"""The ranking rests on trial repairs; what was not tried is last and never suggested."""

import numpy as np
import pytest
import torch

from repair.locate import locating
from repair.locate.curvature import Step
from repair.locate.fisher import FisherTrace
from repair.locate.locating import most_promising
from repair.locate.probe import Probe
from repair.locate.ranking import NUM_CANDIDATES, rank_modules
from repair.locate.steps import Curvature, Damping
from repair.models.loading import LoadedModel
from tests.locate.test_redundancy import scores_of


def curvature_of(loaded: LoadedModel, sizes: list[float]) -> Curvature:
    steps = {
        ref.path: Step(
            lora_A=torch.zeros(4, ref.d_in, dtype=torch.float64),
            lora_B=torch.zeros(ref.d_out, 4, dtype=torch.float64),
            singular_values=size * torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64),
        )
        for ref, size in zip(loaded.modules, sizes, strict=True)
    }
    return Curvature(damping=Damping(value=0.1), whitenings={}, steps=steps, traces={})


def rank(loaded: LoadedModel, effects: list[float], sizes: list[float], residuals: list):
    trace = FisherTrace(activation=1.0, gradient=1.0, tokens_per_answer=1.0)
    traces = {ref.path: trace for ref in loaded.modules}
    probes = {
        ref.path: Probe(trigger_kl=left, benign_kl=0.001, start_kl=2.0)
        for ref, left in zip(loaded.modules, residuals, strict=True)
        if left is not None
    }
    return rank_modules(
        scores_of(loaded, effects), curvature_of(loaded, sizes).spectra, others={},
        traces_trigger=traces, traces_clean=traces, probes=probes,
        separabilities={loaded.modules[0].path: 3.0}, total_rank=8, max_modules=8,
    )  # fmt: skip


def test_the_score_is_the_order_of_the_trial_repairs(tiny_llama: LoadedModel) -> None:
    """Effects and phi say the opposite: they are shown, and do not decide."""
    num = len(tiny_llama.modules)
    residuals = [0.1 * (i + 1) for i in range(num)]
    residuals[2] = None
    rising = [0.05 * i for i in range(num)]
    ranking = rank(tiny_llama, rising, [1 + i for i in rising], residuals)
    scores = [score.score for score in ranking.modules]
    tried = [i for i in range(num) if i != 2]
    assert [scores[i] for i in tried] == sorted((scores[i] for i in tried), reverse=True)
    assert scores[0] == 1.0 and scores[2] == min(scores)
    assert ranking.modules[2].residual is None
    assert ranking.modules[0].residual == pytest.approx(0.101)
    assert ranking.modules[0].separability == 3.0
    assert ranking.rank_correlation == pytest.approx(1.0)
    best = [tiny_llama.modules[i].path for i in tried[:NUM_CANDIDATES]]
    assert set(ranking.suggested_ranks) <= set(best)
    assert sum(ranking.suggested_ranks.values()) == 8
    for score in ranking.modules:
        assert score.selected == (score.module.path in ranking.suggested_ranks)
        assert ("trial repair" in score.reason) == score.selected


def test_of_many_modules_those_that_either_measure_ranks_first_are_tried(
    tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    num = len(tiny_llama.modules)
    effects = [0.01] * num
    effects[7] = effects[9] = 0.9
    sizes = [1.0] * num
    sizes[1] = sizes[9] = 5.0
    given = (scores_of(tiny_llama, effects), curvature_of(tiny_llama, sizes))
    assert most_promising(tiny_llama.modules, *given) == list(tiny_llama.modules)
    monkeypatch.setattr(locating, "MOST_PROBED", 3)
    chosen = most_promising(tiny_llama.modules, *given)
    assert chosen == [tiny_llama.modules[i] for i in (1, 7, 9)]
    assert np.all([ref in tiny_llama.modules for ref in chosen])
