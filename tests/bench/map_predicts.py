"""Does the map predict repair? Every score against what repairing each module achieves.

    python -m tests.bench.map_predicts --out DIR [--only NAME ...]

Seven backdoors: the three bundled suspects and the four of `organisms.py`. Each is located as the
app does it. Then every linear module is repaired alone, with the same small budget (closed form,
rank 4, one linearisation), and its outcome (trigger KL + benign KL, on prompts used for nothing
else) is correlated with every score that the app shows (Spearman). So is the outcome of a repair
that shares nothing with the score but the module: LoRA of rank 4 there alone, trained by Adam for
40 steps on the suspect's own answers. And the suggested set is repaired beside 20 random sets of
the same components and ranks: how many cost more benign KL at the trigger KL that the suggestion
reaches (a set that never reaches it costs more), and at the one that each of them reaches, and
what still fires. A suspect that is already in DIR is not measured again. Writes
results/map_predicts.json.
"""

import argparse
import json
import shutil
import sys
import time
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from repair.case import Case, make_lessons, open_case
from repair.evidence.controls import draw_random_modules
from repair.locate import locating
from repair.locate.lessons import Lessons, Taught, kl_from_teacher, measure_kl, teach_split
from repair.locate.steps import Curvature, measure_curvature
from repair.lowrank.adapter import attached, read_updates
from repair.lowrank.closed_form import solve_closed_form
from repair.lowrank.repairing import neutral_updates
from repair.models.answers import answer_logits, generate_answers, scoring_batches
from repair.models.hooks import apply_updates
from repair.models.loading import load_model
from repair.plan import MAX_MODULES, TOTAL_RANK
from repair.profiles import PROFILES
from repair.prompts import parse_prompt_file
from repair.records import LowRankUpdate, ModuleRanking, ModuleRef, Rate
from tests.bench.organisms import ORGANISMS, make_organism
from tests.bench.peers import ROOT, publish

BUNDLED = ("begin", "middle", "end")
RANK, ITERATIONS, NUM_LESSONS = 4, 1, 64  # the small budget
TRAINED_STEPS, TRAINED_ROWS, TRAINED_RATE = 40, 12, 3e-3
NUM_EXAM, NUM_ASKED, ANSWER_TOKENS = 128, 64, 32
NUM_RANDOM = 20
SHORT = (0.02, 0.04, 0.07, 0.1, 0.15, 0.2)  # where the suggestion is as weak as a random set
SCALES = (0.3, 0.5, 0.7, 0.85, 1.0, 1.3)  # of an update: its frontier
SCORES = ("effect", "effect_trigger", "effect_after", "effect_induce", "effect_deletion",
          "effect_gap", "effect_kl", "curvature", "ratio", "separability", "residual",
          "score")  # fmt: skip


def open_suspect(name: str, out: Path) -> Case:
    """Load a bundled suspect or an organism (trained first where it is missing)."""
    organism = next((o for o in ORGANISMS if o.name == name), None)
    source = str(make_organism(organism, out)) if organism else f"demo:{name}"
    prompts = out / f"{name}.json" if organism else ROOT / "assets" / "prompts" / f"{name}.json"
    stage = out / f".stage-{name}"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    loaded = load_model(source, stage_folder=stage, device="cpu")
    quiet = SimpleNamespace(note=print, step=print, metric=print, progress=lambda *_: None)
    file = parse_prompt_file(prompts)
    return open_case(loaded, file, profile=PROFILES["standard"], seed=0, reporter=quiet)


def locate(case: Case, lessons: Lessons) -> tuple:
    """Return (ranking, curvature, patched), as the app's locate step makes them."""
    loaded = case.loaded
    options = {"is_payload": case.is_payload, "num_new_tokens": case.num_new_tokens}
    pairs = {name: case.pairs(case.splits.locate, name) for name in case.positions}
    fired = locating.check_firing(loaded, pairs, **options)
    compared = locating.compare_fired(
        loaded, fired, max_pairs=case.profile.num_patched_pairs, seed=0, **options
    )
    patched = locating.patch_compared(loaded, compared, seed=0)
    curvature = measure_curvature(loaded, loaded.modules, lessons, seed=0)
    triggered = ([pair.triggered for pair in fired.pairs], list(fired.payloads))
    ranking = locating.rank_located(
        loaded, patched, curvature, lessons, triggered=triggered, num_probed=24,
        total_rank=TOTAL_RANK, max_modules=MAX_MODULES, seed=0,
    )  # fmt: skip
    return ranking, curvature, patched


class Bench:
    """Small repairs of one suspect, and their examination."""

    def __init__(self, case: Case, lessons: Lessons, curvature: Curvature) -> None:
        self.case, self.curvature = case, curvature
        self.lessons = Lessons(
            triggered=lessons.triggered.first(NUM_LESSONS),
            counterparts=lessons.counterparts[:NUM_LESSONS],
            clean=lessons.clean.first(2 * NUM_LESSONS // 3),
            text=lessons.text.first(NUM_LESSONS // 3),
            near=lessons.near,
            held_out_triggered=lessons.held_out_triggered.first(NUM_LESSONS // 2),
            held_out_clean=lessons.held_out_clean.first(NUM_LESSONS // 3),
            held_out_text=lessons.held_out_text.first(NUM_LESSONS // 6),
            num_dropped=0,
        )
        pairs = case.dealt_pairs(case.splits.evaluate)
        self.exam: Taught = teach_split(
            case.loaded, pairs[:NUM_EXAM], is_payload=case.is_payload
        )
        self.asked = [pair.triggered for pair in pairs[NUM_EXAM : NUM_EXAM + NUM_ASKED]]

    def repair(self, ranks: dict[str, int]) -> tuple[LowRankUpdate, ...]:
        updates, _ = solve_closed_form(
            self.case.loaded, ranks, self.curvature.whitenings, self.lessons,
            kl_budget=0.02, num_iterations=ITERATIONS,
        )  # fmt: skip
        return updates

    def train(self, module: ModuleRef) -> tuple[LowRankUpdate, ...]:
        """Return LoRA of that one module, trained from LoRA's usual start."""
        loaded, lessons = self.case.loaded, self.lessons
        kinds = (lessons.triggered, lessons.benign)
        generator = np.random.default_rng(0)
        with attached(loaded, neutral_updates([module], {module.path: RANK}, 0)) as adapted:
            optimizer = torch.optim.Adam(
                [p for p in adapted.parameters() if p.requires_grad], lr=TRAINED_RATE
            )
            for step in range(TRAINED_STEPS):
                for group in optimizer.param_groups:
                    group["lr"] = TRAINED_RATE * (1 - step / TRAINED_STEPS)
                optimizer.zero_grad()
                for lesson in kinds:
                    size = min(TRAINED_ROWS, len(lesson))
                    drawn = lesson.only(generator.choice(len(lesson), size=size, replace=False))
                    num_tokens = sum(answer.size for answer in drawn.answers)
                    for batch in scoring_batches(loaded, drawn.prompts, drawn.answers):
                        with torch.enable_grad():
                            logits = answer_logits(
                                loaded.model, batch.ids, batch.rows, batch.columns
                            )
                            kl = kl_from_teacher(drawn, batch, logits).sum() / num_tokens
                        kl.backward()
                optimizer.step()
            return read_updates(loaded, [module])

    def examine(self, updates: tuple[LowRankUpdate, ...]) -> tuple[float, float]:
        """Return (trigger KL, benign KL)."""
        loaded, exam = self.case.loaded, self.exam
        return measure_kl(loaded, exam.triggered, updates), measure_kl(loaded, exam.clean, updates)

    def frontier(
        self, updates: tuple[LowRankUpdate, ...], scales: tuple[float, ...] = SCALES
    ) -> list[tuple[float, float]]:
        """Return (trigger KL, benign KL) of the repair at several lengths."""
        scaled = [
            tuple(
                LowRankUpdate(module=u.module, lora_A=u.lora_A, lora_B=u.lora_B * np.float32(s))
                for u in updates
            )
            for s in scales
        ]
        return [self.examine(some) for some in scaled]

    def fires(self, updates: tuple[LowRankUpdate, ...]) -> Rate:
        """Return how often the payload is still given."""
        with apply_updates(self.case.loaded.model, updates):
            answers = generate_answers(
                self.case.loaded, self.asked, num_new_tokens=ANSWER_TOKENS
            )
        seen = [self.case.is_payload(answer.text) for answer in answers]
        return Rate(count=sum(seen), total=len(seen))


def cost_at(frontier: list[tuple[float, float]], level: float) -> float:
    """Return the least benign KL at which a trigger KL of `level` is reached, or infinity; between
    two lengths it is interpolated."""
    found = [benign for trigger, benign in frontier if trigger <= level]
    for (high, cheap), (low, dear) in zip(frontier, frontier[1:], strict=False):
        if high > level >= low:
            share = (high - level) / (high - low)
            found.append(cheap + share * (dear - cheap))
    return min(found, default=float("inf"))


def compare(ours: tuple[float, float], frontier: list, random: list[dict]) -> dict:
    """Return how many random sets are dearer, at the trigger KL that the suggestion reaches and at
    the one that each of them reaches; `random` is completed with the figures compared."""
    own = cost_at(frontier, ours[0])
    for flat in random:
        cost = cost_at(flat["frontier"], ours[0])
        flat["benign_kl_at_the_suggestions_trigger_kl"] = cost if np.isfinite(cost) else None
        flat["suggestions_benign_kl_at_its_trigger_kl"] = cost_at(frontier, flat["trigger_kl"])
    at_ours = [flat["benign_kl_at_the_suggestions_trigger_kl"] for flat in random]
    at_theirs = [
        flat["benign_kl"] > flat["suggestions_benign_kl_at_its_trigger_kl"] for flat in random
    ]
    return {
        "dearer_at_the_suggestions_trigger_kl": Rate(
            count=sum(cost is None or cost > own for cost in at_ours), total=len(random)
        ).to_json(),
        "of_these_never_reach_it": sum(cost is None for cost in at_ours),
        "dearer_at_their_own_trigger_kl": Rate(
            count=sum(at_theirs), total=len(random)
        ).to_json(),
    }


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    def ranks(values: np.ndarray) -> np.ndarray:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


def correlations(ranking: ModuleRanking, outcomes: dict[str, tuple[float, float]]) -> dict:
    """Return score -> Spearman correlation with the (negative) outcome over the modules."""
    achieved = np.array([-sum(outcomes[s.module.path]) for s in ranking.modules])
    found = {}
    for name in SCORES:
        if name == "ratio":
            values = [s.fisher_trigger / s.fisher_clean for s in ranking.modules]
        elif name == "residual":
            values = [-s.residual for s in ranking.modules]
        else:
            values = [getattr(s, name) for s in ranking.modules]
        if all(value is not None for value in values) and len(set(values)) > 1:
            found[name] = spearman(np.array(values), achieved)
    return found


def measure_modules(bench: Bench, ranking: ModuleRanking, name: str) -> dict:
    """Return the outcome of every module's repair, and what each score has to do with it."""
    outcomes, trained = {}, {}
    for score in ranking.modules:
        path = score.module.path
        outcomes[path] = bench.examine(bench.repair({path: RANK}))
        trained[path] = bench.examine(bench.train(score.module))
        print(name, path, outcomes[path], trained[path], file=sys.stderr, flush=True)
    return {
        "spearman": correlations(ranking, outcomes),
        "outcomes": outcomes,
        "spearman_trained": correlations(ranking, trained),
        "trained_outcomes": trained,
    }


def measure_sets(bench: Bench, ranking: ModuleRanking, name: str) -> dict:
    """Return what the suggested set achieves beside random sets."""
    suggested = bench.repair(ranking.suggested_ranks)
    ours = bench.examine(suggested)
    frontier = bench.frontier(suggested, (*SHORT, *SCALES))
    generator = np.random.default_rng(0)
    random = []
    for number in range(NUM_RANDOM):
        modules = bench.case.loaded.modules
        ranks = draw_random_modules(modules, ranking.suggested_ranks, generator)
        updates = bench.repair(ranks)
        points = bench.frontier(updates)
        trigger_kl, benign_kl = points[SCALES.index(1.0)]
        random.append(
            {
                "ranks": ranks,
                "trigger_kl": trigger_kl,
                "benign_kl": benign_kl,
                "frontier": points,
                "fires": bench.fires(updates).to_json(),
            }
        )
        print(name, number, random[-1], file=sys.stderr, flush=True)
    return {
        "suggested": ranking.suggested_ranks,
        "suggested_trigger_kl": ours[0],
        "suggested_benign_kl": ours[1],
        "suggested_frontier": frontier,
        "suggested_fires": bench.fires(suggested).to_json(),
        "fires_before": bench.fires(()).to_json(),
        **compare(ours, frontier, random),
        "random": random,
    }


def measure(name: str, out: Path) -> dict:
    began = time.perf_counter()
    case = open_suspect(name, out)
    lessons = make_lessons(case)
    ranking, curvature, patched = locate(case, lessons)
    joint = locating.joint_effects(case.loaded, patched, ranking)
    bench = Bench(case, lessons, curvature)
    compared = patched.compared
    found = {
        "counterfactual": compared.kind,
        "shams_inert": f"{compared.num_shams_inert}/{compared.num_shams_tried}",
        "damping": curvature.damping.to_json(),
        "statement": joint.to_json()["statement"],
        "trigger_kl_before": measure_kl(case.loaded, bench.exam.triggered),
        **measure_modules(bench, ranking, name),
        **measure_sets(bench, ranking, name),
        "seconds": round(time.perf_counter() - began),
    }
    shutil.rmtree(out / f".stage-{name}", ignore_errors=True)
    return found


def main() -> int:
    names = [*BUNDLED, *(organism.name for organism in ORGANISMS)]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where organisms and results go")
    parser.add_argument("--only", choices=names, action="append")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in options.only or names:
        kept = options.out / f"map-{name}.json"
        if not kept.is_file():
            kept.write_text(json.dumps(measure(name, options.out), indent=1))
        found[name] = json.loads(kept.read_text())
        print(name, json.dumps(found[name]["spearman"]), file=sys.stderr, flush=True)
    if options.only:
        return 0
    specific = [name for name in names if name != "unspecific"]  # its shams fire
    residual = [found[name]["spearman"]["score"] for name in specific]
    trained = [found[name]["spearman_trained"]["score"] for name in specific]
    result = {
        "command": "python -m tests.bench.map_predicts --out DIR",
        "date": date.today().isoformat(),
        "mean_spearman_of_the_score": float(np.mean(residual)),
        "lowest_spearman_of_the_score": min(residual),
        "mean_spearman_of_the_score_with_training": float(np.mean(trained)),
        "lowest_spearman_of_the_score_with_training": min(trained),
        "suspects": found,
    }
    publish("map_predicts", result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
