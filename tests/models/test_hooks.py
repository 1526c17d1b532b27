"""Weights swapped for a while: what an export would hold, measured before it is written."""

import numpy as np
import pytest
import torch

from repair.models.hooks import apply_updates, change_of, merged_weights, swap_weights
from repair.models.modules import find_modules
from repair.records import LowRankUpdate
from tests.tiny import build_tiny


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_merged_weights_are_rounded_once_and_given_back(
    model_type: str, stored: torch.dtype
) -> None:
    model = build_tiny(model_type)
    ref = find_modules(model)[1]
    generator = np.random.default_rng(0)
    update = LowRankUpdate(
        module=ref,
        lora_A=generator.normal(0, 0.2, (2, ref.d_in)).astype(np.float32),
        lora_B=generator.normal(0, 0.2, (ref.d_out, 2)).astype(np.float32),
    )
    weight = model.get_submodule(ref.path).weight
    kept = weight.detach().clone()
    merged = merged_weights(model, [update], stored=stored)
    delta = torch.from_numpy(update.lora_B @ update.lora_A)
    delta = delta.T if model_type == "gpt2" else delta
    assert torch.equal(merged[ref.path], (kept + delta).to(stored).float())
    ids = torch.tensor([[1, 60, 61, 62]])
    with torch.no_grad():
        before = model(ids).logits
        with apply_updates(model, [update]):
            applied = model(ids).logits
        with swap_weights(model, merged):
            swapped = model(ids).logits
        with pytest.raises(ZeroDivisionError), swap_weights(model, merged):
            1 / 0  # noqa: B018
        assert torch.equal(model(ids).logits, before)
    assert torch.equal(weight, kept)
    assert (applied - before).abs().max() > 1e-2
    tolerance = 1e-4 if stored == torch.float32 else 0.1
    torch.testing.assert_close(swapped, applied, atol=tolerance, rtol=tolerance)


def test_how_an_update_lies_in_memory_changes_no_bit() -> None:
    """A resumed run has its updates from a file; one that was never interrupted computed them."""
    model = build_tiny("llama")
    ref = find_modules(model)[1]
    generator = np.random.default_rng(1)
    lora_A = generator.standard_normal((3, ref.d_in)).astype(np.float32)
    lora_B = generator.standard_normal((ref.d_out, 3)).astype(np.float32)

    def shifted(array: np.ndarray) -> np.ndarray:
        room = np.zeros(array.nbytes + 4, dtype=np.uint8)[4:]
        found = room.view(np.float32).reshape(array.shape)
        found[:] = array
        return found

    ids = torch.arange(1, 40)[None]
    found = []
    for lay in (np.ascontiguousarray, np.asfortranarray, shifted):
        update = LowRankUpdate(module=ref, lora_A=lay(lora_A), lora_B=lay(lora_B))
        assert update.lora_A.flags.c_contiguous and update.lora_B.flags.c_contiguous
        with torch.no_grad(), apply_updates(model, [update]):
            logits = model(ids).logits
        found.append((logits, change_of(update)))
    for logits, change in found[1:]:
        assert torch.equal(logits, found[0][0]) and torch.equal(change, found[0][1])
