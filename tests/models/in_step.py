"""What the steps find on the tiny model: in this process, or as one of several.

    python -m tests.models.in_step MODEL_FOLDER OUT_FOLDER

Writes `found-N.safetensors`, N being the process, and in it under "dealt" how many items of the
dealt loops were this process's, and of how many.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from repair.evidence.benign_cost import benign_cost
from repair.limits import SCORING_TOKENS
from repair.locate import fisher, patching, runs
from repair.locate.curvature import step_of, whitening_of
from repair.locate.lessons import measure_kl
from repair.locate.patching import patch_modules
from repair.locate.probe import probe_modules
from repair.lowrank.distillation import Standing, distill
from repair.models import answers, ranks
from repair.models.loading import LoadedModel, load_model
from tests.locate.material import make_cases, make_lessons, make_pairs, make_shams
from tests.lowrank.material import make_validation, random_updates

SMALL = 96  # tokens of a batch: so that there are several of everything


def find(loaded: LoadedModel) -> dict[str, np.ndarray]:
    """Return figures by name; what is in batches of `SMALL` in the steps is in such here."""
    lessons = make_lessons(loaded, num=24)
    pairs = make_pairs(12, position="middle")
    cases = make_cases(pairs, make_shams(pairs), payload=11, clean=12)
    given = answers.generate_answers(
        loaded, [pair.triggered for pair in pairs], num_new_tokens=6, batch_tokens=SMALL
    )
    patched = patch_modules(loaded, cases)
    benign = lessons.benign
    factors, traces = fisher.factors_and_traces(
        loaded, loaded.modules[:9], benign.prompts, benign.answers, traced=loaded.modules[9:],
        seed=0,
    )  # fmt: skip
    covariances = fisher.input_covariances(
        loaded, loaded.modules, benign.prompts, benign.answers
    )
    gradients, trigger_kl = fisher.trigger_gradients(loaded, loaded.modules, lessons.triggered)
    updates = random_updates(loaded)
    whitenings = {path: whitening_of(one, damping=0.1) for path, one in factors.items()}
    steps = {path: step_of(one, gradients[path], 2) for path, one in whitenings.items()}
    probes = probe_modules(
        loaded, loaded.modules[:9], steps, lessons.held_out_triggered, lessons.held_out_clean,
        num_prompts=8,
    )  # fmt: skip
    cost = benign_cost(
        loaded, None, loaded, lessons.clean.prompts, lessons.clean.answers
    )
    best = distill(
        loaded,
        Standing(step=0, updates=updates, trigger_kl=1e9, benign_kl=0.0, is_enough=False),
        whitenings, lessons, make_validation(loaded), kl_budget=1e9, num_steps=6, seed=0,
        validate_every=3,
    )  # fmt: skip
    found = {
        "answers": np.concatenate([answer.ids for answer in given]),
        "effect": patched.effect,
        "effect_kl": patched.effect_kl,
        "traces": np.array([[one.activation, one.gradient] for one in traces.values()]),
        "trigger_kl": np.array(trigger_kl),
        "price": np.array(
            fisher.price_updates(loaded, updates, benign.prompts, benign.answers, seed=3)
        ),
        "probes": np.array([[one.trigger_kl, one.benign_kl] for one in probes.values()]),
        "kl": np.array(measure_kl(loaded, benign, updates)),
        "cost": np.array([cost.perplexity, *cost.kl_by_prompt]),
        "best": np.array([best.step, best.trigger_kl, best.benign_kl]),
    }
    for path, one in factors.items():
        found[f"{path} activation"] = one.activation_covariance
        found[f"{path} gradient"] = one.gradient_covariance
    found |= {f"{path} input": one.numpy() for path, one in covariances.items()}
    found |= {f"{path} trigger": one.numpy() for path, one in gradients.items()}
    for update in best.updates:
        found[f"{update.module.path} repaired"] = update.lora_B @ update.lora_A
    return found


def main(model: str, out: Path) -> None:
    """Find everything and write it."""
    fisher.FISHER_TOKENS = answers.SCORING_TOKENS = runs.RUN_TOKENS = SMALL
    assert SMALL < SCORING_TOKENS
    patching.SMALLEST_MARGIN = 0.0  # a random model has no trigger
    torch.set_num_threads(1)
    dealt = np.zeros(2, dtype=np.int64)
    deal = ranks.deal

    def counted(sizes, work, *progress):
        def one(i: int):
            dealt[0] += 1
            return work(i)

        dealt[1] += len(sizes)
        return deal(sizes, one, *progress)

    ranks.deal = counted
    ranks.join(on_cpu=True)
    with tempfile.TemporaryDirectory() as stage:
        loaded = load_model(model, stage_folder=Path(stage) / "tiny", device="auto")
        found = find(loaded) | {"dealt": dealt}
    save_file(found, out / f"found-{ranks.index()}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
