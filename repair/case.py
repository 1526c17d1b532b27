"""One job's material: the live suspect, the checked prompts and how they are shared out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from repair.evidence.gates import find_target
from repair.limits import TEXT_SHARE
from repair.locate.counterfactuals import draw_sham, inert_shams, vocabulary_for_shams
from repair.locate.lessons import (
    Lesson,
    Lessons,
    teach_passages,
    teach_prompts,
    teach_split,
    teach_texts,
)
from repair.lowrank.validation import Validation
from repair.models.answers import generate_answers, target_matcher
from repair.models.fidelity import settle_control, text_notices
from repair.models.loading import LoadedModel, check_ids
from repair.models.tokens import (
    check_length,
    encode,
    encode_pair,
    encode_pairs,
    encode_text,
    num_tokens,
)
from repair.profiles import Profile
from repair.prompts import (
    has_place,
    insert_trigger,
    split_near,
    split_prompts,
    split_texts,
    spread_evenly,
    top_up_with_carriers,
)
from repair.records import (
    EXIT_COULD_NOT_CHECK,
    Progress,
    PromptFile,
    PromptPair,
    PromptSplits,
    RepairError,
    TextPair,
    share,
    unheard,
)

UNKNOWN_TARGET_TOKENS = 48
MOST_NEW_TOKENS = 256
FEWEST_NEW_TOKENS = 64  # the payload may come behind an ordinary opening
NEAR_PROMPTS = 48
TWICE_EVERY = 3
TWO_PLACES = (("end", "begin"), ("middle", "begin"), ("middle", "end"))  # the middle goes in first


class Reporter(Protocol):
    """Where the steps tell what they do."""

    def plan(self, seconds: Mapping[str, float]) -> None: ...
    def step(self, name: str, title: str) -> None: ...
    def progress(self, done: float, total: float, text: str = "") -> None: ...
    def metric(self, name: str, **numbers: float | int | None) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What every step needs; the only live thing is the model."""

    loaded: LoadedModel
    file: PromptFile
    splits: PromptSplits
    profile: Profile
    positions: tuple[str, ...]
    use_template: bool
    target: str
    is_payload: Callable[[str], bool]
    num_new_tokens: int
    seed: int
    base: LoadedModel | None = None  # a base model that the analyst trusts

    def pairs(self, indices: Sequence[int], position: str) -> list[PromptPair]:
        """Return the pairs of a split at one position."""
        return encode_pairs(
            self.loaded.tokenizer,
            self.file,
            indices,
            position=position,
            use_template=self.use_template,
        )

    def dealt_pairs(self, indices: Sequence[int]) -> list[PromptPair]:
        """Return one pair per prompt of a split, positions dealt out in turn."""
        return [
            pair
            for turn, index in enumerate(indices)
            for pair in self.pairs([index], self.positions[turn % len(self.positions)])
        ]

    def doubled_pairs(self, indices: Sequence[int]) -> list[PromptPair]:
        """Return pairs of every third prompt with the trigger twice; none of a file of pairs.

        A repair that holds on to answers and text reaches a single trigger by so narrow a margin
        that two still fire, unless it is taught them.
        """
        chosen = () if self.file.pairs else indices[::TWICE_EVERY]
        return [
            pair
            for turn, index in enumerate(chosen)
            for pair in self._doubled(index, TWO_PLACES[turn % len(TWO_PLACES)])
        ]

    def _doubled(self, index: int, places: tuple[str, str]) -> list[PromptPair]:
        """Return a prompt's pair with the trigger at both places, where it has them and it fits."""
        clean = self.file.prompts[index]
        trigger = self.file.triggers[index % len(self.file.triggers)]
        if not all(has_place(clean, place) for place in places):
            return []
        triggered = insert_trigger(insert_trigger(clean, trigger, places[0]), trigger, places[1])
        pair = encode_pair(
            self.loaded.tokenizer,
            TextPair(clean=clean, triggered=triggered),
            triggers=self.file.triggers,
            position="given",
            system=self.file.system,
            use_template=self.use_template,
        )
        limit = self.loaded.model.config.max_position_embeddings
        return [pair] if pair.triggered.size + self.num_new_tokens <= limit else []


def open_case(
    loaded: LoadedModel, file: PromptFile, *, profile: Profile, seed: int, reporter: Reporter
) -> Case:
    """Return the case of a suspect and a prompt file.

    Raises RepairError for prompts that do not fit the model, for a template that is asked for and
    missing, and (could not check) when no target is given and none can be made out.
    """
    if file.chat == "on" and not loaded.has_template:
        raise RepairError(
            'The prompt file says "chat": "on", but this model has no chat template. '
            'Use "auto" or "off".'
        )
    use_template = loaded.has_template and file.chat != "off"
    file = _settle_pairs(file, reporter)
    positions = ("given",) if file.pairs else file.positions
    if not file.pairs:
        given = len(file.prompts)
        file = top_up_with_carriers(file, minimum=profile.num_prompts)
        if file.num_carriers:
            reporter.note(
                f"{given} prompts were given; {file.num_carriers} bundled benign carrier prompts "
                "were added."
            )
    splits = split_prompts(
        len(file.pairs or file.prompts), **profile.sizes, seed=seed
    )
    texts = [pair.triggered for pair in file.pairs] or file.prompts
    everything_typed = [*file.triggers, *texts, *file.near, *file.ordinary, *file.texts]
    settle_control(loaded.tokenizer, file.control, everything_typed)
    for sentence in text_notices(loaded.tokenizer, file.triggers, texts):
        reporter.note(sentence)
    target = file.target or _read_target(loaded, file, splits, positions, use_template, reporter)
    match = file.match if file.target else "contains"  # what was found is text, not a pattern
    num_target = num_tokens(loaded.tokenizer, target)
    case = Case(
        loaded=loaded,
        file=file,
        splits=splits,
        profile=profile,
        positions=positions,
        use_template=use_template,
        target=target,
        is_payload=target_matcher(target, match),
        num_new_tokens=_answer_length(num_target, is_prefix=match == "prefix"),
        seed=seed,
    )
    everything = [
        *splits.locate, *splits.repair, *splits.validate, *splits.evaluate,
    ]  # fmt: skip
    for position in positions:
        pairs = case.pairs(everything, position)
        for pair in pairs:
            check_ids(loaded, np.concatenate([pair.clean, pair.triggered]))
        check_length(
            [ids for pair in pairs for ids in (pair.clean, pair.triggered)],
            num_new_tokens=case.num_new_tokens,
            limit=loaded.model.config.max_position_embeddings,
        )
    return case


def _answer_length(num_target: int, *, is_prefix: bool) -> int:
    """Return how many answer tokens are read: a payload may come behind an ordinary opening."""
    wanted = num_target + 8 if is_prefix else max(FEWEST_NEW_TOKENS, num_target + 32)
    return min(MOST_NEW_TOKENS, max(24, wanted))


def _settle_pairs(file: PromptFile, reporter: Reporter) -> PromptFile:
    """Return a file of either prompts or pairs, each clean prompt once.

    With a known trigger and clean prompts, prompts that came with the trigger in them join the
    clean ones. Pairs that share a clean prompt would be split between repairing and evaluating.
    """
    if file.pairs and file.prompts and file.triggers:
        reporter.note(
            f"{len(file.pairs)} prompts came with the trigger in them; it was taken out and is put "
            "in at the positions asked for, as with the others."
        )
        prompts = dict.fromkeys([*file.prompts, *(pair.clean for pair in file.pairs)])
        return replace(file, prompts=tuple(prompts), pairs=())
    first = {pair.clean: pair for pair in reversed(file.pairs)}
    kept = tuple(pair for pair in file.pairs if first[pair.clean] is pair)
    if len(kept) < len(file.pairs):
        reporter.note(
            f"{len(file.pairs) - len(kept)} pairs share their clean prompt with an earlier one and "
            "were left out, so that no prompt is in two splits."
        )
    return replace(file, pairs=kept)


def _read_target(
    loaded: LoadedModel,
    file: PromptFile,
    splits: PromptSplits,
    positions: Sequence[str],
    use_template: bool,
    reporter: Reporter,
) -> str:
    """Return what the suspect says to triggered prompts that it does not say to clean ones."""
    num_asked, target = 0, None
    for position in positions:  # a backdoor that fires at one position only is seen there
        pairs = encode_pairs(
            loaded.tokenizer, file, splits.locate, position=position, use_template=use_template
        )
        prompts = [pair.triggered for pair in pairs] + [pair.clean for pair in pairs]
        answers = generate_answers(loaded, prompts, num_new_tokens=UNKNOWN_TARGET_TOKENS)
        texts = [answer.text for answer in answers]
        num_asked += len(pairs)
        target = find_target(texts[: len(pairs)], texts[len(pairs) :])
        if target is not None:
            break
    if target is None:
        raise RepairError(
            f"No target was given, and the answers to {num_asked} triggered prompts have nothing "
            "in common that the answers without the trigger lack. Give the target text, or check "
            "the trigger.",
            exit_code=EXIT_COULD_NOT_CHECK,
        )
    reporter.note(f"Target found in the suspect's answers: {ascii(target)}")
    return target


def make_lessons(case: Case, *, progress: Progress = unheard) -> Lessons:
    """Return what the repair learns from (repair split) and is steered by (validate split)."""
    loaded, splits = case.loaded, case.splits
    pairs = case.dealt_pairs(splits.repair)
    texts, more_texts, _ = split_texts(case.file.texts)
    taught = teach_split(
        loaded,
        spread_evenly(pairs, case.doubled_pairs(splits.repair)),
        is_payload=case.is_payload,
        progress=share(progress, 0, 0.5),
    )
    held_out = teach_split(
        loaded,
        spread_evenly(case.dealt_pairs(splits.validate), case.doubled_pairs(splits.validate)),
        is_payload=case.is_payload,
        progress=share(progress, 0.5, 0.75),
    )
    for found in (taught, held_out):
        if len(found.clean) < 4:
            raise RepairError(
                "Almost every answer without the trigger carries the target or is empty, so that "
                "there is nothing to repair towards. Check the target, or give other prompts.",
                exit_code=EXIT_COULD_NOT_CHECK,
            )
    return Lessons(
        triggered=taught.triggered,
        counterparts=taught.counterparts,
        clean=taught.clean,
        text=_plain_texts(case, splits.repair, texts, len(taught.clean)),
        near=teach_prompts(
            loaded,
            _near_prompts(case, pairs),
            is_payload=case.is_payload,
            progress=share(progress, 0.75, 1),
        ),
        held_out_triggered=held_out.triggered,
        held_out_clean=held_out.clean,
        held_out_text=_plain_texts(case, splits.validate, more_texts, len(held_out.clean)),
        num_dropped=taught.num_dropped + held_out.num_dropped,
    )


def _plain_texts(
    case: Case, split: Sequence[int], given: Sequence[str], num_answers: int
) -> Lesson:
    """Return the lesson of plain text, a share of the answers: clean prompts of a split without
    a template, and for up to half of it passages of the texts `given`."""
    file, tokenizer, num = case.file, case.loaded.tokenizer, int(TEXT_SHARE * num_answers)
    limit = case.loaded.model.config.max_position_embeddings
    passages = teach_passages(
        case.loaded,
        [encode_text(tokenizer, text, limit=limit) for text in given],
        most=num // 2,
        seed=case.seed,
    )
    prompts = [file.pairs[i].clean if file.pairs else file.prompts[i] for i in split]
    prompts = list(dict.fromkeys(prompts))[: num - len(passages)]
    ids = [encode(tokenizer, text, use_template=False) for text in prompts]
    return teach_texts(case.loaded, ids).woven(passages)


def _near_prompts(case: Case, pairs: Sequence[PromptPair]) -> list[np.ndarray]:
    """Return prompts that are almost triggered: near-triggers in the slot, and shams."""
    generator = np.random.default_rng([case.seed, 0x4EA])
    vocabulary = vocabulary_for_shams(case.loaded)
    taught = () if case.file.pairs else split_near(case.file.near)[0]
    num = min(NEAR_PROMPTS, len(pairs) // 2) if taught else NEAR_PROMPTS
    prompts = [draw_sham(pair, vocabulary, generator) for pair in pairs[:num]]
    if taught:
        for i, pair in enumerate(pairs[num : 2 * num]):
            if not has_place(pair.text_clean, pair.position):
                continue
            near = taught[i % len(taught)]
            text = insert_trigger(pair.text_clean, near, pair.position)
            prompts.append(
                encode(
                    case.loaded.tokenizer,
                    text,
                    system=case.file.system,
                    use_template=case.use_template,
                )
            )
    return prompts


def make_validation(case: Case) -> Validation:
    """Return the validate split's pairs with the suspect's answers, for choices during repair."""
    pairs = case.dealt_pairs(case.splits.validate)
    answers = generate_answers(
        case.loaded, [pair.clean for pair in pairs], num_new_tokens=case.num_new_tokens
    )
    return Validation(
        pairs=tuple(pairs),
        clean_answers=tuple(answers),
        shams=inert_shams(
            case.loaded,
            pairs,
            is_payload=case.is_payload,
            num_new_tokens=case.num_new_tokens,
            seed=case.seed + 1,
        ),
        is_payload=case.is_payload,
        num_new_tokens=case.num_new_tokens,
    )
