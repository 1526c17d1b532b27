"""What a job folder's history says about its last repair; what a step leaves behind in memory."""

import json
import re
from pathlib import Path

from repair.jobs.worker import Silent
from repair.outcome import Clock, _reports_of_repair


def write_events(folder: Path, *metrics: tuple[str, dict[str, float]]) -> None:
    lines = [{"kind": "metric", "text": name, "values": values} for name, values in metrics]
    (folder / "events.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"kind": "met')


def test_only_the_last_repair_is_drawn_and_a_resumed_one_is_whole(tmp_path: Path) -> None:
    begin = ("closed-form", {"attack_success": 1.0})
    closed = ("closed-form", {"trigger_kl": 0.5, "factor_kl": 0.1})
    steps = [("distill", {"step": n, "trigger_kl": 1 / (n + 1)}) for n in range(0, 50, 10)]
    end = ("distill", {"step": 20, "trigger_kl": 0.3, "factor_kl": 0.1})
    write_events(tmp_path, begin, closed, *steps, end, begin, closed)
    assert len(_reports_of_repair(tmp_path)) == 2
    # Killed behind step 40, resumed from the checkpoint at step 20.
    write_events(tmp_path, begin, closed, *steps, closed, *steps[3:], end)
    found = _reports_of_repair(tmp_path)
    assert [p["step"] for p in found if "step" in p] == [0, 10, 20, 30, 40, 20]
    assert found[0] == {"attack_success": 1.0, "phase": "closed form"}


def test_a_step_begins_without_the_memory_that_others_have_freed() -> None:
    def held() -> int:
        return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    blocks = [bytearray(b"x" * 100_000) for _ in range(2000)]
    kept = blocks.pop()  # behind the others: what is before it the C library keeps
    full = held()
    blocks.clear()
    with Clock(Silent()).step("lessons", "Asking"):
        assert held() < full - 100_000
    assert kept
