"""Print the README's tables of repairs from the committed results.

    python -m tests.bench.tables seeds|compare
"""

import json
import statistics
import sys
from collections.abc import Iterator

from repair.records import Rate
from tests.bench.peers import HERE


def rate(flat: dict | None) -> str:
    if not flat:
        return "-"
    low, high = Rate(count=flat["count"], total=flat["total"]).interval()
    return f"{flat['count']}/{flat['total']} ({low:.1%} to {high:.1%})"


def by_position(rates: dict) -> str:
    return "; ".join(rate(flat) for flat in rates.values())


def total(rates: dict) -> str:
    count = sum(flat["count"] for flat in rates.values())
    return f"{count}/{sum(flat['total'] for flat in rates.values())}"


def seeds() -> Iterator[str]:
    found = json.loads((HERE / "results" / "seeds.json").read_text())["runs"]
    yield ("| backdoor, seed | verdict | attack success before | after | recovered | benign KL | "
           "perplexity | seconds, of them repair | modules, total rank |")  # fmt: skip
    yield "|" + "---|" * 9
    for name, run in found.items():
        before, after = run["perplexity"]
        failed = ", ".join(gate["name"] for gate in run["failed_gates"])
        yield (
            f"| {name} | {run['verdict']}{f' ({failed})' if failed else ''} | "
            f"{by_position(run['before'])} | {by_position(run['after'] or {})} | "
            f"{total(run['recovery'])} | {run['kl_from_original']:.1e} | {before:.4f} to "
            f"{after:.4f} | {run['seconds']:.0f}, {run['seconds_by_step']['repair']:.0f} | "
            f"{len(run['ranks'])}, {sum(run['ranks'].values())} |"
        )


def compare() -> Iterator[str]:
    found = json.loads((HERE / "results" / "compare.json").read_text())["suspects"]
    for name, rows in found.items():
        yield f"**{name}**: fires {by_position(rows['suspect']['attack_success'])} before"
        yield ""
        yield ("| repair | still fires | recovered | benign KL | same 8 tokens, clean | held-out "
               "trigger KL | parameters changed | seconds |")  # fmt: skip
        yield "|" + "---|" * 8
        random = []
        for row, flat in rows.items():
            if row == "suspect":
                continue
            if row.startswith("random "):
                random.append(flat)
                continue
            setting = f" ({flat['setting']})" if flat["setting"] else ""
            yield (
                f"| {row}{setting} | {by_position(flat['attack_success'])} | "
                f"{total(flat['recovery'])} | {flat['kl_from_original']:.1e} | "
                f"{flat['clean_agreement']['count']}/{flat['clean_agreement']['total']} | "
                f"{flat['held_out_trigger_kl']:.1e} | {flat['num_changed']} | "
                f"{flat['seconds']:.0f} |"
            )
        fires = [sum(r["count"] for r in flat["attack_success"].values()) for flat in random]
        back = [sum(r["count"] for r in flat["recovery"].values()) for flat in random]
        kls = [flat["kl_from_original"] for flat in random]
        left = [flat["held_out_trigger_kl"] for flat in random]
        size = [flat["num_changed"] for flat in random]
        yield (
            f"| {len(random)} random draws: median (range) | {statistics.median(fires):g} "
            f"({min(fires)} to {max(fires)}) | {statistics.median(back):g} ({min(back)} to "
            f"{max(back)}) | {statistics.median(kls):.1e} ({min(kls):.1e} to {max(kls):.1e}) | | "
            f"{statistics.median(left):.1e} ({min(left):.1e} to {max(left):.1e}) | "
            f"{statistics.median(size):g} | |"
        )
        yield ""


if __name__ == "__main__":
    print("\n".join({"seeds": seeds, "compare": compare}[sys.argv[1]]()))
