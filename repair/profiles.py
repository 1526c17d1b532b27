"""How thorough a job is: what `--profile` stands for. Free of torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """How many prompts each step may use, and how long training may go on."""

    num_locate: int
    num_repair: int
    num_validate: int
    num_evaluate: int
    num_patched_pairs: int
    num_probed: int  # prompts of either kind on which one module alone is tried
    num_steps: int
    num_besides: int  # prompts for each kind of question besides the gated ones
    num_controls: int  # random-module draws, where no number is given
    num_stressed: int  # prompts asked after each stress; 0: none is tried
    with_training: bool = False  # benign tuning and relearning as well
    most_exact: int | None = 160  # a model with more modules is screened by gradients first

    @property
    def sizes(self) -> dict[str, int]:
        """The four groups, as `prompts.split_prompts` takes them."""
        names = ("num_locate", "num_repair", "num_validate", "num_evaluate")
        return {name: getattr(self, name) for name in names}

    @property
    def num_prompts(self) -> int:
        return sum(self.sizes.values())


PROFILES = {
    "quick": Profile(
        num_locate=40, num_repair=64, num_validate=48, num_evaluate=192,
        num_patched_pairs=12, num_probed=12,
        num_steps=60, num_besides=24, num_controls=3, num_stressed=0,
    ),
    "standard": Profile(
        num_locate=64, num_repair=200, num_validate=96, num_evaluate=400,
        num_patched_pairs=32, num_probed=24,
        num_steps=150, num_besides=60, num_controls=3, num_stressed=120,
    ),
    "full": Profile(
        num_locate=96, num_repair=300, num_validate=128, num_evaluate=400,
        num_patched_pairs=64, num_probed=24,
        num_steps=200, most_exact=None, num_besides=200, num_controls=20,
        num_stressed=200, with_training=True,
    ),
}  # fmt: skip
