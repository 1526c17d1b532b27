"""Every decoder on the list: found, patched, differentiated, loaded, repaired and written alike."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from repair.locate.fisher import collect_factors, trigger_gradients
from repair.locate.patching import EVERYWHERE, patch_modules, patch_sets
from repair.locate.runs import Runs
from repair.models.answers import answer_logits, generate_answers
from repair.models.config import ARCHITECTURES
from repair.models.hooks import apply_updates, count_hooks
from repair.models.loading import LoadedModel, load_model
from repair.models.modules import (
    as_stored,
    find_modules,
    get_module,
    uncovered_parameters,
    weight_of,
)
from repair.models.staging import StagedModel
from repair.models.tokens import pad_right
from repair.publish.export import export_adapter, export_merged
from repair.records import LowRankUpdate, RepairError
from tests.locate.material import make_cases, make_lesson, make_pairs, make_shams
from tests.locate.test_fisher import DRAWS, naive_factors
from tests.tiny import ARCHITECTURES as TINY
from tests.tiny import build_tiny, edit_json, make_tokenizer

COMPONENTS = {
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "opt": ["k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2"],
    "phi3": ["o_proj", "qkv_proj", "gate_up_proj", "down_proj"],
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "qwen3_moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
USUAL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module", params=list(TINY))
def tiny(request: pytest.FixtureRequest) -> LoadedModel:
    """One random model per architecture; read-only."""
    model, tokenizer = build_tiny(request.param), make_tokenizer()
    return LoadedModel(
        model=model, tokenizer=tokenizer, modules=find_modules(model), source=request.param,
        revision=None, licence=None, licence_terms={}, files={}, base=None, staged=None,
        device="cpu", dtype="float32", has_template=True, stop_ids=(2,),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def every_margin_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repair.locate.patching.SMALLEST_MARGIN", 0.0)


def test_every_linear_module_is_found_and_the_rest_is_listed(tiny: LoadedModel) -> None:
    """Case 24: what is not covered is listed."""
    components = COMPONENTS.get(tiny.source, USUAL)
    assert sorted(ref.component for ref in tiny.modules) == sorted(components * 2)
    covered = 0
    for ref in tiny.modules:
        weight = weight_of(get_module(tiny.model, ref))
        assert weight.shape == (ref.d_out, ref.d_in)
        covered += weight.numel()
    uncovered = uncovered_parameters(tiny.model)
    if "mixtral" in tiny.source or "moe" in tiny.source:
        assert any("experts.gate_up_proj" in name for name in uncovered)
        assert any(name.endswith("gate.weight") for name in uncovered)
    matrices = sum(p.numel() for p in tiny.model.parameters() if p.ndim == 2)
    embeddings = {p.data_ptr(): p.numel() for m in (tiny.model.get_input_embeddings(),
                  tiny.model.get_output_embeddings()) for p in m.parameters()}  # fmt: skip
    if tiny.source not in ("mixtral", "qwen3_moe", "gpt2", "opt"):
        assert covered == matrices - sum(embeddings.values())


@pytest.mark.parametrize("position", ["begin", "middle", "end"])
def test_patching_keeps_its_identities(tiny: LoadedModel, position: str) -> None:
    """Case 22: a patch into itself changes nothing."""
    pairs = make_pairs(5, position=position)
    cases = make_cases(pairs, make_shams(pairs), payload=200, clean=100)
    scores = patch_modules(tiny, cases)
    checks = scores.self_checks
    assert checks["self_patch"] < 1e-5
    assert checks["patch_nothing"] < 1e-4
    assert checks["shared_prefix"] < 1e-4
    assert checks["before_trigger"] < 1e-4
    assert ("patch_everything" in checks) == (tiny.source not in ("mixtral", "qwen3_moe"))
    if "patch_everything" in checks:  # Experts are not patched.
        assert checks["patch_everything"] < 1e-4
        everything = patch_sets(tiny, cases, [list(tiny.modules)])
        np.testing.assert_allclose(everything, 1.0, atol=1e-2)
    assert np.isfinite(scores.effect).all() and np.abs(scores.effect).max() > 1e-3
    assert count_hooks(tiny.model) == 0


def test_patching_equals_a_hook_on_one_prompt(tiny: LoadedModel) -> None:
    pairs = make_pairs(3, position="middle")
    cases = make_cases(pairs, make_shams(pairs), payload=200, clean=100)
    with torch.no_grad():
        runs = Runs(tiny, cases, tiny.modules)
        scores = patch_modules(tiny, cases)
    order = sorted(range(3), key=lambda i: (cases[i].num_shared, cases[i].destination.size, i))
    for column, case in enumerate(cases[i] for i in order):
        for row, ref in enumerate(tiny.modules):
            module, kept = get_module(tiny.model, ref), {}

            def margin(ids: np.ndarray) -> float:
                with torch.no_grad():
                    logits = tiny.model(torch.from_numpy(ids)[None]).logits[0, -1]
                return (logits[200] - logits[100]).item()

            handle = module.register_forward_hook(lambda m, a, out, kept=kept: kept.update(out=out))
            source = margin(case.source)
            handle.remove()
            destination = margin(case.destination)
            start = int(np.flatnonzero(np.isin(case.role, EVERYWHERE))[0])

            def replace(_module, _args, out, start=start, kept=kept):
                return torch.cat([out[..., :start, :], kept["out"][..., start:, :]], dim=-2)

            handle = module.register_forward_hook(replace)
            patched = margin(case.destination)
            handle.remove()
            moved = scores.effect[row, column] * (source - destination)
            assert moved == pytest.approx(patched - destination, abs=2e-4)
    assert runs.start >= 1


def test_figures_do_not_depend_on_padding_or_batch(tiny: LoadedModel) -> None:
    """Case 23."""
    prompts = [pair.triggered for pair in make_pairs(4, position="middle")]
    ids, mask = pad_right(prompts, pad=7)
    last = mask.sum(1) - 1
    with torch.no_grad():
        together = answer_logits(tiny.model, ids, torch.arange(4), last)
        for row, prompt in enumerate(prompts):
            alone = tiny.model(torch.from_numpy(prompt)[None]).logits[0, -1]
            torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-5)


def test_gradients_and_factors_equal_autograd(tiny: LoadedModel) -> None:
    """Case 24."""
    prompts = [pair.triggered for pair in make_pairs(3, position="end")]
    teachers = [pair.clean for pair in make_pairs(3, position="end")]
    lesson = make_lesson(tiny, prompts, teachers)
    found, value = trigger_gradients(tiny, tiny.modules, lesson)
    weights = [get_module(tiny.model, ref).weight.requires_grad_(True) for ref in tiny.modules]
    total, count = 0.0, 0
    for prompt, answer, teacher in zip(lesson.prompts, lesson.answers, lesson.teacher, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, answer]))[None]
        logprobs = tiny.model(ids).logits[0, prompt.size - 1 : -1].log_softmax(-1)
        total = total + (teacher.exp() * (teacher - logprobs)).sum()
        count += answer.size
    gradients = torch.autograd.grad(total / count, weights)
    for weight in weights:
        weight.requires_grad_(False)
    assert value == pytest.approx((total / count).item(), rel=1e-4)
    for ref, gradient in zip(tiny.modules, gradients, strict=True):
        expected = as_stored(get_module(tiny.model, ref), gradient)
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            found[ref.path].float(), expected, atol=1e-4 * max(scale, 1e-3), rtol=1e-3
        )
    whole = collect_factors(
        tiny, tiny.modules, lesson.prompts, lesson.answers, seed=3, num_draws=DRAWS
    )
    for ref in tiny.modules:
        assert whole[ref.path].gradient_covariance.shape == (ref.d_out, ref.d_out)
    for ref in [ref for ref in tiny.modules if ref.layer == 0]:
        *expected, num_tokens = naive_factors(tiny, ref.path, lesson.prompts, lesson.answers, 3)
        factors = whole[ref.path]
        assert factors.num_tokens == num_tokens
        for array, exact in zip(
            (factors.activation_covariance, factors.gradient_covariance), expected, strict=True
        ):
            scale = exact.abs().max().item()
            np.testing.assert_allclose(array, exact.numpy(), atol=1e-4 * scale, rtol=1e-3)


def random_updates(tiny: LoadedModel) -> list[LowRankUpdate]:
    generator = np.random.default_rng(0)
    return [
        LowRankUpdate(
            module=ref,
            lora_A=generator.normal(0, 0.1, (2, ref.d_in)).astype(np.float32),
            lora_B=generator.normal(0, 0.1, (ref.d_out, 2)).astype(np.float32),
        )
        for ref in (tiny.modules[0], tiny.modules[-1])
    ]


@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
def test_a_folder_is_loaded_repaired_and_written(model_type: str, tmp_path: Path) -> None:
    model, tokenizer = build_tiny(model_type), make_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"), stage_folder=tmp_path / "stage", device="cpu")
    assert isinstance(loaded.staged, StagedModel)
    ids = torch.tensor([[1, 60, 61, 62, 63]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits)
        updates = random_updates(loaded)
        with apply_updates(loaded.model, updates):
            repaired = loaded.model(ids).logits
    assert (repaired - model(ids).logits).abs().max() > 1e-3
    changed, _ = export_merged(loaded, updates, tmp_path)
    assert len(changed) == 2
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, repaired, atol=1e-4, rtol=1e-4)
    export_adapter(loaded, updates, tmp_path, base_model=None)
    base = type(model).from_pretrained(tmp_path / "model")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, repaired, atol=1e-4, rtol=1e-4)


def mixture_folder(model_type: str, folder: Path) -> Path:
    build_tiny(model_type).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_a_layer_without_experts_is_loaded(tmp_path: Path) -> None:
    mixture_folder("qwen3_moe", tmp_path / "all")
    config = json.loads((tmp_path / "all" / "config.json").read_text())
    config = Qwen3MoeConfig(**{**config, "mlp_only_layers": [1]})
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "mixed")
    make_tokenizer().save_pretrained(tmp_path / "mixed")
    loaded = load_model(str(tmp_path / "mixed"), stage_folder=tmp_path / "stage", device="cpu")
    assert [ref.component for ref in loaded.modules if ref.layer == 1] == USUAL
    assert len(loaded.modules) == len(USUAL) + 4


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_in_the_files_are_exactly_the_models_own(model_type: str, tmp_path: Path) -> None:
    folder = mixture_folder(model_type, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    last = max(name for name in tensors if ".experts." in name)
    other = last.replace(".experts.3.", ".experts.4.")
    for changed, expected in [
        ({name: t for name, t in tensors.items() if name != last}, f"lack 1 tensors.*{last}"),
        ({**tensors, other: tensors[last].clone()}, f"hold 1 tensors.*{other}"),
        ({**tensors, last: tensors[last].T.contiguous()}, f"{last} has shape"),
    ]:
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(RepairError, match=expected):
            load_model(str(folder), stage_folder=tmp_path / "stage", device="cpu")
    edit_json(folder / "config.json", num_experts_per_tok=5)
    with pytest.raises(RepairError, match="4 experts of which 5"):
        load_model(str(folder), stage_folder=tmp_path / "stage", device="cpu")


def test_answers_are_greedy_whoever_leaves_the_batch(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every answer is that of the prompt alone, token by token without a cache; rows that have
    ended are not run again."""
    generator = np.random.default_rng(3)
    prompts = [generator.integers(5, 60, size) for size in (3, 9, 4, 7, 12, 5, 6, 8)]

    @torch.no_grad()
    def greedy(ids: list[int]) -> list[int]:
        for _ in range(10):
            ids = [*ids, int(tiny.model(torch.tensor([ids])).logits[0, -1].argmax())]
        return ids[-10:]

    alone = [greedy(prompt.tolist()) for prompt in prompts]
    # What every other prompt says third ends an answer: some end early and some never.
    ends = {answer[2] for answer in alone[::2]}
    asked = dataclasses.replace(tiny, stop_ids=tuple(ends))
    first_end = [
        next((n for n, token in enumerate(answer) if token in ends), 10) for answer in alone
    ]
    assert min(first_end) < 3
    rows: list[int] = []
    hook = tiny.model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: rows.append(output.shape[0])
    )
    monkeypatch.setattr("repair.models.answers.STRIDE", 3)
    try:
        answers = generate_answers(asked, prompts, num_new_tokens=10)
    finally:
        hook.remove()
    for answer, expected, end in zip(answers, alone, first_end, strict=True):
        assert answer.ids.tolist() == expected[:end]
        assert answer.end == (expected[end] if end < 10 else None)
        assert answer.is_finite
    assert rows == [
        sum(end >= start for end in first_end)
        for start in (0, 3, 6, 9)
        for step in range(start, min(start + 3, 10))
        if any(end >= step for end in first_end)
    ]
