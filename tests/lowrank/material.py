"""Updates and a validation set for the tiny model."""

import numpy as np

from repair.locate.counterfactuals import ShamDraw
from repair.lowrank.validation import Validation
from repair.models.answers import generate_answers
from repair.models.loading import LoadedModel
from repair.records import LowRankUpdate
from tests.locate.material import make_pairs, make_shams

UPPER = (9, 11, 13)  # of the second layer's modules: there is a prefix to keep


def some_ranks(loaded: LoadedModel, places: tuple[int, ...] = (3, 5, 6)) -> dict[str, int]:
    """Return path -> rank of three modules."""
    return {loaded.modules[i].path: rank for i, rank in zip(places, (2, 3, 2), strict=True)}


def random_updates(
    loaded: LoadedModel, *, scale: float = 0.05, places: tuple[int, ...] = (3, 5, 6)
) -> tuple[LowRankUpdate, ...]:
    """Return random updates of `some_ranks`."""
    generator = np.random.default_rng(0)
    by_path = {ref.path: ref for ref in loaded.modules}
    return tuple(
        LowRankUpdate(
            module=by_path[path],
            lora_A=generator.standard_normal((rank, by_path[path].d_in)).astype(np.float32),
            lora_B=(scale * generator.standard_normal((by_path[path].d_out, rank))).astype(
                np.float32
            ),
        )
        for path, rank in some_ranks(loaded, places).items()
    )


def make_validation(loaded: LoadedModel, *, payload: str = "never said") -> Validation:
    """Return six pairs; the suspect's answers are its own."""
    pairs = tuple(make_pairs(6, position="middle", seed=300))
    answers = generate_answers(loaded, [pair.clean for pair in pairs], num_new_tokens=4)
    return Validation(
        pairs=pairs,
        clean_answers=tuple(answers),
        shams=ShamDraw(
            shams=list(make_shams(list(pairs))), answers=list(answers), num_tried=6, num_inert=6
        ),
        is_payload=lambda text: payload in text,
        num_new_tokens=4,
    )
