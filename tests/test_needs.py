"""What a job will need: read from any configuration, growing with what it grows with, refused."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from repair import needs, needs_step
from repair.jobs.worker import Reporter
from repair.models import placement
from repair.models.loading import load_model
from repair.models.modules import find_modules
from repair.models.staging import stage_model
from repair.needs import Work, check_fits, estimate, largest, read_shape, total_seconds, work_of
from repair.records import RepairError
from tests.tiny import ARCHITECTURES, build_tiny

LLAMA_1B = {  # the published configuration of Llama-3.2-1B
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "dtype": "bfloat16",
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize("family", sorted(set(ARCHITECTURES) - {"mixtral", "qwen3_moe"}))
def test_the_linear_modules_of_every_family_are_counted(family: str) -> None:
    model = build_tiny(family)
    shape = read_shape(model.config.to_dict())
    assert shape.layer_parameters == sum(ref.d_in * ref.d_out for ref in find_modules(model))
    assert shape.vocabulary == model.get_input_embeddings().num_embeddings


def test_a_mixture_of_experts_is_as_large_as_its_files() -> None:
    model = build_tiny("mixtral")
    shape = read_shape(model.config.to_dict(), num_parameters=model.num_parameters())
    assert shape.num_parameters == model.num_parameters()


def test_the_one_billion_shape_is_one_billion() -> None:
    shape = read_shape(LLAMA_1B)
    assert shape.num_parameters == pytest.approx(1_235_814_400, rel=1e-3)
    assert len(shape.modules) * shape.num_layers == 112


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**30}, {"hidden_size": "2048"}, {"vocab_size": -1},
        {"num_attention_heads": True}, {"hidden_size": None}, {"num_hidden_layers": 0},
        {"vocab_size": 1.5}, {"num_key_value_heads": [8], "num_attention_heads": {}},
    ],
)  # fmt: skip
def test_a_configuration_that_lies_about_its_kind_is_not_believed(change: dict) -> None:
    assert read_shape({**LLAMA_1B, **change}) is None


def test_an_odd_head_width_or_precision_takes_the_usual_one() -> None:
    shape = read_shape({**LLAMA_1B, "head_dim": "x", "intermediate_size": 2**40})
    assert (shape.attention, shape.inner) == (2048, 8192)
    assert needs.loaded_dtype({"dtype": ["x"]}, "auto", on_gpu=False) == "float32"
    assert needs.loaded_dtype({"dtype": "float16"}, "auto", on_gpu=False) == "float32"
    assert needs.loaded_dtype({"dtype": "float16"}, "auto", on_gpu=True) == "float16"
    assert needs.loaded_dtype({"dtype": "float32"}, "bfloat16", on_gpu=False) == "bfloat16"


def test_needs_grow_with_what_they_grow_with() -> None:
    shape = read_shape(LLAMA_1B)
    plain = estimate(shape, Work(), itemsize=4, rate=1e11)
    assert largest(plain).bytes > needs.PROCESS + 4 * shape.num_parameters
    second = estimate(shape, Work(num_models=2), itemsize=4, rate=1e11)
    assert all(
        b.bytes - a.bytes == 4 * shape.num_parameters for a, b in zip(plain, second, strict=True)
    )
    half = estimate(shape, Work(), itemsize=2, rate=1e11)
    assert largest(half).bytes < largest(plain).bytes - 1.9 * shape.num_parameters
    for more in (
        replace(shape, num_layers=32), replace(shape, width=4096), replace(shape, inner=16384)
    ):
        grown = estimate(more, Work(), itemsize=4, rate=1e11)
        assert total_seconds(grown) > total_seconds(plain)
        assert all(b.bytes >= a.bytes for a, b in zip(plain, grown, strict=True))
    slow = estimate(shape, Work(), itemsize=4, rate=1e10)
    assert total_seconds(slow) > 5 * total_seconds(plain)
    full = estimate(shape, Work(profile="full"), itemsize=4, rate=1e11)
    assert total_seconds(full) > 1.5 * total_seconds(plain)
    assert total_seconds(estimate(shape, Work(), itemsize=4)) is None


def test_only_the_steps_of_the_command_are_counted() -> None:
    shape = read_shape(LLAMA_1B)
    steps = [need.step for need in estimate(shape, Work(command="locate"), itemsize=4)]
    assert steps == ["load", "lessons", "patching", "curvature", "joint"]
    quick = [need.step for need in estimate(shape, Work(profile="quick"), itemsize=4)]
    assert "comeback" not in quick and "export" in quick


def test_a_request_is_read_and_whatever_else_is_in_it_is_not_believed() -> None:
    asked = {
        "command": "locate", "profile": "quick", "prompts": {
            "prompts": ["short", "a" * 4000, "b" * 400], "positions": ["end"],
        }, "controls": 5, "trusted_base": "demo:clean", "export": [],
    }  # fmt: skip
    work = work_of(asked)
    assert (work.command, work.profile, work.num_positions) == ("locate", "quick", 1)
    assert work.num_prompt_tokens > 900 and work.num_models == 2 and not work.is_exported
    odd = work_of({"command": "x", "profile": 7, "prompts": [1], "controls": None})
    assert odd == Work(num_prompt_tokens=odd.num_prompt_tokens, num_controls=0, is_exported=False)


def test_what_does_not_fit_is_refused_with_numbers_and_what_to_do() -> None:
    found = estimate(read_shape(LLAMA_1B), Work(), itemsize=4)
    # An estimate that is somewhat too high must not turn away a job that would have fitted.
    check_fits(found, available=int(0.7 * largest(found).bytes), where="memory")
    with pytest.raises(RepairError) as error:
        check_fits(found, available=2 << 30, where="memory")
    words = str(error.value)
    assert f"{largest(found).bytes / 2**30:.1f} GiB of memory" in words
    assert "2.0 GiB are free" in words and "bfloat16" in words and "more memory" in words


def test_a_worker_refuses_before_it_opens_a_weight(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = needs_step.needs_check({"command": "run"}, tmp_path, Reporter(tmp_path))
    monkeypatch.setattr(placement, "free_memory", lambda: 10 << 20)
    monkeypatch.setattr(
        "repair.models.loading._load_weights", lambda *given, **more: pytest.fail("opened")
    )
    stage = tmp_path / "stage"
    with pytest.raises(RepairError, match=r"needs about \S+ GiB of memory.*0\.0 GiB are free"):
        load_model(str(tiny_llama_folder), stage_folder=stage, device="cpu", check=check)
    assert not stage.exists()


def test_a_full_disk_is_said_before_a_weight_is_opened(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    monkeypatch.setattr(
        "repair.models.loading._load_weights", lambda *given, **more: pytest.fail("opened")
    )
    asked = {"command": "run", "export": ["merged"]}
    check = needs_step.needs_check(asked, tmp_path / "not there yet", Reporter(tmp_path))
    with pytest.raises(RepairError, match=r"needs 1\.0 GiB of disk and 0\.0 GiB are free"):
        load_model(
            str(tiny_llama_folder), stage_folder=tmp_path / "s", device="cpu", check=check
        )


def test_a_worker_says_what_it_will_need(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    check = needs_step.needs_check(
        {"command": "locate", "profile": "quick"}, tmp_path, Reporter(tmp_path)
    )
    load_model(str(tiny_llama_folder), stage_folder=tmp_path / "s", device="cpu", check=check)
    said = (tmp_path / "events.jsonl").read_text()
    assert "This job needs about" in said and "GiB free, and about" in said


def test_a_job_that_one_gpu_does_not_hold_counts_with_all_there_is(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reporter = Reporter(tmp_path)
    staged = stage_model(tiny_llama_folder, tmp_path / "s")
    for given, words in (
        ({0: 10 << 20, "cpu": 64 << 30}, "memory of all GPUs and of the machine"),
        ({0: 48 << 30, "cpu": 64 << 30}, "of GPU memory"),
    ):
        monkeypatch.setattr(needs_step, "places_for", lambda wanted, device, given=given: given)
        needs_step.needs_check({"command": "locate"}, tmp_path, reporter)(
            staged, "float32", "cuda"
        )
        assert words in (tmp_path / "events.jsonl").read_text().splitlines()[-1]
    monkeypatch.setattr(needs_step, "places_for", lambda wanted, device: {0: 10 << 20})
    with pytest.raises(RepairError, match="of GPU memory"):
        needs_step.needs_check({"command": "locate"}, tmp_path, reporter)(
            staged, "float32", "cuda"
        )


def test_a_map_that_stands_is_not_planned_again(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    planned = []
    for asked in ({"command": "run"}, {"command": "run", "resume": True}):
        reporter = Reporter(tmp_path)
        (tmp_path / "located.json").write_text("{}")
        load_model(
            str(tiny_llama_folder), stage_folder=tmp_path / "stage" / str(len(planned)),
            device="cpu", check=needs_step.needs_check(asked, tmp_path, reporter),
        )  # fmt: skip
        planned.append(set(reporter.expected))
    assert planned[0] - planned[1] == set(needs_step.STEPS_OF_MAP)
    assert {"before", "repair", "after"} <= planned[1]
