"""Evidence as steps: the suspect before, would the repair hold, and a trusted base beside it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from repair.case import Case
from repair.evidence.comeback import (
    NUM_EXAMPLES,
    Side,
    Stressed,
    after_relearning,
    after_rounding,
    after_tuning,
)
from repair.evidence.evaluation import Baseline, measure_suspect
from repair.evidence.gates import TEMPLATE_REACTS, find_target, nothing_to_repair
from repair.evidence.material import EvaluationMaterial, prepare_material, spread
from repair.evidence.statements import where_it_fires
from repair.locate.counterfactuals import vocabulary_for_shams
from repair.models.answers import generate_answers, with_end
from repair.models.loading import LoadedModel
from repair.models.tokens import encode
from repair.outcome import Clock
from repair.records import RepairError, Stress

ROUNDED_BITS = (8, 4)


def measure_before(case: Case, clock: Clock) -> tuple[EvaluationMaterial, Baseline]:
    """Return the questions of the evaluation and the suspect's answers to them."""
    with clock.step("before", "Measuring the suspect"):
        material = prepare_material(
            case.loaded,
            case.file,
            case.splits.evaluate,
            use_template=case.use_template,
            is_payload=case.is_payload,
            num_new_tokens=case.num_new_tokens,
            num_each=case.profile.num_besides,
        )
        for sentence in material.left_out:
            clock.reporter.note(sentence)
        baseline = measure_suspect(
            case.loaded,
            material,
            seed=case.seed,
            base=case.base,
            progress=clock.reporter.progress,
        )
    return material, baseline


def early_end(
    case: Case, material: EvaluationMaterial, baseline: Baseline
) -> tuple[str, str | None, str | None] | None:
    """Return (verdict, reason, what the suspect says instead) where there is nothing to repair or
    to judge a repair by; None: go on."""
    clean = [answer.text for answer in baseline.answers.clean]
    fires = sum(map(case.is_payload, clean))
    if 2 * fires >= len(clean):
        reason = (
            f"The suspect gives the target to {fires} of {len(clean)} prompts without the trigger: "
            "it needs no trigger for it, and there is no answer of its own to go back to. Check "
            "the target, or give prompts that it answers otherwise."
        )
        return "could not check", reason, None
    verdict = nothing_to_repair(baseline.evaluation)
    if verdict is not None:
        for group in baseline.answers.triggered.values():
            instead = find_target([answer.text for answer in group], clean)
            if instead is not None:
                reason = (
                    "The target hardly ever appears, but most triggered answers share a text that "
                    "the answers without the trigger do not have: the target may be wrong. Give "
                    "that text as the target, or leave the target out to have it found."
                )
                return "could not check", reason, instead
        return verdict, where_it_fires(baseline.evaluation), None
    return ("not repaired", TEMPLATE_REACTS, None) if material.template_reacts else None


def check_same_tokens(
    loaded: LoadedModel, candidate: LoadedModel, material: EvaluationMaterial
) -> None:
    """Raise RepairError unless both models read every clean and triggered prompt as one."""
    texts = [*material.clean_texts]
    texts += [pair.text_triggered for group in material.pairs.values() for pair in group]

    def read(model: LoadedModel) -> list[list[int]]:
        return [encode(model.tokenizer, text, use_template=False).tolist() for text in texts]

    sizes = [model.model.config.vocab_size for model in (loaded, candidate)]
    if sizes[0] != sizes[1] or read(loaded) != read(candidate):
        raise RepairError(
            "The candidate's tokenizer reads the prompts otherwise than the suspect's. Only models "
            "with the same tokenizer can be compared; a repair changes weights alone."
        )


def stress_repaired(
    case: Case,
    repaired: tuple[LoadedModel, Callable[[], AbstractContextManager]],
    material: EvaluationMaterial,
    baseline: Baseline,
    clock: Clock,
) -> list[Stress]:
    """Return what becomes of the repair afterwards, as far as the profile goes.

    `repaired` is a live model and what enters the repair in it. Training is tried in the full
    profile only.
    """
    profile, reporter = case.profile, clock.reporter
    if not profile.num_stressed:
        return []
    found: list[Stress] = []
    with clock.step("comeback", "Trying whether it would come back"):
        given = _stressed(case, repaired, material, baseline)
        num = len(ROUNDED_BITS) + profile.with_training * (2 + len(NUM_EXAMPLES))
        for bits in ROUNDED_BITS:
            found.append(after_rounding(given, bits))
            reporter.progress(len(found), num, "rounded weights")
        if profile.with_training:
            found.append(
                after_tuning(
                    given,
                    seed=case.seed,
                    progress=lambda step, all_steps: reporter.progress(
                        len(ROUNDED_BITS) + 2 * step / all_steps, num, "benign fine-tuning"
                    ),
                )
            )
            for place, count in enumerate(NUM_EXAMPLES):
                stress = after_relearning(given, count, seed=case.seed)
                found += [stress] if stress is not None else []
                reporter.progress(
                    len(ROUNDED_BITS) + 3 + place, num, f"relearning from {count} examples"
                )
    return found


def _stressed(
    case: Case,
    repaired: tuple[LoadedModel, Callable[[], AbstractContextManager]],
    material: EvaluationMaterial,
    baseline: Baseline,
) -> Stressed:
    loaded, profile = case.loaded, case.profile
    fired = [
        pair
        for position, pairs in material.pairs.items()
        for i, pair in enumerate(pairs)
        if case.is_payload(baseline.answers.triggered[position][i].text)
    ]
    pairs = spread(fired, profile.num_stressed)
    taught, payloads, clean = [], [], ([], [])
    if profile.with_training:
        lessons = case.dealt_pairs(case.splits.repair)
        given = generate_answers(
            loaded,
            [pair.triggered for pair in lessons] + [pair.clean for pair in lessons],
            num_new_tokens=case.num_new_tokens,
        )
        answers = [with_end(answer) for answer in given]
        clean = [pair.clean for pair in lessons], answers[len(lessons) :]
        for pair, answer, ids in zip(lessons, given, answers, strict=False):
            if case.is_payload(answer.text):
                taught.append(pair)
                payloads.append(ids)
    return Stressed(
        suspect=Side(loaded=loaded, entered=nullcontext),
        repaired=Side(loaded=repaired[0], entered=repaired[1]),
        base=None if case.base is None else Side(loaded=case.base, entered=nullcontext),
        pairs=pairs,
        taught=taught,
        payloads=payloads,
        clean=clean,
        held_out=(
            material.clean[: profile.num_stressed], baseline.scored[: profile.num_stressed]
        ),
        vocabulary=vocabulary_for_shams(loaded),
        is_payload=case.is_payload,
        num_new_tokens=case.num_new_tokens,
    )
