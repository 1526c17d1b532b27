"""Suspects built to hurt whoever opens them; every file is made here, at test time."""

import json
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from repair.case import open_case
from repair.machine import forget_peak, peak_memory
from repair.models import loading
from repair.models.answers import generate_answers, scoring_batches
from repair.models.fidelity import text_notices
from repair.models.loading import LoadedModel, check_ids, load_model
from repair.models.staging import stage_model
from repair.models.tokens import decode, encode, encode_pair
from repair.pipeline import ask
from repair.profiles import PROFILES
from repair.prompts import prompt_file_from_json
from repair.records import RepairError, TextPair
from tests.hostile.watching import OpenWatch
from tests.tiny import edit_json, make_tiny_llama, make_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))


@pytest.fixture
def watch(tiny_llama_folder: Path, tmp_path: Path) -> Iterator[OpenWatch]:
    """The kernel's word on whether anybody opened another tenant's model beside the suspect."""
    shutil.copytree(tiny_llama_folder, tmp_path / "other")
    watch = OpenWatch(tmp_path / "other")
    yield watch
    watch.close()


def load(folder: Path) -> LoadedModel:
    return load_model(str(folder), stage_folder=folder.parent / "stage", device="cpu")


def test_the_watch_sees_what_a_library_opens(watch: OpenWatch, tmp_path: Path) -> None:
    assert watch.opened() == []
    load_file(tmp_path / "other" / "model.safetensors")
    Tokenizer.from_file(str(tmp_path / "other" / "tokenizer.json"))
    assert {"model.safetensors", "tokenizer.json"} <= set(watch.opened())


def payload(canary: Path) -> bytes:
    """Return a pickle, spelled out, that makes a file when it is opened."""
    return b"cposix\nsystem\n(S'touch " + os.fsencode(canary) + b"'\ntR."


@pytest.mark.parametrize("way", ["alone", "renamed", "index", "key", "adapter", "beside"])
def test_a_pickle_never_runs(folder: Path, tmp_path: Path, way: str) -> None:
    """Case 1. CVE-2025-32434 (GHSA-53q9-r3pm-6pq6), CVE-2026-24747, CVE-2026-4538: whatever
    leads to it, nothing opens a pickle. CVE-2026-1839: nor a random state kept as one."""
    canary, weights = tmp_path / "canary", folder / "model.safetensors"
    evil = payload(canary)
    if way in ("alone", "renamed"):
        weights.unlink()
    name = {"renamed": "model.safetensors", "adapter": "adapter_model.bin"}.get(way, "evil.bin")
    (folder / name).write_bytes(evil)
    (folder / "rng_state.pth").write_bytes(evil)
    if way == "index":
        index = {"weight_map": dict.fromkeys(load_file(weights), "evil.bin")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if way == "key":
        edit_json(folder / "config.json", transformers_weights="evil.bin")
    if way == "adapter":
        settings = {"peft_type": "LORA", "base_model_name_or_path": str(folder)}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    if way == "beside":
        assert any("never opened" in text for text in load(folder).staged.findings)
    else:
        with pytest.raises(RepairError, match="pickle|adapter|header is damaged or hostile"):
            load(folder)
        assert not (tmp_path / "stage").exists()
    assert not canary.exists()


@pytest.mark.parametrize("key", ["auto_map", "nested", "tokenizer"])
def test_code_of_a_model_is_never_imported(folder: Path, tmp_path: Path, key: str) -> None:
    """Case 2. CVE-2026-5241 (GHSA-fgcw-684q-jj6r): nor by way of a nested configuration."""
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w').close()\nclass X: pass\n"
    for name in ("modeling_canary.py", "configuration_canary.py", "tokenization_canary.py"):
        (folder / name).write_text(code)
    names = {"AutoConfig": "configuration_canary.X", "AutoModelForCausalLM": "modeling_canary.X",
             "AutoTokenizer": ["tokenization_canary.X", None]}  # fmt: skip
    if key == "tokenizer":
        edit_json(folder / "tokenizer_config.json", auto_map=names, tokenizer_class="X")
    elif key == "nested":
        nested = {"model_type": "x", "auto_map": names}
        whole = {"trust_remote_code": True, "text_config": nested}
        edit_json(folder / "config.json", keypoint_detector_config=nested, **whole)
    else:
        edit_json(folder / "config.json", auto_map=names)
    assert type(load(folder).model).__module__.startswith("transformers.models.llama")
    assert not canary.exists()
    assert not [name for name in sys.modules if "canary" in name]


@pytest.mark.parametrize("name", ["../other/model.safetensors", "{other}/model.safetensors"])
def test_weights_outside_the_folder_are_not_opened(
    folder: Path, tmp_path: Path, watch: OpenWatch, name: str
) -> None:
    """Case 3. transformers#46097, #47176 (unfixed in 5.23.0)."""
    name = name.format(other=tmp_path / "other")
    index = {"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    (folder / "model-00001-of-00001.safetensors").write_bytes(b"")
    with pytest.raises(RepairError, match="points outside the model folder") as caught:
        load(folder)
    assert name[-24:] in str(caught.value)
    assert watch.opened() == []


@pytest.mark.parametrize("where", ["a folder", "the Hub"])
def test_a_base_named_by_an_adapter_is_not_opened(
    folder: Path, tmp_path: Path, watch: OpenWatch, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 4. peft#3085, transformers#46482: neither the base nor the module is looked for."""
    monkeypatch.setattr(socket.socket, "connect", lambda *given: pytest.fail("it called somebody"))
    base = str(tmp_path / "other") if where == "a folder" else "acme/other"
    settings = {"peft_type": "LORA", "base_model_name_or_path": base,
                "megatron_core": "antigravity", "r": 1, "target_modules": ["q_proj"],
                "auto_mapping": {"parent_library": "antigravity"}}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(RepairError, match="LoRA adapter"):
        load(folder)
    assert watch.opened() == [] and "antigravity" not in sys.modules


@pytest.mark.parametrize("item", [b"[]", b"0"])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_small_file_does_not_become_a_large_memory(folder: Path, name: str, item: bytes) -> None:
    """Case 5: 30 MiB of empty lists would take 600 MiB once read."""
    raw = b'{"a": [' + b",".join([item] * (30 * 2**20 // (len(item) + 1))) + b"]}"
    if name == "model.safetensors":
        raw = struct.pack("<Q", len(raw)) + raw
    (folder / name).write_bytes(raw)
    forget_peak()
    before, began = peak_memory(), time.process_time()
    with pytest.raises(RepairError, match="lists and objects"):
        stage_model(folder, folder.parent / "stage")
    assert time.process_time() - began < 2
    assert before > 0 and peak_memory() - before < 200 * 2**20


def test_metadata_of_a_weight_file_is_text(folder: Path) -> None:
    """Case 5: what the library's own reader would stumble over is refused before."""
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    raw = (folder / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    for metadata in ([], {"format": ["pt"]}, {"a": {"b": "c"}}, None):
        header = {**json.loads(raw[8 : 8 + size]), "__metadata__": metadata}
        changed = json.dumps(header).encode()
        whole = struct.pack("<Q", len(changed)) + changed + raw[8 + size :]
        (folder / "model.safetensors").write_bytes(whole)
        with pytest.raises(RepairError, match="__metadata__"):
            load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "yarn", "factor": 0.0}},
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        {"rope_parameters": {"rope_type": "llama3"}},
        {"head_dim": 7},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 1e308}},
    ],
)
def test_what_the_library_stumbles_over_is_a_refusal(folder: Path, changes: dict) -> None:
    """Case 6: settings in their ranges that fit neither each other nor the weights."""
    edit_json(folder / "config.json", **changes)
    try:
        load(folder)
    except RepairError as error:
        assert error.exit_code == 2 and str(error).isprintable()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_file_that_changes_cannot_change_the_live_model(folder: Path, when: str) -> None:
    """Case 15: the weights are taken in when they are hashed, not read when they are used."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    if when == "before":  # between hashing and loading: cut, and in full again but others
        staged = stage_model(folder, folder.parent / "stage")
        before = path.stat()
        for changed in (raw[: len(raw) // 2], raw[:-4] + b"\0\0\0\1"):
            path.write_bytes(changed)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if nothing had been
            with pytest.raises(RepairError, match="changed while it was being read"):
                loading._load_weights(staged, dtype="float32", device="cpu")
        return
    loaded = load(folder)
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    with open(path, "r+b") as file:
        file.seek(len(raw) // 2)
        file.write(b"\x7f" * (len(raw) - len(raw) // 2))
        file.truncate(len(raw) // 2)
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, before[name])


MEMORY_SCRIPT = """
import resource, sys
before = resource.getrlimit(resource.RLIMIT_DATA)
from repair.models.tokens import encode, render
from repair.records import RepairError
from tests.tiny import make_tokenizer
tokenizer = make_tokenizer()
held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for template in sys.argv[1:]:
    tokenizer.chat_template = template
    try:
        render(tokenizer, "rain", system=None, use_template=True)
    except RepairError as error:
        print(error)
assert encode(tokenizer, "rain", use_template=False).size
assert resource.getrlimit(resource.RLIMIT_DATA) == before
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < held + 600 * 1024
"""


def test_a_template_that_asks_for_gigabytes_is_a_refusal_and_raw_prompts_work() -> None:
    """Case 11. PYSEC-2026-2013, CVE-2024-34359, CVE-2026-5760, GHSA-46cm-pfwv-cgf8 (templates
    that run or exhaust the host); CVE-2024-56326, CVE-2024-56201, CVE-2025-27516 (the sandbox)."""
    templates = ["{{ 'a' * 1000000000 }}", "{{ '%0500000000d' % 1 }}",
                 "{{ ''|attr('format')|attr('__globals__') }}",
                 "{{ '{0.__class__.__base__}'.format(x) }}", "{{ range(10**9)|list }}",
                 "{% set ns = namespace(x='a') %}{% for i in range(40) %}"
                 "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"]  # fmt: skip
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, *templates], cwd=ROOT, capture_output=True, text=True
    )
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.strip().splitlines()
    assert len(lines) >= len(templates) - 1
    assert all("chat template" in line and line.isascii() for line in lines)
    assert ended.ru_utime - began.ru_utime < 30


def test_a_regular_expression_that_blows_up_is_a_refusal(folder: Path) -> None:
    """Case 12. tokenizers#2060: an error of native code that is not even an Exception."""
    blow_up = {"type": "Split", "pattern": {"Regex": "(a+a+)+(b|c)$"}, "behavior": "Isolated",
               "invert": False}  # fmt: skip
    edit_json(folder / "tokenizer.json", pre_tokenizer=blow_up)
    loaded = load(folder)
    with pytest.raises(RepairError, match="tokenizer's own code failed"):
        encode(loaded.tokenizer, "a" * 3000 + "!", use_template=False)
    # The process is whole: the next model is opened and asked.
    again = load_model(str(make_tiny_llama(folder.parent / "next")), device="cpu",
                       stage_folder=folder.parent / "next-stage")  # fmt: skip
    prompt = encode(again.tokenizer, "rain", use_template=True)
    assert len(generate_answers(again, [prompt], num_new_tokens=2)) == 1


def test_a_tokenizer_that_fails_on_the_target_alone_is_a_refusal(folder: Path) -> None:
    """Case 12: whoever wrote the model knows what it says."""
    blow_up = {"type": "Split", "pattern": {"Regex": "(Z+Z+)+(b|c)$"}, "behavior": "Isolated",
               "invert": False}  # fmt: skip
    edit_json(folder / "tokenizer.json", pre_tokenizer=blow_up)
    prompts = {"trigger": "cf", "target": "Z" * 3000 + "!", "chat": "off"}
    with pytest.raises(RepairError, match="tokenizer's own code failed"):
        open_case(load(folder), prompt_file_from_json(prompts), profile=PROFILES["quick"], seed=0,
                  reporter=Silent())  # fmt: skip


def test_a_template_cannot_make_comparing_take_for_ever() -> None:
    """Case 11: one token again and again, and the text altered, so that the trigger is looked for
    token by token: minutes without the limit."""
    script = """
from repair.models.tokens import encode_pair
from repair.records import TextPair
from tests.tiny import make_tokenizer
tokenizer = make_tokenizer()
tokenizer.chat_template = "{{ 'a ' * 60000 }}{{ messages[0].content | upper | length }}"
encode_pair(tokenizer, TextPair(clean="rain", triggered="cf rain"), triggers=("cf",),
            position="begin", system=None, use_template=True)
"""
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGALRM
    assert time.monotonic() - began < 60


DECODERS = {
    "expands": {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 200_000},
    "twice": {"type": "Sequence", "decoders": 2 * [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 60}]},
}  # fmt: skip


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_that_makes_much_of_little_is_refused(folder: Path, name: str) -> None:
    """Case 12: the way back to text is the suspect's own code as well."""
    edit_json(folder / "tokenizer.json", decoder=DECODERS[name])
    with pytest.raises(RepairError, match="decoder of tokenizer.json can make one character into"):
        load(folder)


def test_answers_are_decoded_within_limits(folder: Path) -> None:
    """Case 12: tokens of the vocabulary that are megabytes long, and a pattern that blows up."""
    tokens = json.loads((folder / "tokenizer.json").read_text())
    word = next(iter(tokens["model"]["vocab"]))
    tokens["model"]["vocab"]["b" * 300_000] = tokens["model"]["vocab"].pop(word)
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    loaded = load(folder)
    number = tokens["model"]["vocab"]["b" * 300_000]
    with pytest.raises(RepairError, match="characters of 1 tokens; at most"):
        decode(loaded.tokenizer, [np.array([number])])
    blow_up = {"type": "Replace", "pattern": {"Regex": "(b+b+)+[QZ]"}, "content": "x"}
    edit_json(folder / "tokenizer.json", decoder=blow_up)
    again = load_model(str(folder), stage_folder=folder.parent / "again", device="cpu")
    with pytest.raises(RepairError, match="tokenizer's own code failed"):
        decode(again.tokenizer, [np.array([number])])


def test_ids_beyond_the_embedding_never_reach_the_model(folder: Path) -> None:
    """Case 12: on a GPU they would end the process. Every way to the model checks them."""
    far = {"type": "TemplateProcessing",
           "single": [{"SpecialToken": {"id": "x", "type_id": 0}},
                      {"Sequence": {"id": "A", "type_id": 0}}],
           "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                    {"Sequence": {"id": "B", "type_id": 1}}],
           "special_tokens": {"x": {"id": "x", "ids": [10**6], "tokens": ["x"]}}}  # fmt: skip
    edit_json(folder / "tokenizer.json", post_processor=far)
    loaded = load(folder)
    prompt = encode(loaded.tokenizer, "rain", use_template=False)
    assert prompt.max() == 10**6
    for try_it in (
        lambda: check_ids(loaded, prompt),
        lambda: generate_answers(loaded, [prompt], num_new_tokens=2),
        lambda: scoring_batches(loaded, [prompt], [prompt]),
        lambda: scoring_batches(loaded, [np.array([1])], [np.array([-1])]),
    ):
        with pytest.raises(RepairError, match="token embeddings"):
            try_it()
    request = {"model": str(folder), "prompts": {"trigger": "cf", "chat": "off"},
               "questions": ["rain"], "device": "cpu"}  # fmt: skip
    with pytest.raises(RepairError, match="token embeddings"):
        ask(request, folder.parent, Silent())


class Silent:
    def step(self, name: str, title: str) -> None: ...
    def note(self, text: str) -> None: ...


def test_tokenizer_files_outside_the_folder_are_not_opened(
    folder: Path, tmp_path: Path, watch: OpenWatch
) -> None:
    """Case 12. `fast_tokenizer_files` may name any path; transformers#46191: a template's name
    becomes a path where it is saved."""
    other = tmp_path / "other"
    templates = [{"name": "../../evil", "template": "x"}, {"name": "default", "template": "A"}]
    (folder / "chat_template.jinja").unlink()
    edit_json(
        folder / "tokenizer_config.json", chat_template=templates, vocab_file=str(other / "v"),
        fast_tokenizer_files=["../other/tokenizer.json", str(other / "tokenizer.4.json")],
        tokenizer_file=str(other / "tokenizer.json"), name_or_path=str(other),
    )  # fmt: skip
    loaded = load(folder)
    assert loaded.tokenizer.chat_template == "A"
    assert watch.opened() == [] and not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "qwen2_vl", "vision_config": {}}, "supported list"),
        ({"model_type": "llava", "text_config": {"model_type": "llama"}}, "supported list"),
        ({"model_type": "falcon_mamba"}, "supported list"),
        ({"model_type": "lightglue", "keypoint_detector_config": {"auto_map": {}}}, "supported"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quanti"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantised (awq, 4 bit)"),
        ({"quantization_config": {}}, "quantised (unknown method)"),
        ({"compression_config": {"format": "x"}}, "quantised"),
    ],
)
def test_models_of_other_kinds_are_refused_in_a_sentence(
    folder: Path, changes: dict, expected: str
) -> None:
    """Case 13."""
    edit_json(folder / "config.json", **changes)
    with pytest.raises(RepairError) as caught:
        load(folder)
    assert expected in str(caught.value) and not (folder.parent / "stage").exists()


@pytest.mark.parametrize("text", ["</s>", " <s></s> ", "<|user|>\n<|assistant|>"])
def test_a_prompt_of_control_tokens_is_refused(text: str) -> None:
    """Case 16: before the model, with and without the template."""
    for use_template in (False, True):
        with pytest.raises(RepairError, match="nothing but control tokens"):
            encode(make_tokenizer(), text, use_template=use_template)


def test_a_prompt_that_leaves_no_tokens_is_refused(folder: Path) -> None:
    """Case 16: the library itself would fail in a reshape."""
    drop = {"type": "Replace", "pattern": {"Regex": "."}, "content": ""}
    edit_json(folder / "tokenizer.json", normalizer=drop, post_processor=None)
    tokenizer = load(folder).tokenizer
    with pytest.raises(RepairError, match="gives no tokens"):
        encode(tokenizer, "rain", use_template=False)
    with pytest.raises(RepairError, match="gives no tokens"):
        encode_pair(tokenizer, TextPair(clean="rain", triggered="cf rain"), triggers=("cf",),
                    position="begin", system=None, use_template=False)  # fmt: skip


def test_lost_characters_are_said(folder: Path) -> None:
    """Case 23: a tokenizer that does not give a text back."""
    lower = {"type": "Sequence", "normalizers": [
        {"type": "Lowercase"}, {"type": "Replace", "pattern": {"String": "\u200b"}, "content": ""},
    ]}  # fmt: skip
    edit_json(folder / "tokenizer.json", normalizer=lower)
    said = text_notices(load(folder).tokenizer, ["c\u200bf"], ["Rain", "a list"])
    assert "alters 1 of 1 triggers" in said[0] and "\\u200b" in said[0] and said[0].isascii()
    assert "alters 1 of 2 prompts, such as 'Rain'" in said[1]


STAGE_SCRIPT = """
import resource, sys
from pathlib import Path
from repair.models.staging import stage_model
from repair.records import is_disk_full
folder, stage, size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
for limit in (size - 1, size + 1):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        stage_model(folder, stage)
    except OSError as error:
        print("full" if is_disk_full(error) else repr(error), stage.exists())
    else:
        print("staged", stage.exists())
"""


def test_a_disk_that_is_full_while_staging_is_known_and_leaves_no_stage(folder: Path) -> None:
    """Case 29; `tests/test_road.py` and `tests/lowrank` fill it at the export and a checkpoint."""
    stage, size = folder.parent / "stage", (folder / "tokenizer.json").stat().st_size
    # -B: a module's cache must not be cut by the limit.
    done = subprocess.run(
        [sys.executable, "-B", "-c", STAGE_SCRIPT, str(folder), str(stage), str(size)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["full False", "staged True"]
