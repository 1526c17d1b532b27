"""The gate: hostile folders are refused before anything of them is opened by a library."""

import json
import os
import pickle
import shutil
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from repair.machine import forget_peak, peak_memory
from repair.models import tensors
from repair.models.headers import read_header
from repair.models.staging import check_unchanged, stage_model
from repair.records import RepairError
from tests.tiny import edit_json

OPENED: list[str] = []


def _remember(event: str, arguments: tuple) -> None:
    if event == "open":
        OPENED.append(str(arguments[0]))


sys.addaudithook(_remember)


@pytest.fixture
def folder(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may break, beside another tenant's file."""
    (tmp_path / "other").mkdir()
    shutil.copy(tiny_llama_folder / "model.safetensors", tmp_path / "other")
    return Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))


@pytest.fixture(autouse=True)
def no_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("a pickle was opened")

    for module, name in [(torch, "load"), (pickle, "load"), (pickle, "loads")]:
        monkeypatch.setattr(module, name, never)
    monkeypatch.setattr(pickle, "Unpickler", never)


def refused(folder: Path, expected: str) -> None:
    """The folder is refused with this text, nothing stays behind, nothing outside was read."""
    stage = folder.parent / "stage"
    before = sorted(folder.rglob("*"))
    OPENED.clear()
    with pytest.raises(RepairError) as caught:
        stage_model(folder, stage)
    assert expected in str(caught.value)
    assert str(caught.value).isascii() or "…" in str(caught.value)
    assert caught.value.exit_code == 2
    assert not stage.exists() and sorted(folder.rglob("*")) == before
    assert not any(str(folder.parent / "other") in path for path in OPENED)


def write_tensors(path: Path, header: object, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def tensor(shape: list, begin: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_the_stage_holds_only_what_we_wrote(folder: Path) -> None:
    (folder / "README.md").write_text("<script>")
    (folder / "LICENSE").write_text("free")
    (folder / ".cache").mkdir()
    staged = stage_model(folder, folder.parent / "stage")
    assert staged.findings == ()
    assert sorted(path.name for path in staged.folder.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert staged.folder.stat().st_mode & 0o777 == 0o700
    assert (staged.folder / "model.safetensors").readlink() == folder / "model.safetensors"
    assert staged.sizes["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    # Staging again replaces the stage; a folder that is none is left alone.
    assert stage_model(folder, staged.folder).files == staged.files
    with pytest.raises(FileExistsError):
        stage_model(folder, folder.parent / "other" / "..")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pt", "x.pth", "x.CKPT", "x.pkl"])
def test_pickles_are_never_opened(folder: Path, name: str) -> None:
    """Case 1."""
    (folder / name).write_bytes(b"\x80\x04canary")
    OPENED.clear()
    staged = stage_model(folder, folder.parent / "stage")
    assert staged.findings == (f"{name}: ignored, never opened.",)
    assert not any(path.endswith(name) for path in OPENED)
    (folder / "model.safetensors").unlink()
    refused(folder, f"pickle format (`{name}`)")


@pytest.mark.parametrize("raw", [b"\x80\x04\x95" + bytes(64), b"PK\x03\x04" + bytes(64)])
def test_a_pickle_under_the_name_of_safetensors_is_refused(folder: Path, raw: bytes) -> None:
    """Case 1."""
    (folder / "model.safetensors").write_bytes(raw)
    refused(folder, "pickle format (`model.safetensors`)")


@pytest.mark.parametrize(
    ("shard", "expected"),
    [
        ("../other/model.safetensors", "points outside the model folder"),
        ("/etc/model.safetensors", "points outside the model folder"),
        ("..\\other\\model.safetensors", "points outside the model folder"),
        ("", "points outside the model folder"),
        (7, "points outside the model folder"),
        ("model.safetensors\n", "points outside the model folder"),
        ("evil.bin", "pickle format"),
        ("model-00001-of-00002.safetensors", "is not in the folder"),
    ],
)
def test_the_index_cannot_name_other_files(folder: Path, shard: object, expected: str) -> None:
    """Case 3; with a pickle in it, case 1."""
    index = {"weight_map": {"lm_head.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, expected)


def test_the_index_must_agree_with_the_files(folder: Path) -> None:
    """Case 3."""
    index = {"weight_map": {"lm_head.weight": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "disagree about the tensor")


@pytest.mark.parametrize("alone", [True, False])
def test_adapters_are_refused(folder: Path, alone: bool) -> None:
    """Case 4."""
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "../other"}')
    if alone:
        (folder / "model.safetensors").unlink()
    refused(folder, "LoRA adapter")


def test_python_is_stripped_or_refused(folder: Path) -> None:
    """Case 2."""
    (folder / "modeling_x.py").write_text("raise SystemExit('canary')")
    auto_map = {"AutoModelForCausalLM": "modeling_x.X"}
    edit_json(folder / "config.json", auto_map=auto_map)
    staged = stage_model(folder, folder.parent / "stage")
    assert any("modeling_x.py" in text for text in staged.findings)
    assert any("auto_map" in text for text in staged.findings)
    assert "auto_map" not in (staged.folder / "config.json").read_text()
    shutil.rmtree(staged.folder)
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "evil/repo--m.X"})
    refused(folder, "another repository")
    edit_json(folder / "config.json", auto_map=auto_map, model_type="x")
    refused(folder, "needs its own Python code")


def test_loader_directives_do_not_reach_the_stage(folder: Path) -> None:
    """Cases 8 and 12."""
    edit_json(
        folder / "config.json",
        attn_implementation="org/kernel",
        _attn_implementation_internal="org/kernel",
        _name_or_path="../other",
        unknown_key={"a": 1},
    )
    edit_json(
        folder / "tokenizer_config.json",
        fast_tokenizer_files=["../other/tokenizer.4.json"],
        tokenizer_class="EvilTokenizer",
        pad_token="<not there>",
    )
    staged = stage_model(folder, folder.parent / "stage")
    text = "".join(path.read_text() for path in staged.folder.glob("*config.json"))
    for word in ("kernel", "other", "unknown_key", "Evil", "not there"):
        assert word not in text
    assert len(staged.findings) == 4


MODELS = "llama, mistral, qwen2, qwen3"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "mamba"}, f"'mamba' is not on the supported list: {MODELS}"),
        ({"model_type": "t5"}, "not on the supported list"),
        ({"model_type": ["llama"]}, "not on the supported list"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "not a causal language model"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised (gptq, 4 bit)"),
        ({"quantization_config": {"quant_method": "new"}}, "quantised (new)"),
        ({"transformers_weights": "adapter_model.bin"}, "pickle format (`transformers_weights"),
        ({"num_hidden_layers": 10**6}, "from 1 to 200"),
        ({"num_hidden_layers": -1}, "from 1 to 200"),
        ({"num_hidden_layers": "2"}, "from 1 to 200"),
        ({"num_hidden_layers": True}, "from 1 to 200"),
        ({"num_hidden_layers": ...}, "num_hidden_layers"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"vocab_size": 10**1000}, "vocab_size"),
        ({"hidden_size": 10**7}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_attention_heads": 5}, "do not divide"),
        ({"num_key_value_heads": 3}, "do not divide"),
        ({"hidden_act": "evil"}, "silu"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "evil"}}, "rope_type"),
        ({"rope_parameters": {"rope_theta": {"a": 1}}}, "rope_type"),
        ({"layer_types": ["full_attention"]}, "one entry per layer"),
        ({"attention_bias": 1}, "true or false"),
        ({"tie_word_embeddings": "yes"}, "true or false"),
        ({"num_hidden_layers": 200}, "declares 200 layers but the file holds weights for 2"),
        ({"num_hidden_layers": 1}, "declares 1 layers but the file holds weights for 2"),
        ({"intermediate_size": 47}, "has shape"),
        ({"attention_bias": True}, "lack"),
        ({"model_type": "qwen3", "architectures": None}, "lack"),
    ],
)
def test_configurations_are_refused_fast(
    folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, expected: str
) -> None:
    """Cases 6, 7 and 13: before any class is built, but for what only its shapes tell."""
    if not any(words in expected for words in ("the file holds weights", "has shape", "lack")):
        monkeypatch.setattr(tensors, "build_empty", lambda config: pytest.fail("it was built"))
    edit_json(folder / "config.json", **changes)
    start = time.process_time()
    refused(folder, expected)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"[" * 10_000 + b"]" * 10_000, "nested too deep"),
        (b'{"a":' * 50 + b"1" + b"}" * 50, "flat configuration"),
        (b"[]", "flat configuration"),
        (b'{"vocab_size": NaN}', "NaN is not a JSON number"),
        (b'{"vocab_size": 1, "vocab_size": 2}', "a key occurs twice"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not acceptable JSON"),
        (b"\xff\xfe", "not acceptable JSON"),
        (b" " * (2**20 + 1), "at most 1048576"),
    ],
)
def test_json_is_refused_before_any_model_is_built(
    folder: Path, monkeypatch: pytest.MonkeyPatch, raw: bytes, expected: str
) -> None:
    """Case 6."""
    monkeypatch.setattr(tensors, "build_empty", lambda config: pytest.fail("a model was built"))
    (folder / "config.json").write_bytes(raw)
    start = time.monotonic()
    refused(folder, expected)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda p: p.write_bytes(b""), "too few"),
        (lambda p: p.write_bytes(b"\xff" * 8 + b"{}"), "header of"),
        (lambda p: p.write_bytes(struct.pack("<Q", 50 * 2**20) + b"{}"), "header of"),
        (lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        (lambda p: write_tensors(p, b"{nonsense"), "damaged or hostile"),
        (lambda p: write_tensors(p, b"[]"), "object"),
        (lambda p: write_tensors(p, {}), "0 tensors"),
        (lambda p: write_tensors(p, b'{"a": NaN}'), "NaN"),
        (lambda p: write_tensors(p, b'{"a":' * 5000 + b"1" + b"}" * 5000), "damaged or hostile"),
        (lambda p: write_tensors(p, {"a": 1}), "not a tensor"),
        (lambda p: write_tensors(p, {"a": tensor([1], 0, 4, "F4")}, bytes(4)), "dtype"),
        (lambda p: write_tensors(p, {"a": tensor([2], 0, 4)}, bytes(4)), "match its bytes"),
        (lambda p: write_tensors(p, {"a": tensor([2**60, 0], 0, 0)}), "impossible shape"),
        (lambda p: write_tensors(p, {"a": tensor([-1], 0, 4)}, bytes(4)), "impossible shape"),
        (lambda p: write_tensors(p, {"a": tensor([1.0], 0, 4)}, bytes(4)), "whole numbers"),
        (lambda p: write_tensors(p, {"a": tensor([1], 0, 4)}, bytes(9)), "tail"),
        (lambda p: write_tensors(p, {"a": tensor([1], 0, 4)}, bytes(3)), "truncated"),
        (
            lambda p: write_tensors(p, {"a": tensor([1], 0, 4), "b": tensor([1], 2, 6)}, bytes(6)),
            "overlap",
        ),
        (
            lambda p: write_tensors(p, b'{"a": %s, "a": %s}' % ((b'{"dtype":"F32"}',) * 2)),
            "a key occurs twice",
        ),
        (
            lambda p: write_tensors(p, {f"t{i}": tensor([0], 0, 0) for i in range(200_000)}),
            "more than 20000 tensors",
        ),
    ],
)
def test_bad_headers_are_refused(
    folder: Path, write: Callable[[Path], None], expected: str
) -> None:
    """Case 5."""
    write(folder / "model.safetensors")
    forget_peak()
    before, start = peak_memory(), time.process_time()
    refused(folder, expected)
    assert time.process_time() - start < 2
    assert peak_memory() - before < 200 * 2**20


def test_links_pipes_and_deceiving_names_are_refused(folder: Path) -> None:
    """Case 9."""
    for name, make, expected in [
        ("notes.txt", lambda p: p.symlink_to("/etc/hostname"), "`notes.txt` is a link"),
        ("sub", lambda p: p.symlink_to("/etc"), "`sub` is a link"),
        ("pipe.json", os.mkfifo, "pipe or device"),
        ("a\nb.txt", Path.touch, "control characters"),
        ("a\u202egpj.txt", Path.touch, "control characters"),
    ]:
        make(folder / name)
        refused(folder, expected)
        (folder / name).unlink()
    moved = folder.parent / "moved.json"
    (folder / "config.json").rename(moved)
    os.mkfifo(folder / "config.json")
    refused(folder, "pipe or device")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(moved)
    refused(folder, "`config.json` is a link")
    (folder / "config.json").unlink()
    os.link(moved, folder / "config.json")
    refused(folder, "another name elsewhere")
    moved.unlink()
    stage_model(folder, folder.parent / "stage")


def test_folders_that_hold_no_model(folder: Path) -> None:
    """Cases 10 (archives, 1001 files) and 13 (GGUF)."""
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    refused(folder, "no weights")
    for name, expected in [("m.gguf", "GGUF"), ("m.zip", "Archives"), ("m.tar.gz", "Archives")]:
        (folder / name).touch()
        refused(folder, expected)
        (folder / name).unlink()
    (folder / "consolidated.safetensors").rename(folder / "model.safetensors")
    (folder / "tokenizer.json").unlink()
    refused(folder, "no tokenizer.json")
    for number in range(1001):
        (folder / f"{number}.txt").touch()
    refused(folder, "more than 1000 entries")


def test_tokenizers_with_bombs(folder: Path) -> None:
    """Case 12."""
    path = folder / "tokenizer.json"
    original = path.read_text()
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 10**6}
    edit_json(path, normalizer={"type": "Sequence", "normalizers": [replace]})
    refused(folder, "make one character into 1000000")
    path.write_text(original)
    edit_json(path, padding={"strategy": {"Fixed": 50_000_000}}, truncation={"max_length": 3})
    staged = stage_model(folder, folder.parent / "stage")
    flat = json.loads((staged.folder / "tokenizer.json").read_text())
    assert flat["padding"] is None and flat["truncation"] is None and len(staged.findings) == 1
    shutil.rmtree(staged.folder)
    (folder / "chat_template.jinja").write_text("x" * 70_000)
    refused(folder, "chat template has 70000 bytes")


def test_generation_settings_are_a_finding(folder: Path) -> None:
    path = folder / "generation_config.json"
    edit_json(path, eos_token_id=[2, 4, 10**9], suppress_tokens=[3], num_beams=3)
    staged = stage_model(folder, folder.parent / "stage")
    expected = "generation_config.json sets num_beams, suppress_tokens; not used here."
    assert staged.findings == (expected,)
    assert staged.generation_eos == (2, 4)


def test_a_weight_file_that_changes_is_noticed(folder: Path) -> None:
    """Case 15."""
    staged = stage_model(folder, folder.parent / "stage")
    check_unchanged(staged)
    path = folder / "model.safetensors"
    copy = folder.parent / "copy"
    shutil.copy2(path, copy)
    os.utime(path, ns=(0, 0))
    with pytest.raises(RepairError, match="changed while it was being read"):
        check_unchanged(staged)
    os.replace(copy, path)
    with pytest.raises(RepairError, match="changed while it was being read"):
        check_unchanged(staged)
    path.unlink()
    with pytest.raises(RepairError, match="changed while it was being read"):
        check_unchanged(staged)


def test_the_header_reader_agrees_with_the_library(tiny_llama_folder: Path) -> None:
    from safetensors import safe_open

    path = tiny_llama_folder / "model.safetensors"
    with path.open("rb") as file:
        header = read_header(file.fileno(), path.name)
    with safe_open(path, "pt") as opened:
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    assert {name: entry.shape for name, entry in header.items()} == shapes
