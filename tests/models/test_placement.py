"""A model laid over several places by accelerate gives what it gives on one, and is repaired alike.

There is no GPU here: what main memory should not hold lies on disk, by accelerate's own means, and
comes for each pass, as a layer in main memory comes to a GPU. Only where it is computed differs.
"""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from repair.evidence.comeback import rounded
from repair.evidence.oracle import differing_parameters
from repair.locate.detail import examine_layer
from repair.locate.fisher import collect_factors, price_updates, trigger_gradients
from repair.locate.patching import patch_modules
from repair.locate.screen import estimate_modules
from repair.lowrank.adapter import attached, read_updates
from repair.lowrank.repairing import neutral_updates
from repair.models import loading, placement
from repair.models.answers import answer_logits, generate_answers, scoring_batches
from repair.models.hooks import apply_updates, merged_weights
from repair.models.loading import LoadedModel, load_model
from repair.models.modules import find_modules, get_module
from repair.models.prefix import entered, keep_prefix
from repair.records import LowRankUpdate
from tests.locate.material import make_cases, make_lesson, make_pairs, make_shams
from tests.tiny import ARCHITECTURES, build_tiny, make_tiny_llama, make_tokenizer

DISK = 1 << 34


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LoadedModel, LoadedModel]:
    """One random model per architecture, whole and with its layers on disk."""
    model, tokenizer = build_tiny(request.param), make_tokenizer()
    plain = LoadedModel(
        model=model, tokenizer=tokenizer, modules=find_modules(model), source=request.param,
        revision=None, licence=None, licence_terms={}, files={}, base=None, staged=None,
        device="cpu", dtype="float32", has_template=True, stop_ids=(2,),
    )  # fmt: skip
    spread = copy.deepcopy(model)
    embedding = spread.get_input_embeddings()
    device_map = {
        path: "cpu" if module is embedding else "disk"
        for path, module in spread.named_modules()
        if module._parameters or module._buffers
    }
    placement.lay_over(
        spread, device_map, device="cpu", folder=tmp_path_factory.mktemp("laid")
    )
    assert all(get_module(spread, ref).weight.is_meta for ref in plain.modules)
    return plain, dataclasses.replace(plain, model=spread)


@pytest.fixture(autouse=True)
def every_margin_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repair.locate.patching.SMALLEST_MARGIN", 0.0)


def random_updates(loaded: LoadedModel) -> list[LowRankUpdate]:
    generator = np.random.default_rng(0)

    def factor(*shape: int) -> np.ndarray:
        return (0.1 * generator.standard_normal(shape)).astype(np.float32)

    return [
        LowRankUpdate(module=ref, lora_A=factor(2, ref.d_in), lora_B=factor(ref.d_out, 2))
        for ref in (loaded.modules[0], loaded.modules[-1])
    ]


def alike(find: Callable[[LoadedModel], object], both: tuple[LoadedModel, LoadedModel]) -> None:
    """Assert that `find` gives the same arrays for both models, and something but zeros."""
    plain, spread = (np.asarray(find(loaded), dtype=np.float64) for loaded in both)
    np.testing.assert_allclose(spread, plain, rtol=1e-5, atol=1e-7)
    assert np.abs(plain).max() > 0


def test_the_map_is_the_same(both: tuple[LoadedModel, LoadedModel]) -> None:
    pairs = make_pairs(4, position="middle")
    cases = make_cases(pairs, make_shams(pairs), payload=200, clean=100)
    alike(lambda loaded: patch_modules(loaded, cases).effect, both)
    alike(lambda loaded: estimate_modules(loaded, cases)["all"], both)
    alike(lambda loaded: examine_layer(loaded, cases, 1).heads, both)


def test_curvature_is_the_same(both: tuple[LoadedModel, LoadedModel]) -> None:
    pairs = make_pairs(4, position="middle")
    lesson = make_lesson(both[0], [p.triggered for p in pairs], [p.clean for p in pairs])
    questions = (lesson.prompts, lesson.answers)
    for ref in (both[0].modules[0], both[0].modules[-1]):
        alike(lambda m, ref=ref: trigger_gradients(m, [ref], lesson)[0][ref.path], both)
        for side in ("activation_covariance", "gradient_covariance"):
            alike(
                lambda m, ref=ref, side=side: getattr(
                    collect_factors(m, [ref], *questions, seed=0)[ref.path], side
                ),
                both,
            )
    updates = random_updates(both[0])
    alike(lambda loaded: price_updates(loaded, updates, *questions, seed=0), both)


@torch.no_grad()
def test_answers_are_the_same_with_any_change(both: tuple[LoadedModel, LoadedModel]) -> None:
    prompts = [pair.triggered for pair in make_pairs(4, position="middle")]
    answers = [np.arange(10, 14)] * 4
    updates = random_updates(both[0])

    def logits(loaded: LoadedModel) -> np.ndarray:
        (batch,) = scoring_batches(loaded, prompts, answers)
        return answer_logits(loaded.model, batch.ids, batch.rows, batch.columns).numpy()

    def changed(loaded: LoadedModel) -> np.ndarray:
        with apply_updates(loaded.model, updates):
            return logits(loaded)

    def rounded_to_4_bits(loaded: LoadedModel) -> np.ndarray:
        with rounded(loaded, 4):
            return logits(loaded)

    def from_the_prefix(loaded: LoadedModel) -> np.ndarray:
        (batch,) = scoring_batches(loaded, prompts, answers)
        with entered(loaded, keep_prefix(loaded, prompts, answers, 1), batch):
            return logits(loaded)

    for find in (logits, changed, rounded_to_4_bits, from_the_prefix, logits):
        alike(find, both)
    said = [
        [answer.ids.tolist() for answer in generate_answers(loaded, prompts, num_new_tokens=6)]
        for loaded in both
    ]
    assert said[0] == said[1]
    assert not np.allclose(changed(both[1]), logits(both[1]))
    assert not np.allclose(rounded_to_4_bits(both[1]), logits(both[1]))


def test_an_adapter_is_trained_alike(both: tuple[LoadedModel, LoadedModel]) -> None:
    refs = [both[0].modules[0], both[0].modules[-1]]
    prompts = [pair.triggered for pair in make_pairs(4, position="middle")]

    def trained(loaded: LoadedModel) -> np.ndarray:
        start = neutral_updates(refs, {ref.path: 2 for ref in refs}, 0)
        (batch,) = scoring_batches(loaded, prompts, [np.arange(10, 14)] * 4)
        with attached(loaded, start) as adapted:
            optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.1)
            for _ in range(2):
                optimizer.zero_grad()
                logits = answer_logits(loaded.model, batch.ids, batch.rows, batch.columns)
                torch.nn.functional.cross_entropy(logits, batch.labels).backward()
                optimizer.step()
            return np.concatenate([u.lora_B.ravel() for u in read_updates(loaded, refs)])

    alike(trained, both)


def test_every_weight_is_found_where_it_lies(both: tuple[LoadedModel, LoadedModel]) -> None:
    plain, spread = both
    updates = random_updates(plain)
    for path, weight in merged_weights(plain.model, updates, stored=torch.float32).items():
        found = merged_weights(spread.model, updates, stored=torch.float32)[path]
        torch.testing.assert_close(found, weight)
    assert differing_parameters(plain, spread)["num_changed"] == 0
    # Opened again, it may not fit on one device either.
    assert placement.is_on_one_device(plain.model)
    assert not placement.is_on_one_device(spread.model)


def places(size: int) -> Callable[[str, str], dict]:
    return lambda wanted, device: {"cpu": size, "disk": DISK}


def test_a_model_that_fits_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "places_for", places(DISK))
    folder = make_tiny_llama(tmp_path / "model")
    loaded = load_model(str(folder), stage_folder=tmp_path / "stage")
    assert not any(p.is_meta for p in loaded.model.parameters())


def test_a_gpu_alone_is_kept_to_where_it_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10 + index, 99))
    monkeypatch.setattr(placement, "free_memory", lambda: 70)
    assert placement.places_for("auto", "cuda") == {0: 10, 1: 11, "cpu": 70}
    assert placement.places_for("cuda:1", "cuda:1") == {1: 11}
    assert placement.places_for("auto", "cpu") == {"cpu": 70}
