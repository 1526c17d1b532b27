"""The other closed form (method C2): regression onto what the modules put out without the trigger.

For one module, K [d_in, n] holds its inputs in the triggered runs at positions behind the trigger,
and T [d_out, n] what its outputs lack there: the suspect's own output on the same prompt without
the trigger, at the aligned position, minus the present one.

    min over rank <= r of  1/n ||G^{1/2} (dW K - T)||^2  +  mu ||G^{1/2} dW A^{1/2}||^2

has, with H = K K^T / n + mu A and W_f = T K^T / n H^{-1}, the exact solution
dW = G^{-1/2} U_r S_r V_r^T H^{-1/2}, where U S V^T decomposes G^{1/2} W_f H^{1/2} (completing the
square leaves ||G^{1/2} (dW - W_f) H^{1/2}||^2; Eckart-Young).

Unlike the whitened step it is not first order, so it does not overshoot; unlike it, it knows only
what the modules themselves should put out, not what the answer depends on, and nothing of the
trigger's own positions, which have no counterpart. Modules are solved from early to late, K and T
taken anew after each; mu is searched on held-out figures within the budget.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from repair.locate.curvature import Whitening
from repair.locate.lessons import Lesson, Lessons
from repair.lowrank.closed_form import BUDGET_MARGIN, StepReport, predict_cost
from repair.lowrank.validation import hold_out
from repair.models.answers import scoring_batches
from repair.models.hooks import apply_updates, record_inputs, record_outputs
from repair.models.loading import LoadedModel
from repair.records import LowRankUpdate, ModuleRef

STRENGTHS = (10.0, 1.0, 0.1, 0.01, 0.001)  # mu, in units of tr(K K^T / n) / tr(A)


def solve_regression(
    loaded: LoadedModel,
    ranks: Mapping[str, int],
    whitenings: Mapping[str, Whitening],
    lessons: Lessons,
    *,
    kl_budget: float,
) -> tuple[tuple[LowRankUpdate, ...], StepReport]:
    """Return the best updates over `STRENGTHS` and their held-out figures; none when no strength
    lowers trigger KL + benign KL within the budget."""
    modules = [ref for ref in loaded.modules if ref.path in ranks]
    held_out = hold_out(loaded, lessons, min(ref.layer for ref in modules))
    places = [
        aligned(np.concatenate([clean, answer]), np.concatenate([prompt, answer]))
        for clean, prompt, answer in zip(
            lessons.counterparts, lessons.triggered.prompts, lessons.triggered.answers, strict=True
        )
    ]
    wanted = outputs_without(loaded, modules, lessons, [clean for clean, _ in places])
    best: tuple[LowRankUpdate, ...] = ()
    last = StepReport(
        iteration=0, trigger_kl=held_out.trigger_kl(loaded), benign_kl=0.0, predicted_kl=0.0
    )
    for turn, strength in enumerate(STRENGTHS, start=1):
        updates: tuple[LowRankUpdate, ...] = ()
        for ref in modules:
            inner, cross = products(
                loaded, ref, lessons.triggered, [place for _, place in places], wanted[ref.path],
                updates,
            )  # fmt: skip
            found = regress(whitenings[ref.path], inner, cross, strength, ranks[ref.path])
            updates += (
                LowRankUpdate(
                    module=ref, lora_A=found[0].float().numpy(), lora_B=found[1].float().numpy()
                ),
            )
        benign_kl = held_out.benign_kl(loaded, updates)
        if not benign_kl <= BUDGET_MARGIN * kl_budget:
            break  # A weaker mu changes more.
        trigger_kl = held_out.trigger_kl(loaded, updates)
        if trigger_kl + benign_kl < last.trigger_kl + last.benign_kl:
            best = updates
            last = StepReport(
                iteration=turn,
                trigger_kl=trigger_kl,
                benign_kl=benign_kl,
                predicted_kl=predict_cost(updates, whitenings),
            )
    return best, last


def aligned(clean: np.ndarray, triggered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the longest common end of two id sequences, in each of them.

    What stands before a trigger has the same activations in both and needs no change.
    """
    size = min(clean.size, triggered.size)
    same = clean[::-1][:size] == triggered[::-1][:size]
    length = size if same.all() else int(np.argmin(same))
    steps = np.arange(-length, 0)
    return steps + clean.size, steps + triggered.size


@torch.no_grad()
def outputs_without(
    loaded: LoadedModel,
    modules: Sequence[ModuleRef],
    lessons: Lessons,
    places: Sequence[np.ndarray],
) -> dict[str, list[Tensor]]:
    """Return path -> the suspect's outputs [position, d_out] at `places` of each counterpart."""
    found: dict[str, list[Tensor]] = {ref.path: [None] * len(places) for ref in modules}
    for batch in scoring_batches(loaded, lessons.counterparts, lessons.triggered.answers):
        with record_outputs(loaded.model, modules) as outputs:
            loaded.model.base_model(input_ids=batch.ids, use_cache=False)
        for ref in modules:
            rows = outputs[ref.path].reshape(*batch.ids.shape, ref.d_out)
            for row, index in zip(rows, batch.members, strict=True):
                found[ref.path][index] = row[torch.from_numpy(places[index])]
    return found


@torch.no_grad()
def products(
    loaded: LoadedModel,
    ref: ModuleRef,
    lesson: Lesson,
    places: Sequence[np.ndarray],
    wanted: Sequence[Tensor],
    updates: Sequence[LowRankUpdate],
) -> tuple[Tensor, Tensor]:
    """Return (K K^T / n [d_in, d_in], T K^T / n [d_out, d_in]) of one module, float64."""
    inner = torch.zeros(ref.d_in, ref.d_in, dtype=torch.float64)
    cross = torch.zeros(ref.d_out, ref.d_in, dtype=torch.float64)
    count = 0
    with apply_updates(loaded.model, updates):
        for batch in scoring_batches(loaded, lesson.prompts, lesson.answers):
            with (
                record_inputs(loaded.model, [ref]) as inputs,
                record_outputs(loaded.model, [ref]) as outputs,
            ):
                loaded.model.base_model(input_ids=batch.ids, use_cache=False)
            x = inputs[ref.path].reshape(*batch.ids.shape, ref.d_in)
            y = outputs[ref.path].reshape(*batch.ids.shape, ref.d_out)
            chosen = [torch.from_numpy(places[index]) for index in batch.members]
            k = torch.cat([x[row, at] for row, at in enumerate(chosen)])
            t = torch.cat([wanted[index] for index in batch.members])
            t = t - torch.cat([y[row, at] for row, at in enumerate(chosen)])
            inner += (k.T @ k).double().cpu()
            cross += (t.T @ k).double().cpu()
            count += k.shape[0]
    return inner / max(1, count), cross / max(1, count)


def regress(
    whitening: Whitening, inner: Tensor, cross: Tensor, strength: float, rank: int
) -> tuple[Tensor, Tensor]:
    """Return (lora_A [rank, d_in], lora_B [d_out, rank]) of the regression, float64.

    `inner` is K K^T / n, `cross` T K^T / n; mu is `strength` times tr(inner) / tr(A).
    """
    metric = whitening.root_in @ whitening.root_in.T
    mu = strength * inner.trace() / metric.trace()
    values, vectors = torch.linalg.eigh(inner + mu * metric)
    root = values.clamp(min=torch.finfo(values.dtype).tiny).sqrt()
    # G^{1/2} W_f H^{1/2} = G^{1/2} T K^T / n H^{-1/2}
    inverse_root = (vectors / root) @ vectors.T
    left = whitening.root_out.T @ cross @ inverse_root
    u, s, vh = torch.linalg.svd(left, full_matrices=False)
    share = s[:rank].sqrt()
    return (
        (share[:, None] * vh[:rank]) @ inverse_root,
        torch.linalg.solve_triangular(
            whitening.root_out.T, u[:, :rank] * share, upper=True
        ),
    )
