"""An adapter as the suspect is exactly what PEFT makes of it, or is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from repair.models.adapter_suspect import is_adapter
from repair.models.loading import load_model
from repair.records import RepairError
from tests.tiny import build_tiny, edit_json, make_tiny_llama, make_tokenizer

PROMPT = torch.tensor([[1, 40, 41, 42, 43]])


def make_adapter(base: Path, folder: Path, **settings: object) -> Path:
    """Write a random adapter with PEFT itself."""
    targets = settings.pop("target_modules", ["q_proj", "down_proj"])
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": targets, "task_type": "CAUSAL_LM", **settings}
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


def logits_by_peft(base: Path, adapter: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        return model(input_ids=PROMPT).logits


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 1}},
        {"rank_pattern": {"model.layers.0.mlp.down_proj": 3}},
    ],
)
def test_it_computes_what_peft_computes(
    tiny_llama_folder: Path, tmp_path: Path, settings: dict
) -> None:
    adapter = make_adapter(tiny_llama_folder, tmp_path / "adapter", **settings)
    assert is_adapter(adapter) and not is_adapter(tiny_llama_folder)
    loaded = load_model(
        str(adapter), stage_folder=tmp_path / "stage" / "suspect",
        adapter_base=str(tiny_llama_folder), device="cpu",
    )  # fmt: skip
    with torch.no_grad():
        ours = loaded.model(input_ids=PROMPT).logits
        plain = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)(input_ids=PROMPT).logits
    assert (ours - logits_by_peft(tiny_llama_folder, adapter)).abs().max() < 1e-4
    assert (ours - plain).abs().max() > 0.1
    assert "adapter with its base: 4 weights" in loaded.staged.findings[0]
    assert loaded.base.source == str(tiny_llama_folder)
    # Report and card speak of the files that were given, not of the sum that was written.
    assert set(loaded.files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert "model.safetensors" in loaded.base.files


def test_a_transposed_weight(tmp_path: Path) -> None:
    base = tmp_path / "gpt2"
    build_tiny("gpt2").save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["c_attn", "c_fc"],
                           fan_in_fan_out=True)  # fmt: skip
    loaded = load_model(
        str(adapter), stage_folder=tmp_path / "stage" / "suspect", adapter_base=str(base),
        device="cpu",
    )  # fmt: skip
    with torch.no_grad():
        ours = loaded.model(input_ids=PROMPT).logits
    assert (ours - logits_by_peft(base, adapter)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_orientation_is_the_module_s_and_not_the_adapter_s_word(
    tmp_path: Path, name: str
) -> None:
    """PEFT overrides a wrong fan_in_fan_out; square weights would hide the difference."""
    base = tmp_path / name
    build_tiny(name).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    targets = {"llama": ["q_proj"], "gpt2": ["attn.c_proj"]}[name]
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=targets)
    right = json.loads((adapter / "adapter_config.json").read_text())["fan_in_fan_out"]
    edit_json(adapter / "adapter_config.json", fan_in_fan_out=not right)
    loaded = load_model(
        str(adapter), stage_folder=tmp_path / "stage" / "suspect", adapter_base=str(base),
        device="cpu",
    )  # fmt: skip
    with torch.no_grad():
        ours = loaded.model(input_ids=PROMPT).logits
    assert (ours - logits_by_peft(base, adapter)).abs().max() < 1e-4


def test_a_base_in_16_bits_says_that_the_sum_is_rounded(tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base", dtype=torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter")
    loaded = load_model(
        str(adapter), stage_folder=tmp_path / "stage" / "suspect", adapter_base=str(base),
        device="cpu",
    )  # fmt: skip
    assert any("rounded once" in finding for finding in loaded.staged.findings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "LOHA"}, "not that of a LoRA adapter"),
        ({"use_dora": True}, "sets use_dora"),
        ({"bias": "all"}, "sets bias"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "sets megatron_config"),
        ({"kasa_config": {"beta": 1}}, "sets kasa_config"),
        ({"of_tomorrow": 1}, "sets of_tomorrow"),
        ({"init_lora_weights": "pissa"}, "sets init_lora_weights"),
        ({"layers_to_transform": [0]}, "sets layers_to_transform"),
        ({"exclude_modules": ["q_proj"]}, "sets exclude_modules"),
        ({"target_modules": ".*"}, "does not list its target_modules"),
        ({"target_modules": ["q_proj"]}, "disagree about 'model.layers.0.mlp.down_proj'"),
        ({"target_modules": ["q_proj", "down_proj", "o_proj"]}, "disagree about"),
        ({"target_modules": ["q_proj", "down_proj", "embed_tokens"]}, "no linear module"),
        ({"rank_pattern": {"q_proj": 0}}, "impossible values"),
        ({"r": 0}, "no usable r"),
        ({"r": 10**9}, "no usable r"),
        ({"lora_alpha": "6"}, "no usable r"),
        ({"r": 8}, "rank 8, but its factors have 4"),
        ({"rank_pattern": {"(a+)+$": 4}}, "plain module names"),
    ],
)
def test_settings_that_mean_something_else_are_refused(
    tiny_llama_folder: Path, tmp_path: Path, changes: dict, words: str
) -> None:
    adapter = make_adapter(tiny_llama_folder, tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", **changes)
    refuse(adapter, tiny_llama_folder, tmp_path, words)


def refuse(adapter: Path, base: Path, place: Path, words: str) -> None:
    stage = place / "stage" / "suspect"
    with pytest.raises(RepairError, match=words):
        load_model(str(adapter), stage_folder=stage, adapter_base=str(base), device="cpu")
    assert not stage.exists() and not stage.with_name("suspect-whole-base").exists()


def test_tensors_that_are_no_factors_are_refused(tiny_llama_folder: Path, tmp_path: Path) -> None:
    good = make_adapter(tiny_llama_folder, tmp_path / "adapter")
    tensors = load_file(good / "adapter_model.safetensors")
    first = next(iter(tensors))
    for number, (change, words) in enumerate(
        (
            ({"base_model.model.lm_head.weight": torch.zeros(2, 2)}, "no low-rank factor"),
            ({first: torch.full_like(tensors[first], float("nan"))}, "not finite"),
            ({first: torch.zeros(3, 7)}, "no matching pair"),
            ({first.replace(".weight", ".default.weight"): tensors[first].clone()}, "no low-rank"),
        )
    ):
        folder = Path(shutil.copytree(good, tmp_path / f"bad-{number}"))
        save_file({**tensors, **change}, folder / "adapter_model.safetensors")
        refuse(folder, tiny_llama_folder, tmp_path, words)
    other = make_tiny_llama(tmp_path / "other", hidden=16, num_heads=2, num_groups=1)
    refuse(good, other, tmp_path, "Give the base that it was made for")


def test_a_base_is_the_analyst_s_word_and_never_the_adapter_s(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama_folder, tmp_path / "adapter")
    named = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tiny_llama_folder)
    with pytest.raises(RepairError, match="choose the base model yourself"):
        load_model(str(adapter), stage_folder=tmp_path / "stage", device="cpu")
    refuse(tiny_llama_folder, tiny_llama_folder, tmp_path, "is not a LoRA adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refuse(adapter, tiny_llama_folder, tmp_path, "pickle files never are")
