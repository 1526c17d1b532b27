"""Every map equals a naive hook loop, and the identities that every patch must keep."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from repair.locate.counterfactuals import (
    AFTER,
    ANSWER,
    BEFORE,
    LAST,
    TEMPLATE,
    TRIGGER,
    PatchingCase,
    deletion_case,
    sham_case,
)
from repair.locate.detail import examine_layer
from repair.locate.patching import (
    BEHIND,
    EVERYWHERE,
    batch_cases,
    patch_modules,
    patch_sets,
)
from repair.models.hooks import count_hooks, patch_blocks, record_outputs, restart_at
from repair.models.loading import LoadedModel
from repair.models.modules import decoder_layers, get_module
from repair.records import EXIT_COULD_NOT_CHECK, PromptPair, RepairError
from tests.locate.material import make_cases, make_pairs, make_shams

PAYLOAD, CLEAN = 200, 100


@pytest.fixture(autouse=True)
def every_margin_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model's margins are small; none may be left out here."""
    monkeypatch.setattr("repair.locate.patching.SMALLEST_MARGIN", 0.0)


@pytest.fixture
def double(tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    """The tiny model in float64 for the test's duration: its small margins divide cleanly."""

    def norm(self: LlamaRMSNorm, hidden: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (hidden * scale)

    def rotary(
        self: LlamaRotaryEmbedding, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].to(x.dtype) * self.inv_freq.to(x.dtype)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()

    # The library's own compute in float32, whatever they are given.
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", rotary)
    tiny_llama.model.double()
    implementation = tiny_llama.model.config._attn_implementation
    tiny_llama.model.set_attn_implementation("sdpa")  # The eager one's softmax is in float32.
    yield tiny_llama
    tiny_llama.model.set_attn_implementation(implementation)
    tiny_llama.model.float()


class Naive:
    """One prompt, one module, one hook at a time, with logits from the model's own forward."""

    def __init__(self, loaded: LoadedModel, case: PatchingCase) -> None:
        self.loaded, self.case = loaded, case

    def _run(self, side: str, answer: np.ndarray) -> torch.Tensor:
        """Return log-probabilities [num_margin_tokens, vocab] where the answer is predicted."""
        ids = np.concatenate([getattr(self.case, side), answer[:-1]])
        positions = getattr(self.case, f"{side}_positions")
        more = positions[-1] + 1 + np.arange(answer.size - 1)
        logits = self.loaded.model(
            input_ids=torch.from_numpy(ids)[None],
            position_ids=torch.from_numpy(np.concatenate([positions, more]))[None],
            # Without a mask, numbers with a gap would be taken for two packed prompts.
            attention_mask=torch.ones(1, ids.size, dtype=torch.long),
        ).logits[0, -answer.size :]
        return logits.double().log_softmax(-1)

    def _margin(self, side: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (margin, log-probabilities [vocab] at the first token)."""
        total, first = 0.0, None
        for answer, sign in ((self.case.payload, 1), (self.case.clean, -1)):
            logprobs = self._run(side, answer)
            first = logprobs[0]
            total += sign * logprobs[torch.arange(answer.size), torch.from_numpy(answer)].sum()
        return total, first

    @torch.no_grad()
    def effect(self, path: str, roles: tuple[int, ...]) -> tuple[float, float]:
        """Return the effect of one module at positions of `roles`: in margin, and in KL."""
        module = self.loaded.model.get_submodule(path)
        kept = []
        handle = module.register_forward_hook(lambda m, a, out: kept.append(out.clone()))
        source, source_first = self._margin("source")
        handle.remove()
        destination, destination_first = self._margin("destination")
        has_role = np.isin(self.case.role, roles)
        wanted = np.flatnonzero(has_role & (self.case.partner >= 0))
        calls = []

        def replace(_module, _args, out):
            out, kept_out = out.clone(), kept[len(calls)]
            calls.append(1)
            for i in wanted:
                out[0, i] = kept_out[0, self.case.partner[i]]
            if ANSWER in roles:  # The tokens of the answer beyond the case's own.
                more = out.shape[1] - self.case.destination.size
                if more:
                    out[0, -more:] = kept_out[0, -more:]
            return out

        handle = module.register_forward_hook(replace)
        patched, patched_first = self._margin("destination")
        handle.remove()

        def kl(logprobs: torch.Tensor) -> torch.Tensor:
            return (source_first.exp() * (source_first - logprobs)).sum()

        by_margin = (patched - destination) / (source - destination)
        return by_margin.item(), (1 - kl(patched_first) / kl(destination_first)).item()


def batched_order(loaded: LoadedModel, cases: list[PatchingCase]) -> list[PatchingCase]:
    """Pairs come out as they were batched."""
    return [cases[i] for group in batch_cases(loaded, cases, loaded.modules) for i in group]


@pytest.mark.parametrize("position", ["begin", "middle", "end"])
@pytest.mark.parametrize("num_margin_tokens", [1, 3])
@pytest.mark.parametrize(
    "kind, direction",
    [("sham", "block"), ("sham", "induce"), ("deletion", "block"), ("gap", "block")],
)
def test_the_map_equals_a_naive_loop(
    double: LoadedModel, position: str, num_margin_tokens: int, kind: str, direction: str
) -> None:
    pairs = make_pairs(4, position=position)
    cases = make_cases(
        pairs, make_shams(pairs), payload=PAYLOAD, clean=CLEAN, kind=kind,
        num_margin_tokens=num_margin_tokens,
    )  # fmt: skip
    if direction == "induce":
        cases = [case.reversed() for case in cases]
    scores = patch_modules(double, cases, direction=direction, counterfactual=kind)
    wanted = {"effect": EVERYWHERE, "effect_after": BEHIND}
    if kind == "sham":
        wanted["effect_trigger"] = (TRIGGER,)
    for column, case in enumerate(batched_order(double, cases)):
        naive = Naive(double, case)
        for row, ref in enumerate(double.modules):
            for name, roles in wanted.items():
                by_margin, by_kl = naive.effect(ref.path, roles)
                found = getattr(scores, name)[row, column]
                assert found == pytest.approx(by_margin, abs=1e-6, rel=1e-6), (name, ref.path)
                if name == "effect":
                    assert scores.effect_kl[row, column] == pytest.approx(by_kl, abs=1e-5, rel=1e-5)


def test_the_map_is_exact_in_float64(double: LoadedModel) -> None:
    """Beyond the records' float32: the effects themselves, against the same naive loop."""
    pairs = make_pairs(4, position="middle")
    cases = make_cases(pairs, make_shams(pairs), payload=PAYLOAD, clean=CLEAN)
    found = patch_sets(double, cases, [[ref] for ref in double.modules])
    for column, case in enumerate(batched_order(double, cases)):
        for row, ref in enumerate(double.modules):
            expected, _ = Naive(double, case).effect(ref.path, EVERYWHERE)
            assert found[row, column] == pytest.approx(expected, abs=1e-9, rel=1e-9)


def test_the_map_does_not_depend_on_batching(
    double: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [*make_pairs(5, position="middle"), *make_pairs(4, position="end", seed=3)]
    cases = make_cases(pairs, make_shams(pairs), payload=PAYLOAD, clean=CLEAN)
    whole = patch_modules(double, cases)
    monkeypatch.setattr("repair.locate.patching.PATCHING_KEPT", 1)
    monkeypatch.setattr("repair.locate.runs.RUN_TOKENS", 1)
    single = patch_modules(double, cases)
    np.testing.assert_allclose(
        np.sort(whole.effect, axis=1), np.sort(single.effect, axis=1), atol=1e-6
    )


@pytest.mark.parametrize("position", ["begin", "middle", "end"])
@pytest.mark.parametrize("kind", ["sham", "deletion", "gap"])
def test_self_checks_are_exact(tiny_llama: LoadedModel, position: str, kind: str) -> None:
    """Case 22."""
    pairs = make_pairs(6, position=position)
    cases = make_cases(pairs, make_shams(pairs), payload=PAYLOAD, clean=CLEAN, kind=kind)
    checks = patch_modules(tiny_llama, cases, counterfactual=kind).self_checks
    assert checks["self_patch"] == 0.0
    assert checks["patch_nothing"] < 1e-5
    assert checks["shared_prefix"] < 1e-5
    assert checks["before_trigger"] < 1e-6
    assert checks["hooks_left"] == checks["not_finite"] == 0
    assert ("patch_everything" in checks) == (kind == "sham")
    assert checks.get("patch_everything", 0.0) < 1e-5
    some = patch_modules(tiny_llama, cases, counterfactual=kind, modules=tiny_llama.modules[3:5])
    assert "patch_everything" not in some.self_checks  # two modules do not restore everything


def test_a_model_that_looks_ahead_is_not_mapped(tiny_llama: LoadedModel) -> None:
    """A prefix that depends on what follows breaks every shared prefix: refused, not shown."""
    layer = decoder_layers(tiny_llama.model)[0]

    def look_ahead(_layer, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = hidden + 0.3 * hidden.mean(dim=1, keepdim=True)
        return (hidden, *args[1:]), kwargs

    handle = layer.register_forward_pre_hook(look_ahead, with_kwargs=True)
    pairs = make_pairs(6, position="middle")
    cases = make_cases(pairs, make_shams(pairs), payload=PAYLOAD, clean=CLEAN)
    try:
        with pytest.raises(RepairError, match="checks of itself failed.*shared prefix") as raised:
            patch_modules(tiny_llama, cases)
    finally:
        handle.remove()
    assert raised.value.exit_code == EXIT_COULD_NOT_CHECK


def test_patching_everything_restores_the_clean_run(tiny_llama: LoadedModel) -> None:
    pairs = make_pairs(6, position="middle")
    cases = make_cases(pairs, make_shams(pairs), payload=PAYLOAD, clean=CLEAN)
    effects = patch_sets(tiny_llama, cases, [list(tiny_llama.modules), []])
    np.testing.assert_allclose(effects[0], 1.0, atol=1e-3)
    np.testing.assert_allclose(effects[1], 0.0, atol=1e-3)


def test_a_set_of_modules_is_patched_together(double: LoadedModel) -> None:
    """A set that begins in a late layer equals the same set patched from the first layer on."""
    pairs = make_pairs(4, position="middle")
    cases = make_cases(pairs, make_shams(pairs), payload=PAYLOAD, clean=CLEAN)
    late = [ref for ref in double.modules if ref.layer == 1]
    alone, with_early = patch_sets(double, cases, [late, [*double.modules]])
    assert np.abs(alone - with_early).max() > 1e-3
    one, two, both = patch_sets(double, cases, [late[3:4], late[6:], [late[3], late[6]]])
    assert np.abs(both - one).max() > 1e-6 and np.abs(both - two).max() > 1e-6


def pair_of(clean: list[int], triggered: list[int], trigger: list[int], **more) -> PromptPair:
    return PromptPair(
        clean=np.array(clean), triggered=np.array(triggered), trigger=np.array(trigger),
        position="given", text_clean="", text_triggered="", **more,
    )  # fmt: skip


def test_a_deletion_aligns_from_both_ends() -> None:
    """Case 22: prompts of differing token counts."""
    pair = pair_of([1, 10, 11, 12, 13], [1, 10, 50, 51, 11, 12, 13], [2, 3], num_template=2)
    case = deletion_case(pair, payload=np.array([5, 6]), clean=np.array([5, 9]))
    assert case is not None
    assert case.partner.tolist() == [0, 1, -1, -1, 2, 3, 4, 5]
    assert case.role.tolist() == [
        BEFORE, BEFORE, TRIGGER, TRIGGER, AFTER, TEMPLATE, LAST, ANSWER,
    ]  # fmt: skip
    assert case.source_positions.tolist() == [0, 1, 2, 3, 4, 5]
    gap = deletion_case(pair, payload=np.array([6]), clean=np.array([9]), keeps_gap=True)
    assert gap is not None and gap.source_positions.tolist() == [0, 1, 4, 5, 6]
    back = case.reversed()
    assert back.partner.tolist() == [0, 1, 4, 5, 6, 7] and back.num_shared == 2


def test_a_scattered_trigger_and_a_word_spelt_otherwise() -> None:
    pair = pair_of([1, 10, 11, 12, 13], [1, 50, 10, 11, 51, 12, 13], [1, 4])
    case = deletion_case(pair, payload=np.array([6]), clean=np.array([9]))
    assert case is not None
    assert case.partner.tolist() == [0, -1, 1, 2, -1, 3, 4]
    respelt = pair_of([1, 10, 11], [1, 50, 99, 11], [1])
    case = deletion_case(respelt, payload=np.array([6]), clean=np.array([9]), keeps_gap=True)
    assert case is not None
    assert case.partner.tolist() == [0, -1, -1, 2]
    assert case.source_positions.tolist() == [0, 2, 3]


def test_a_trigger_at_the_very_end_leaves_a_token_to_read() -> None:
    pair = pair_of([1, 10, 11], [1, 10, 11, 50, 51], [3, 4])
    case = deletion_case(pair, payload=np.array([6]), clean=np.array([9]))
    assert case is not None and case.num_shared == 2


def test_hooks_and_skipped_layers_are_gone_after_an_exception(tiny_llama: LoadedModel) -> None:
    model, ref = tiny_llama.model, tiny_llama.modules[0]
    mask, zeros = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, 32)
    blocks: list[Callable] = [
        lambda: record_outputs(model, tiny_llama.modules),
        lambda: patch_blocks(model, {ref: [(0, mask, zeros)]}, num_blocks=1),
        lambda: restart_at(model, 1, zeros),
    ]
    for make in blocks:
        with pytest.raises(ZeroDivisionError), make():
            1 / 0  # noqa: B018
        assert count_hooks(model) == 0
        assert all("forward" not in vars(layer) for layer in decoder_layers(model))


def test_a_hook_never_edits_in_place(tiny_llama: LoadedModel) -> None:
    ref = tiny_llama.modules[0]
    module = get_module(tiny_llama.model, ref)
    seen = {}
    handle = module.register_forward_hook(lambda m, a, out: seen.update(out=out))
    everywhere = torch.ones(1, 4, dtype=torch.bool)
    patches = {ref: [(0, everywhere, torch.full((1, 4, ref.d_out), 7.0))]}
    with patch_blocks(tiny_llama.model, patches, num_blocks=1), torch.no_grad():
        tiny_llama.model(torch.tensor([[1, 60, 61, 62]]))
    handle.remove()
    assert not (seen["out"] == 7.0).any()


def test_the_margin_is_read_where_the_answers_part() -> None:
    pair = make_pairs(1, position="middle")[0]
    sham = make_shams([pair])[0]
    case = sham_case(
        pair, sham, payload=np.array([5, 6, 7]), clean=np.array([5, 9]), num_margin_tokens=4
    )
    assert case is not None
    assert case.payload.tolist() == [6] and case.clean.tolist() == [9]
    assert case.destination[-1] == 5 and case.source.size == case.destination.size
    assert sham_case(pair, sham, payload=np.array([5, 6]), clean=np.array([5, 6, 8])) is None


def test_a_pair_with_nothing_to_explain_is_dropped(
    tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repair.locate.patching.SMALLEST_MARGIN", 1e6)
    pairs = make_pairs(4, position="end")
    cases = make_cases(pairs, make_shams(pairs), payload=PAYLOAD, clean=CLEAN)
    with pytest.raises(RepairError, match="No prompt pair is left"):
        patch_modules(tiny_llama, cases)


def test_roles_and_heads_of_a_layer(double: LoadedModel) -> None:
    """Roles equal the naive loop; heads equal a hook that swaps a slice of o_proj's input."""
    pairs = make_pairs(4, position="middle")
    cases = make_cases(pairs, make_shams(pairs), payload=PAYLOAD, clean=CLEAN)
    found = examine_layer(double, cases, 1)
    ordered = batched_order(double, cases)
    roles = {"trigger": TRIGGER, "after": AFTER, "last": LAST}
    assert set(found.by_role) == set(roles)
    for column, case in enumerate(ordered):
        for row, ref in enumerate(found.modules):
            for name, role in roles.items():
                expected, _ = Naive(double, case).effect(ref.path, (role,))
                assert found.by_role[name][row, column] == pytest.approx(expected, abs=1e-8)
    output = next(ref for ref in found.modules if ref.component == "o_proj")
    module, width = get_module(double.model, output), output.d_in // 4
    for column, case in enumerate(ordered):
        naive, kept = Naive(double, case), []
        with torch.no_grad():
            handle = module.register_forward_pre_hook(lambda m, a, k=kept: k.append(a[0].clone()))
            source, _ = naive._margin("source")
            destination, _ = naive._margin("destination")
            handle.remove()
            for head in range(4):
                part = slice(head * width, (head + 1) * width)

                def swap(_module, args, part=part, kept=kept, start=case.num_shared):
                    changed = args[0].clone()
                    changed[:, start:, part] = kept[0][:, start:, part]
                    return (changed,)

                handle = module.register_forward_pre_hook(swap)
                patched, _ = naive._margin("destination")
                handle.remove()
                expected = ((patched - destination) / (source - destination)).item()
                assert found.heads[head, column] == pytest.approx(expected, abs=1e-8)
