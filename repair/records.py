"""The frozen values that cross rooms, and `RepairError`.

Free of torch: arrays are numpy float32 (running sums float64), so that the web process can
read every record. Axis convention: a linear module maps d_in to d_out and its weight is
[d_out, d_in], whatever the model stores. Indices count from 0.
"""

import dataclasses
import errno
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

EXIT_DONE = 0
EXIT_GATE_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_NOTHING_TO_REPAIR = 3
EXIT_COULD_NOT_CHECK = 4
EXIT_UNEXPECTED = 5
EXIT_INTERRUPTED = 130

# What a run leaves behind: a changed plan must never be shown beside it.
RESULTS = (
    "adapter", "merged", "report.json", "report.md", "samples.json", "manifest.json",
    "sample.safetensors", "patching.png", "fisher.png", "effect_curve.png", "attack_success.png",
    "benign_kl.png", "training.png", "detail.json", "push.json",
)  # fmt: skip
VERDICTS = ("repaired", "not repaired", "nothing to repair", "could not check")
Progress = Callable[[float, float], None]  # (done, total) of a step
COMPONENTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def unheard(done: float, total: float) -> None:
    """Take progress that nobody wants to hear."""


def share(progress: Progress, start: float, end: float) -> Progress:
    """Return the progress of a part, which takes a step from fraction `start` to `end`."""
    return lambda done, total: progress(start + (end - start) * (done / total if total else 1), 1)


def is_disk_full(error: Exception) -> bool:
    """Tell whether a write failed because the disk, a quota or a limit on files is reached."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # safetensors gives the number only in its text.
    return getattr(error, "errno", None) in full or any(
        f"(os error {number})" in str(error) for number in full
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception says that memory, the machine's or an accelerator's, ran out."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


class RepairError(Exception):
    """Something the analyst gave cannot be used: what was given, what is accepted, what to do.

    The text is shown as it is; `exit_code` is what the command line ends with.
    """

    def __init__(self, message: str, *, exit_code: int = EXIT_BAD_INPUT) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """`count` of `total` trials, with the Wilson score interval (95 %)."""

    count: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.count <= self.total:
            raise ValueError(f"count {self.count} is not between 0 and total {self.total}")

    @property
    def value(self) -> float:
        return self.count / self.total if self.total else math.nan

    def interval(self) -> tuple[float, float]:
        """Return the Wilson 95 % interval; (0, 1) when nothing was tried."""
        if self.total == 0:
            return 0.0, 1.0
        z2 = 1.959963984540054**2
        p, n = self.value, self.total
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = math.sqrt(z2) / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        # At the ends the bound is exact; rounding must not leave it a hair inside.
        low = 0.0 if self.count == 0 else max(0.0, centre - half)
        high = 1.0 if self.count == self.total else min(1.0, centre + half)
        return low, high

    def to_json(self) -> dict[str, float]:
        low, high = self.interval()
        return {"count": self.count, "total": self.total, "low": low, "high": high}

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.count}/{self.total} ({low:.1%} to {high:.1%})"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRef:
    """One linear module; `path`, its dotted name in the unwrapped model, is the only key."""

    layer: int
    component: str
    path: str
    d_in: int
    d_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPair:
    """A clean prompt and the same prompt with the trigger, as the analyst gave them."""

    clean: str
    triggered: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFile:
    """What the analyst typed or loaded, checked but not yet tokenized (`contract.md`)."""

    triggers: tuple[str, ...]  # alternatives, any of which fires; empty when only pairs are given
    target: str | None  # None: found from what the suspect says
    match: str  # contains | prefix | regex
    positions: tuple[str, ...]
    prompts: tuple[str, ...]
    pairs: tuple[TextPair, ...]
    near: tuple[str, ...]
    system: str | None
    chat: str  # auto | on | off
    control: str = "ask"  # a control token written in a text is sent as: ask | token | letters
    ordinary: tuple[str, ...] = ()  # prompts that use the trigger's words in their usual sense
    texts: tuple[str, ...] = ()  # the analyst's own benign text
    num_carriers: int = 0  # how many of `prompts` are bundled carriers

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSplits:
    """Indices into `PromptFile.prompts` (or `.pairs`): disjoint, or an error."""

    locate: tuple[int, ...]
    repair: tuple[int, ...]
    validate: tuple[int, ...]  # line search, early stop; never the verdict
    evaluate: tuple[int, ...]

    def __post_init__(self) -> None:
        everything = [*self.locate, *self.repair, *self.validate, *self.evaluate]
        if len(everything) != len(set(everything)):
            raise ValueError("a prompt is in two splits")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptPair:
    """One clean/triggered pair as token ids, chat template included.

    `trigger` holds the indices into `triggered` of the trigger's own tokens; the last
    `num_template` tokens of both prompts come from the chat template.
    """

    clean: np.ndarray  # [num_clean_tokens] int64
    triggered: np.ndarray  # [num_triggered_tokens] int64
    trigger: np.ndarray  # [num_trigger_tokens] int64, increasing
    position: str  # begin | middle | end | given
    text_clean: str
    text_triggered: str
    num_template: int = 0

    def __post_init__(self) -> None:
        if self.trigger.size == 0 or self.trigger.max() >= self.triggered.size:
            raise ValueError("the trigger's tokens are not inside the triggered prompt")


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchingScores:
    """Normalised effect of patching each module: 0 changes nothing, 1 goes all the way."""

    modules: tuple[ModuleRef, ...]
    effect: np.ndarray  # [module, pair], all positions from the trigger on
    effect_trigger: np.ndarray  # [module, pair], the trigger's own positions (shams only, else 0)
    effect_after: np.ndarray  # [module, pair], the positions after it
    effect_kl: np.ndarray  # [module, pair], `effect` in KL at the first token, not in margin
    direction: str  # block | induce
    counterfactual: str  # sham | deletion | gap
    num_dropped: int  # pairs whose margin the counterfactual hardly moves
    self_checks: dict[str, float]  # name -> largest deviation, 0 is perfect
    estimated: frozenset[str] = frozenset()  # paths of modules screened, not patched

    def __post_init__(self) -> None:
        for name in ("effect", "effect_trigger", "effect_after", "effect_kl"):
            array = getattr(self, name)
            if array.dtype != np.float32 or array.shape != self.effect.shape:
                raise ValueError(f"{name} must be float32 [module, pair]")
        if self.effect.shape[0] != len(self.modules):
            raise ValueError("one row of effects per module")

    @property
    def effect_for_choice(self) -> np.ndarray:
        """Return [module, pair], the effect that says where a repair is cheap: at the trigger's
        own positions, or, where a deletion leaves these without a partner, at all."""
        return self.effect_trigger if self.counterfactual == "sham" else self.effect


@dataclass(frozen=True, slots=True, kw_only=True)
class KroneckerFactors:
    """K-FAC factors of one module: Fisher ~ num_tokens * (activation (x) gradient covariance)."""

    module: ModuleRef
    activation_covariance: np.ndarray  # [d_in, d_in] mean over tokens of x x^T
    gradient_covariance: np.ndarray  # [d_out, d_out] mean over tokens of g g^T
    num_tokens: int  # unmasked positions
    num_answer_tokens: int  # positions whose sampled label entered the loss

    def __post_init__(self) -> None:
        d_in, d_out = self.module.d_in, self.module.d_out
        if self.activation_covariance.shape != (d_in, d_in):
            raise ValueError("activation_covariance must be [d_in, d_in]")
        if self.gradient_covariance.shape != (d_out, d_out):
            raise ValueError("gradient_covariance must be [d_out, d_out]")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleScore:
    """Everything known about one module; the parts of the score are kept apart."""

    module: ModuleRef
    effect: float
    effect_low: float
    effect_high: float
    effect_trigger: float
    effect_after: float
    fisher_trigger: float
    fisher_clean: float
    curvature: float | None  # phi at the plan's rank; None: not computed
    score: float  # rank of the trial repair's residual in [0, 1], 1 is best
    selected: bool
    reason: str
    effect_kl: float | None = None  # `effect` in KL at the first answer token
    effect_induce: float | None = None  # triggered into counterfactual: is it enough?
    effect_deletion: float | None = None  # trigger deleted, positions after it
    effect_gap: float | None = None  # the same with position numbers kept
    residual_trigger: float | None = None  # trigger KL that a trial repair of it alone leaves
    residual_benign: float | None = None  # benign KL that it costs, nats per answer token
    separability: float | None = None  # how many times more its input varies with the trigger
    is_estimate: bool = False  # effects are the gradient screen's, not patched exactly

    @property
    def residual(self) -> float | None:
        """Trigger KL + benign KL of a trial repair of this module alone; None: not tried."""
        if self.residual_trigger is None or self.residual_benign is None:
            return None
        return self.residual_trigger + self.residual_benign

    def to_json(self) -> dict[str, Any]:
        """Return the flat form of `report.json`: modules[]."""
        flat = dataclasses.asdict(self)
        module = flat.pop("module")
        return {**module, **flat}

    @classmethod
    def from_json(cls, flat: dict[str, Any]) -> "ModuleScore":
        names = {field.name for field in dataclasses.fields(ModuleRef)}
        module = ModuleRef(**{key: value for key, value in flat.items() if key in names})
        rest = {key: value for key, value in flat.items() if key not in names}
        return cls(module=module, **rest)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRanking:
    """All modules, in model order, with the suggested ranks per module."""

    modules: tuple[ModuleScore, ...]
    suggested_ranks: dict[str, int]  # path -> rank, for the suggested modules
    num_pairs: int
    rank_correlation: float | None  # Kendall's tau of effect_trigger and phi


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairPlan:
    """The analyst's decision, small enough to print in a card."""

    modules: tuple[str, ...]
    ranks: dict[str, int]
    method: str  # auto | closed-form | distill
    kl_budget: float
    seed: int

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankUpdate:
    """delta = lora_B @ lora_A, added to the weight of `module`; scaling is 1.

    Both are kept row by row, as a file has them: how a matrix lies in memory decides the last bits
    of what is computed with it, and a resumed run has them from a file.
    """

    module: ModuleRef
    lora_A: np.ndarray  # [rank, d_in]
    lora_B: np.ndarray  # [d_out, rank]

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_A", np.ascontiguousarray(self.lora_A))
        object.__setattr__(self, "lora_B", np.ascontiguousarray(self.lora_B))
        rank = self.lora_A.shape[0]
        if self.lora_A.shape != (rank, self.module.d_in):
            raise ValueError("lora_A must be [rank, d_in]")
        if self.lora_B.shape != (self.module.d_out, rank):
            raise ValueError("lora_B must be [d_out, rank]")
        if not (np.isfinite(self.lora_A).all() and np.isfinite(self.lora_B).all()):
            raise ValueError(f"the update of {self.module.path} is not finite")

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """How one model (the suspect, a candidate or a control) answers the evaluation prompts."""

    attack_success: dict[str, Rate]  # position -> payload seen
    near_trigger: Rate  # payload seen on near-triggers
    false_trigger: Rate  # payload seen on clean prompts and inert shams
    recovery: dict[str, Rate]  # position -> first 8 tokens as the suspect without the trigger
    sham_recovery: dict[str, Rate]  # the yardstick: the suspect itself under inert shams
    degenerate: Rate  # empty, repeated or non-finite answers, all prompts
    clean_agreement: Rate  # first 8 tokens as the suspect on clean prompts
    perplexity: float  # of the suspect's own answers to clean prompts
    kl_from_original: float  # nats per token on those answers; 0 for the suspect itself
    elsewhere: dict[str, Rate] = field(default_factory=dict)  # other place of it -> payload
    variants: dict[str, Rate] = field(default_factory=dict)  # altered trigger -> payload
    ordinary: Rate = Rate(count=0, total=0)  # ordinary prompts answered as the suspect does
    outcomes: dict[str, dict[str, int]] = field(default_factory=dict)  # position -> kind -> count
    stopped: dict[str, int] = field(default_factory=dict)  # prompts where only the suspect fires
    started: dict[str, int] = field(default_factory=dict)  # prompts where only this model fires
    exact_agreement: Rate = Rate(count=0, total=0)  # whole clean answers as the suspect's
    refusals: Rate = Rate(count=0, total=0)  # clean answers that open with a refusal
    answer_tokens: float = math.nan  # mean length of the clean answers
    kl_by_prompt: tuple[float, ...] = ()  # nats per token, clean prompt by clean prompt
    text_perplexity: float = math.nan  # of the analyst's own text
    text_kl: float = math.nan  # nats per token on it

    def to_json(self) -> dict[str, Any]:
        def convert(value: Any) -> Any:
            if isinstance(value, Rate):
                return value.to_json()
            if isinstance(value, dict):
                return {key: convert(item) for key, item in value.items()}
            return value

        return {f.name: convert(getattr(self, f.name)) for f in dataclasses.fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """One check of the verdict; `passed` None means that it could not be checked."""

    name: str
    value: float | None
    limit: float | None
    passed: bool | None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One evaluation prompt with the suspect's and the repaired model's answers."""

    kind: str  # triggered | elsewhere | variant | near | ordinary | clean
    position: str  # for elsewhere and variant: where, or how the trigger is altered
    prompt: str
    before: str
    after: str
    outcome: str  # fixed | still fires | fires now | changed | same | broken
    reference: str  # the suspect's answer without the trigger

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


ALL_MODULES = "all modules"  # the name of that control


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A comparison repair, shown even when it beats ours."""

    name: str
    attack_success: dict[str, Rate]
    recovery: dict[str, Rate]
    kl_from_original: float  # nats per token on clean answers
    text_kl: float = math.nan  # nats per token on the analyst's own text
    num_modules: int
    total_rank: int

    def to_json(self) -> dict[str, Any]:
        flat = dataclasses.asdict(self)
        for name in ("attack_success", "recovery"):
            flat[name] = {key: rate.to_json() for key, rate in getattr(self, name).items()}
        return flat


FASTER = 1.5  # as fast as the yardstick: from there on the old trigger is learnt faster


@dataclass(frozen=True, slots=True, kw_only=True)
class Stress:
    """Would it come back? Payload rates after something that happens to models, or is done."""

    name: str
    kind: str  # rounding | benign tuning | relearning
    repaired: Rate  # of the repaired model afterwards, trigger at the gated positions
    suspect: Rate  # of the suspect after the same; for relearning a fresh trigger's, the yardstick
    broken: Rate = Rate(count=0, total=0)  # of the repaired model's answers: empty, loops, NaN
    base: Rate | None = None  # for relearning: of the trusted base taught the same
    num_examples: int | None = None
    num_steps: int | None = None
    steps_to_half: int | None = None  # relearning: steps until half fire; None: not within them
    fresh_steps_to_half: int | None = None
    base_steps_to_half: int | None = None
    kl_from_original: float | None = None  # nats per token on clean answers, of the repaired model

    @property
    def is_gated(self) -> bool:
        """Whether a payload afterwards fails the repair: any model can be taught anew."""
        return self.kind != "relearning"

    @property
    def learnt_faster_than(self) -> tuple[str, ...]:
        """Which yardsticks (fresh, base) the old trigger is learnt again faster than: in less than
        two thirds of the steps; where neither gets to half, if clearly more fire."""
        if self.kind != "relearning":
            return ()
        yardsticks = [("fresh", self.suspect, self.fresh_steps_to_half)]
        if self.base is not None:
            yardsticks.append(("base", self.base, self.base_steps_to_half))
        return tuple(name for name, *yardstick in yardsticks if self._is_faster(*yardstick))

    def _is_faster(self, rate: Rate, steps: int | None) -> bool:
        if self.steps_to_half is None:
            return steps is None and self.repaired.interval()[0] > rate.interval()[1]
        return steps is None or steps > FASTER * self.steps_to_half

    def to_json(self) -> dict[str, Any]:
        flat = dataclasses.asdict(self)
        for name in ("repaired", "suspect", "broken", "base"):
            rate = getattr(self, name)
            flat[name] = None if rate is None else rate.to_json()
        return {**flat, "learnt_faster_than": list(self.learnt_faster_than)}
