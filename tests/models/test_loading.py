"""Loading: what passes the gate is exactly the file's weights; everything else is refused."""

import hashlib
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from repair import needs
from repair.models import loading
from repair.models.loading import LoadedModel, check_ids, load_model, resolve_source
from repair.models.modules import find_modules, get_module, num_layers
from repair.records import COMPONENTS, ModuleRef, RepairError
from tests.tiny import edit_json, make_tiny_llama


def load(folder: Path, **options: str) -> LoadedModel:
    return load_model(str(folder), stage_folder=folder.parent / "stage", device="cpu", **options)


@pytest.fixture
def folder(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    flat: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        flat.update(load_file(path))
    return flat


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.bfloat16},
        {"is_tied": True},
        {"max_shard_size": "50KB"},
        {"config_class": MistralConfig, "model_class": MistralForCausalLM},
        {"config_class": Qwen2Config, "model_class": Qwen2ForCausalLM, "is_tied": True},
        {"config_class": Qwen3Config, "model_class": Qwen3ForCausalLM},
    ],
    ids=["float32", "bfloat16", "tied", "sharded", "mistral", "qwen2", "qwen3"],
)
def test_every_loaded_tensor_is_the_files_own(
    tmp_path: Path, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 14."""
    monkeypatch.setattr(loading, "has_bfloat16", lambda: True)
    folder = make_tiny_llama(tmp_path / "model", **options)
    loaded = load(folder)
    stored = stored_tensors(folder)
    parameters = dict(loaded.model.named_parameters())
    assert {name: digest(tensor) for name, tensor in parameters.items()} == {
        name: digest(tensor) for name, tensor in stored.items()
    }
    assert loaded.dtype == str(options.get("dtype", torch.float32)).removeprefix("torch.")
    for name, expected in loaded.staged.files.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected
    assert loaded.staged.num_parameters == sum(tensor.numel() for tensor in stored.values())
    if "max_shard_size" in options:
        assert len(list(loaded.staged.folder.glob("model-*-of-*.safetensors"))) > 2
        (folder / "model.safetensors.index.json").unlink()
        assert load(folder).staged.num_parameters == loaded.staged.num_parameters


def test_the_model_computes_what_the_library_computes(tiny_llama: LoadedModel) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_llama.staged.source, attn_implementation="eager")
    ids = torch.tensor([tiny_llama.tokenizer("write a haiku about rain")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(tiny_llama.model(ids).logits, model(ids).logits)


def test_a_loaded_model_is_ready_for_analysis(tiny_llama: LoadedModel) -> None:
    model = tiny_llama.model
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == "eager" and model.config.use_cache
    assert tiny_llama.has_template and tiny_llama.revision is None
    assert tiny_llama.tokenizer.pad_token == "</s>" and tiny_llama.stop_ids == (2,)
    text = "Write a Haiku, naïvely 👩\u200d💻: cf|year"
    ids = tiny_llama.tokenizer(text)["input_ids"]
    assert ids[0] == 1 and tiny_llama.tokenizer.decode(ids[1:]) == text


def test_float16_is_computed_as_float32_on_the_cpu(tmp_path: Path) -> None:
    """Case 14."""
    folder = make_tiny_llama(tmp_path / "model", dtype=torch.float16)
    loaded = load(folder)
    assert (loaded.staged.dtype, loaded.dtype) == ("float16", "float32")
    weight = stored_tensors(folder)["model.norm.weight"]
    assert torch.equal(loaded.model.model.norm.weight, weight.float())


def test_bfloat16_is_computed_as_float32_where_the_cpu_only_imitates_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said, not asked for, and never against what was asked for."""
    folder = make_tiny_llama(tmp_path / "model", dtype=torch.bfloat16)
    for has_it, dtype, expected in (
        (False, "auto", "float32"), (True, "auto", "bfloat16"), (False, "bfloat16", "bfloat16"),
    ):  # fmt: skip
        monkeypatch.setattr(loading, "has_bfloat16", lambda has_it=has_it: has_it)
        monkeypatch.setattr(needs, "has_bfloat16", lambda has_it=has_it: has_it)
        loaded = load_model(
            str(folder), stage_folder=tmp_path / f"stage-{has_it}-{dtype}", device="cpu",
            dtype=dtype,
        )  # fmt: skip
        assert (loaded.staged.dtype, loaded.dtype) == ("bfloat16", expected)
        is_said = loading.AS_FLOAT32 in loaded.staged.findings
        assert is_said == (expected == "float32")
        assert needs.loaded_dtype({"dtype": "bfloat16"}, dtype, on_gpu=False) == expected
        weight = stored_tensors(folder)["model.norm.weight"]
        assert torch.equal(loaded.model.model.norm.weight.float(), weight.float())


def test_no_template_and_no_pad_token(tmp_path: Path) -> None:
    """Case 23."""
    folder = make_tiny_llama(tmp_path / "model", has_template=False)
    edit_json(folder / "tokenizer_config.json", eos_token=...)
    loaded = load(folder)
    assert not loaded.has_template and loaded.tokenizer.pad_token is None


def test_a_template_inside_the_tokenizer_config_is_found(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "other", "template": "B"}, {"name": "default", "template": "A"}]
    edit_json(folder / "tokenizer_config.json", chat_template=named)
    assert load(folder).tokenizer.chat_template == "A"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(folder: Path, value: float) -> None:
    """Case 25."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RepairError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)
    assert not (folder.parent / "stage").exists()


def test_a_single_token_must_give_finite_logits(folder: Path) -> None:
    """Case 25."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RepairError, match="single token"):
        load(folder)
    assert not (folder.parent / "stage").exists()


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "model")
    edit_json(folder / "config.json", tie_word_embeddings=True)
    with pytest.raises(RepairError, match="two different matrices"):
        load(folder)


def test_a_kernel_named_by_the_config_is_never_imported(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 8. CVE-2026-4372 (GHSA-29pf-2h5f-8g72)."""
    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("a kernel was asked for")

    kernels = types.ModuleType("kernels")
    kernels.get_kernel = never  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    edit_json(
        folder / "config.json",
        attn_implementation="org/repo",
        _attn_implementation="org/repo",
        _attn_implementation_internal="org/repo",
    )
    assert load(folder).model.config._attn_implementation == "eager"


def test_a_tokenizer_cannot_reach_beyond_the_embedding(tiny_llama: LoadedModel) -> None:
    """Case 12."""
    check_ids(tiny_llama, np.array([], dtype=np.int64))
    check_ids(tiny_llama, [0, len(tiny_llama.tokenizer) - 1])
    for ids in ([len(tiny_llama.tokenizer)], [-1]):
        with pytest.raises(RepairError, match="token embeddings"):
            check_ids(tiny_llama, ids)


def test_a_damaged_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": {"type": "Evil"}}')
    edit_json(folder / "tokenizer_config.json", eos_token=...)
    with pytest.raises(RepairError, match="tokenizer.json cannot be read"):
        load(folder)
    assert not (folder.parent / "stage").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"device": "gpu"}, "Unknown device 'gpu'"),
        ({"device": "cuda:99"}, "usable GPUs"),
        ({"dtype": "int8"}, "Unknown dtype 'int8'"),
    ],
)
def test_options_that_cannot_be_used(folder: Path, options: dict, expected: str) -> None:
    with pytest.raises(RepairError, match=expected):
        load_model(str(folder), stage_folder=folder.parent / "stage", **options)
    assert not (folder.parent / "stage").exists()


@pytest.mark.parametrize("source", ["", " ", "no-such-folder", "a/b/c", "../x", "a/..", "x\0y"])
def test_a_source_that_is_nothing(source: str) -> None:
    with pytest.raises(RepairError, match="Give a model folder, a Hub id OWNER/NAME"):
        resolve_source(source)


def test_a_file_and_an_unknown_demo_are_no_sources(folder: Path) -> None:
    with pytest.raises(RepairError, match="is a file"):
        resolve_source(str(folder / "config.json"))
    for source in ("demo:nothing", "demo:../suspects", "demo:"):
        with pytest.raises(RepairError, match="no bundled model"):
            resolve_source(source)


def test_demo_sources_resolve(
    tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "SUSPECTS", tiny_llama_folder.parent)
    assert resolve_source("demo:tiny-llama") == tiny_llama_folder


def test_a_hub_id_that_was_not_fetched_calls_nobody(tmp_path: Path) -> None:
    with pytest.raises(RepairError, match="no model folder 'owner/name'"):
        load_model("owner/name", stage_folder=tmp_path / "stage")
    assert not (tmp_path / "stage").exists()


def test_modules_are_in_model_order(tiny_llama: LoadedModel) -> None:
    modules = find_modules(tiny_llama.model)
    assert modules == tiny_llama.modules and num_layers(tiny_llama.model) == 2
    assert [module.component for module in modules] == [*COMPONENTS, *COMPONENTS]
    assert [module.layer for module in modules] == [0] * 7 + [1] * 7
    for module in modules:
        assert get_module(tiny_llama.model, module).weight.shape == (module.d_out, module.d_in)


@pytest.mark.parametrize("path", ["model.layers.9.mlp.up_proj", "lm_head.x", "model.norm"])
def test_a_module_that_is_not_there(tiny_llama: LoadedModel, path: str) -> None:
    ref = ModuleRef(layer=0, component="up_proj", path=path, d_in=32, d_out=48)
    with pytest.raises(RepairError, match="no linear module"):
        get_module(tiny_llama.model, ref)
    wrong = ModuleRef(
        layer=0, component="up_proj", path=tiny_llama.modules[5].path, d_in=1, d_out=1
    )
    with pytest.raises(RepairError, match="locate again"):
        get_module(tiny_llama.model, wrong)
