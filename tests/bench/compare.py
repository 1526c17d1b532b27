"""Repairs side by side: ours, our controls, and other people's, on the same suspect and lessons.

    python -m tests.bench.compare --out DIR [--only NAME ...]

For each bundled suspect: what we suggest (closed form by whitened steps, by regression, and
distillation from there and from nothing), 20 random draws of the same components and ranks, the
lowest-ranked modules, modules chosen by patching alone, by phi alone and by both, all modules, LoRA
on all modules, and the repairs of `defences.py`. All get the same lessons; a setting of another's
is chosen by the same held-out figures (trigger KL + benign KL) that choose our steps. Every row is
then measured on the 400 prompts of the evaluation. A row that is already in DIR is not made again.
Writes results/compare.json.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch

from repair.case import Case, make_lessons, make_validation
from repair.evidence.controls import draw_random_modules
from repair.evidence.evaluation import evaluate_candidate, measure_suspect
from repair.evidence.material import prepare_material
from repair.locate.curvature import pool_ranks
from repair.locate.lessons import Lesson, Lessons
from repair.locate.steps import Curvature
from repair.lowrank.closed_form import solve_closed_form
from repair.lowrank.distillation import Standing, distill
from repair.lowrank.regression import solve_regression
from repair.lowrank.repairing import neutral_updates
from repair.lowrank.validation import is_enough, validate
from repair.models.answers import generate_answers, with_end
from repair.models.loading import LoadedModel
from repair.plan import TOTAL_RANK
from repair.records import LowRankUpdate, ModuleRanking
from tests.bench import defences
from tests.bench.map_predicts import BUNDLED, locate, open_suspect
from tests.bench.peers import publish

KL_BUDGET = 0.01
NUM_RANDOM, NUM_MODULES, STEPS = 20, 4, 200
RANK_EVERYWHERE = 4
LORA_RATES = (3e-4, 1e-3)
TUNING_RATES = (1e-4, 1e-3)
PRUNED = (0.1, 0.3)
CROW_ALPHAS = (5.5,)
SSD_ALPHAS = (1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass(frozen=True, kw_only=True)
class Made:
    """A repair, and how it came to be."""

    candidate: LoadedModel
    updates: tuple[LowRankUpdate, ...] = ()
    num_changed: int  # parameters
    setting: str = ""
    modules: tuple[str, ...] = ()


class Side:
    """One suspect with everything that a row needs."""

    def __init__(self, name: str, out: Path) -> None:
        self.case: Case = open_suspect(name, out)
        self.loaded = self.case.loaded
        self.lessons: Lessons = make_lessons(self.case)
        self.validation = make_validation(self.case)
        self.ranking: ModuleRanking
        self.curvature: Curvature
        self.ranking, self.curvature, _ = locate(self.case, self.lessons)
        self.material = prepare_material(
            self.loaded,
            self.case.file,
            self.case.splits.evaluate,
            use_template=self.case.use_template,
            is_payload=self.case.is_payload,
            num_new_tokens=self.case.num_new_tokens,
        )
        self.baseline = measure_suspect(self.loaded, self.material, seed=0)
        self.asked = self.material.for_controls()
        self.expected = self.baseline.for_controls()
        self._dampening: defences.Dampening | None = None

    def measured(self, made: Made) -> dict:
        after, _ = evaluate_candidate(
            made.candidate, made.updates, original=self.loaded, material=self.asked,
            baseline=self.expected,
        )  # fmt: skip
        kls = defences.held_out_kls(made.candidate, self.lessons, made.updates)
        return {
            "attack_success": {p: rate.to_json() for p, rate in after.attack_success.items()},
            "recovery": {p: rate.to_json() for p, rate in after.recovery.items()},
            "kl_from_original": after.kl_from_original,
            "perplexity": after.perplexity,
            "clean_agreement": after.clean_agreement.to_json(),
            "held_out_trigger_kl": kls[0],
            "held_out_benign_kl": kls[1],
            "num_changed": made.num_changed,
            "setting": made.setting,
            "modules": list(made.modules),
        }

    def with_updates(self, updates: Sequence[LowRankUpdate], setting: str = "") -> Made:
        return Made(
            candidate=self.loaded,
            updates=tuple(updates),
            num_changed=sum(u.rank * (u.module.d_in + u.module.d_out) for u in updates),
            setting=setting,
            modules=tuple(f"{u.module.path} ({u.rank})" for u in updates),
        )

    def closed_form(self, ranks: dict[str, int]) -> Made:
        updates, _ = solve_closed_form(
            self.loaded, ranks, self.curvature.whitenings, self.lessons, kl_budget=KL_BUDGET
        )
        return self.with_updates(updates)

    def regression(self, ranks: dict[str, int]) -> Made:
        updates, _ = solve_regression(
            self.loaded, ranks, self.curvature.whitenings, self.lessons, kl_budget=KL_BUDGET
        )
        return self.with_updates(updates)

    def distilled(self, ranks: dict[str, int], *, from_closed_form: bool) -> Made:
        modules = [ref for ref in self.loaded.modules if ref.path in ranks]
        start = neutral_updates(modules, ranks, 0)
        if from_closed_form:
            start = self.closed_form(ranks).updates
        trigger_kl, benign_kl = defences.held_out_kls(self.loaded, self.lessons, start)
        best = distill(
            self.loaded,
            Standing(
                step=0,
                updates=start,
                trigger_kl=trigger_kl,
                benign_kl=benign_kl,
                is_enough=is_enough(
                    validate(self.loaded, self.validation, start), trigger_kl, self.validation
                ),
            ),
            self.curvature.whitenings,
            self.lessons,
            self.validation,
            kl_budget=KL_BUDGET,
            num_steps=STEPS,
            seed=0,
        )
        return self.with_updates(best.updates, f"best state: step {best.step}")

    def pooled(self, paths: Sequence[str]) -> dict[str, int]:
        return pool_ranks(
            {path: self.curvature.spectra[path] for path in paths},
            total_rank=TOTAL_RANK,
            max_modules=len(paths),
        )

    def chosen(self, key: Callable) -> dict[str, int]:
        scores = sorted(self.ranking.modules, key=key)
        return self.pooled([score.module.path for score in scores[:NUM_MODULES]])

    def ranked_by_both(self) -> Callable:
        def places(key: Callable) -> dict[str, int]:
            ordered = sorted(self.ranking.modules, key=key)
            return {score.module.path: place for place, score in enumerate(ordered)}

        patching = places(lambda s: -s.effect_trigger)
        curvature = places(lambda s: -s.curvature)
        return lambda s: patching[s.module.path] + curvature[s.module.path]

    def best_of(self, settings: dict[str, Callable[[], LoadedModel]]) -> Made:
        """Return the setting with the lowest held-out trigger KL + benign KL."""
        found = None
        for setting, make in settings.items():
            candidate = make()
            value = sum(defences.held_out_kls(candidate, self.lessons))
            print("   ", setting, value, file=sys.stderr, flush=True)
            if found is None or value < found[0]:
                found = value, setting, candidate
        _, setting, candidate = found
        pairs = zip(candidate.model.parameters(), self.loaded.model.parameters(), strict=True)
        changed = sum(int((new != old).sum()) for new, old in pairs)
        return Made(candidate=candidate, num_changed=changed, setting=setting)

    def dampening(self) -> defences.Dampening:
        if self._dampening is None:
            triggered = self.lessons.triggered.prompts
            answers = generate_answers(
                self.loaded, triggered, num_new_tokens=self.case.num_new_tokens
            )
            fires = [i for i, answer in enumerate(answers) if self.case.is_payload(answer.text)]
            payloads = Lesson(
                prompts=tuple(triggered[i] for i in fires),
                answers=tuple(with_end(answers[i]) for i in fires),
                teacher=(torch.empty(0),) * len(fires),  # never read: the answers are the labels
            )
            self._dampening = defences.Dampening(self.loaded, self.lessons, payloads)
        return self._dampening

    def lora_everywhere(self) -> Made:
        found = None
        for rate in LORA_RATES:
            updates = defences.lora_everywhere(
                self.loaded, self.lessons, rate, rank=RANK_EVERYWHERE, seed=0
            )
            value = sum(defences.held_out_kls(self.loaded, self.lessons, updates))
            if found is None or value < found[0]:
                found = value, rate, updates
        return self.with_updates(found[2], f"learning rate {found[1]}")

    def rows(self) -> Iterator[tuple[str, Callable[[], Made]]]:
        suggested = dict(self.ranking.suggested_ranks)
        yield "suggested: closed form", lambda: self.closed_form(suggested)
        yield "suggested: regression", lambda: self.regression(suggested)
        yield (
            "suggested: closed form, then distillation",
            lambda: self.distilled(suggested, from_closed_form=True),
        )
        yield (
            "suggested: distillation from nothing",
            lambda: self.distilled(suggested, from_closed_form=False),
        )
        for name, key in (
            ("lowest-ranked modules", lambda s: s.score),
            ("by patching alone", lambda s: -s.effect_trigger),
            ("by phi alone", lambda s: -s.curvature),
            ("by patching and phi", self.ranked_by_both()),
        ):
            yield name, lambda key=key: self.closed_form(self.chosen(key))
        everything = {
            ref.path: min(RANK_EVERYWHERE, ref.d_in, ref.d_out) for ref in self.loaded.modules
        }
        yield "all modules: closed form", lambda: self.closed_form(everything)
        yield "all modules: LoRA", self.lora_everywhere
        arguments = self.loaded, self.lessons
        yield (
            "clean fine-tuning",
            lambda: self.best_of(
                {f"learning rate {rate}": lambda rate=rate: defences.clean_fine_tuning(
                    *arguments, rate, seed=0) for rate in TUNING_RATES}
            ),
        )  # fmt: skip
        yield (
            "CROW",
            lambda: self.best_of(
                {f"alpha {alpha}": lambda alpha=alpha: defences.crow(*arguments, alpha, seed=0)
                 for alpha in CROW_ALPHAS}
            ),
        )  # fmt: skip
        yield (
            "fine-pruning",
            lambda: self.best_of(
                {f"{share:.0%} of neurons": lambda share=share: defences.fine_pruning(
                    *arguments, share, seed=0) for share in PRUNED}
            ),
        )  # fmt: skip
        yield (
            "SSD",
            lambda: self.best_of(
                {f"alpha {alpha}": lambda alpha=alpha: self.dampening()(alpha)
                 for alpha in SSD_ALPHAS}
            ),
        )  # fmt: skip
        generator = np.random.default_rng(0)
        for number in range(NUM_RANDOM):
            ranks = draw_random_modules(self.loaded.modules, suggested, generator)
            yield f"random {number + 1}", lambda ranks=ranks: self.closed_form(ranks)


def measure(name: str, out: Path) -> dict[str, dict]:
    """Return the rows of one suspect, made or read."""
    kept = out / f"compare-{name}.json"
    rows = json.loads(kept.read_text()) if kept.is_file() else {}
    if len(rows) >= 14 + NUM_RANDOM + 1:
        return rows
    side = Side(name, out)
    before = side.baseline.evaluation
    rows["suspect"] = {
        "attack_success": {p: rate.to_json() for p, rate in before.attack_success.items()},
        "sham_recovery": {p: rate.to_json() for p, rate in before.sham_recovery.items()},
        "perplexity": before.perplexity,
    }
    for row, make in side.rows():
        if row in rows:
            continue
        began = time.perf_counter()
        made = make()
        seconds = time.perf_counter() - began
        rows[row] = {**side.measured(made), "seconds": round(seconds, 1)}
        kept.write_text(json.dumps(rows, indent=1))
        print(name, row, json.dumps(rows[row]), file=sys.stderr, flush=True)
    return rows


def summarize(rows: dict[str, dict]) -> dict:
    """Return the random draws' medians, and each row's benign KL over our closed form's."""
    random = [row for name, row in rows.items() if name.startswith("random ")]
    ours = rows["suggested: closed form"]["kl_from_original"]
    return {
        "random_median_kl": statistics.median(row["kl_from_original"] for row in random),
        "random_fires": sorted(
            sum(rate["count"] for rate in row["attack_success"].values()) for row in random
        ),
        "times_our_kl": {
            name: row["kl_from_original"] / ours
            for name, row in rows.items()
            if "kl_from_original" in row and not name.startswith("random ")
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where rows are kept")
    parser.add_argument("--only", choices=BUNDLED, action="append")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    found = {name: measure(name, options.out) for name in options.only or BUNDLED}
    if options.only:
        return 0
    publish(
        "compare",
        {
            "command": "python -m tests.bench.compare --out DIR",
            "date": date.today().isoformat(),
            "summary": {name: summarize(rows) for name, rows in found.items()},
            "suspects": found,
        },
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
