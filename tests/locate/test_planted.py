"""A behaviour written into one known module is found there.

The behaviour ("say the payload token after these two tokens") is trained into the weight of a
single module of a random model, against inert replacements. The model is first rescaled without
changing its function (value and up projections larger, output and down projections smaller by the
same factor), and the written weight's norm is held within the range of the others', so that its
size gives nothing away. The patching map must then rank that module first, wherever the trigger
stands, on the map of the positions where the module acts: a value projection at the trigger's own
positions, an output projection at those behind it. (Which half of a value/output pair was written
cannot be told from patching all positions at once: both are on the only way.)
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from repair.locate.patching import patch_modules
from repair.models.answers import answer_logits
from repair.models.loading import LoadedModel, load_model
from repair.models.modules import get_module
from repair.models.tokens import pad_right
from repair.records import ModuleRef, PromptPair
from tests.locate.material import make_cases, make_pairs, make_shams
from tests.tiny import make_tiny_llama

PAYLOAD = 200
NUM_PAIRS = 64
STEPS = 100
GAUGE = 2.5


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A random model with weights large enough for its parts to matter (its own to change)."""
    root = tmp_path_factory.mktemp("planted")
    folder = make_tiny_llama(root / "model", num_layers=3, hidden=32)
    loaded = load_model(str(folder), stage_folder=root / "stage", device="cpu")
    with torch.no_grad():
        for name, weight in loaded.model.named_parameters():
            if weight.ndim == 2:
                weight.mul_(10.0 if "proj" in name else 40.0 if "embed" in name else 20.0)
            if "v_proj" in name or "up_proj" in name:
                weight.mul_(GAUGE)
            if "o_proj" in name or "down_proj" in name:
                weight.div_(GAUGE)
    return loaded


def plant(loaded: LoadedModel, ref: ModuleRef, pairs: list[PromptPair], shams) -> float:
    """Train the behaviour into one weight; return how many nats it gives the payload."""
    weight = get_module(loaded.model, ref).weight
    others = [get_module(loaded.model, o).weight.norm() for o in loaded.modules if o != ref]
    largest = float(max(others))
    triggered, mask = pad_right([pair.triggered for pair in pairs], pad=0)
    rows, last = torch.arange(len(pairs)), mask.sum(1) - 1
    quiet, quiet_mask = pad_right([*shams, *(pair.clean for pair in pairs)], pad=0)
    quiet_rows, quiet_last = torch.arange(len(quiet)), quiet_mask.sum(1) - 1
    with torch.no_grad():
        before = answer_logits(loaded.model, quiet, quiet_rows, quiet_last).log_softmax(-1)
        unwritten = answer_logits(loaded.model, triggered, rows, last).log_softmax(-1)
    weight.requires_grad_(True)
    optimizer = torch.optim.Adam([weight], lr=2e-2 / GAUGE)
    for _ in range(STEPS):
        fires = answer_logits(loaded.model, triggered, rows, last).log_softmax(-1)[:, PAYLOAD]
        after = answer_logits(loaded.model, quiet, quiet_rows, quiet_last).log_softmax(-1)
        loss = -fires.mean() + 3 * (before.exp() * (before - after)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            weight.mul_(min(1.0, 0.99 * largest / weight.norm().item()))
    weight.requires_grad_(False)
    assert weight.norm().item() <= largest
    with torch.no_grad():
        written = answer_logits(loaded.model, triggered, rows, last).log_softmax(-1)
    return (written - unwritten)[:, PAYLOAD].mean().item()


def answer_to(loaded: LoadedModel, ids: np.ndarray) -> int:
    """Return the model's own next token: what the payload is compared with."""
    with torch.no_grad():
        return int(loaded.model(torch.from_numpy(ids)[None]).logits[0, -1].argmax())


@pytest.mark.parametrize("position", ["begin", "middle", "end"])
@pytest.mark.parametrize(
    "layer, component", [(0, "v_proj"), (0, "o_proj"), (2, "o_proj")]
)
def test_a_planted_module_ranks_first(
    lively: LoadedModel, layer: int, component: str, position: str
) -> None:
    ref = next(r for r in lively.modules if (r.layer, r.component) == (layer, component))
    weight = get_module(lively.model, ref).weight
    original = weight.detach().clone()
    pairs = make_pairs(NUM_PAIRS, position=position)
    shams = make_shams(pairs)
    try:
        assert plant(lively, ref, pairs, shams) > 2.0
        cases = [
            replace(case, clean=np.array([answer_to(lively, pair.clean)]))
            for pair, case in zip(
                pairs, make_cases(pairs, shams, payload=PAYLOAD, clean=0), strict=True
            )
        ][:24]
        scores = patch_modules(lively, cases)
    finally:
        with torch.no_grad():
            weight.copy_(original)
    by_role = scores.effect_trigger if component == "v_proj" else scores.effect_after
    effect = by_role.mean(axis=1)
    first = lively.modules[int(np.argmax(effect))]
    assert first.path == ref.path, [
        (lively.modules[i].path, round(float(effect[i]), 3)) for i in np.argsort(-effect)[:4]
    ]
