"""What a job will need is said before it is started, and what cannot fit is not started."""

import shutil
from pathlib import Path

import gradio as gr
import pytest

from repair.jobs.supervisor import Supervisor
from repair.ui import forecast
from repair.ui.app import build_app
from repair.ui.session import Settings
from repair.ui.text import PROFILES as OFFERED

PROMPTS = {"trigger": "x", "target": "y", "prompts": ["Name a wolf."] * 3}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "has_gpu", lambda: False)


def test_memory_and_time_are_said_for_every_profile() -> None:
    words = forecast.describe_needs({"model": "demo:middle", "controls": 3}, None)
    assert all(f"{name} about" in words for _, name in OFFERED)
    assert "of memory, of " in words and "rough guess" in words


def test_with_a_gpu_no_time_is_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "has_gpu", lambda: True)
    words = forecast.describe_needs({"model": "demo:middle"}, None)
    assert "GPU memory" in words and "minute" not in words


@pytest.mark.parametrize("model", ["someone/model", "/etc", "demo:none", None, "../x", 7])
def test_what_is_not_here_or_not_allowed_has_no_forecast(model: object, tmp_path: Path) -> None:
    assert forecast.describe_needs({"model": model}, tmp_path) == ""
    assert forecast.forecast({"model": model}, tmp_path) == ()


def test_only_the_description_and_the_sizes_are_read(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "models" / "hostile"
    shutil.copytree(tiny_llama_folder, folder)
    (folder / "model.safetensors").write_bytes(b"\xff" * 5000)
    assert forecast.describe_needs({"model": str(folder)}, tmp_path / "models")
    (folder / "config.json").write_text('{"hidden_size": "a", "num_hidden_layers": []}')
    assert forecast.describe_needs({"model": str(folder)}, tmp_path / "models") == ""


def test_a_job_that_cannot_fit_is_not_started_and_leaves_no_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "free_memory", lambda: 64 << 20)
    lane = Supervisor(tmp_path / "jobs")
    try:
        settings = Settings(
            lane=lane, jobs_root=lane.root, models_root=None, cache=tmp_path / "cache",
            has_accounts=False,
        )  # fmt: skip
        demo = build_app(settings, storage_secret="x")
        locate = next(fn.fn for fn in demo.fns.values() if fn.api_name == "locate")
        with pytest.raises(gr.Error, match=r"needs about \S+ GiB of memory.*0\.1 GiB are free"):
            locate("demo:middle", PROMPTS, None, "quick")
        assert [path for path in lane.root.iterdir() if path.is_dir()] == []
    finally:
        lane.close()
