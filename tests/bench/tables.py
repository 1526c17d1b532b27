"""Print the README's tables of repairs from the committed results.

    python -m tests.bench.tables map|evidence|seeds|compare
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


def short(flat: dict | None) -> str:
    return f"{flat['count']}/{flat['total']}" if flat and flat["total"] else "-"


def nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def by_position(rates: dict) -> str:
    return "; ".join(rate(flat) for flat in rates.values())


def total(rates: dict) -> str:
    count = sum(flat["count"] for flat in rates.values())
    return f"{count}/{sum(flat['total'] for flat in rates.values())}"


def map_predicts() -> Iterator[str]:
    found = json.loads((HERE / "results" / "map_predicts.json").read_text())["suspects"]
    yield ("| backdoor | what the map says | trial repair (the score) | sham patching, all | at "
           "the trigger | phi | fires before | suggested set | 20 random sets, median "
           "(range) | dearer |")  # fmt: skip
    yield "|" + "---|" * 10
    for name, run in found.items():
        outcomes = (run["spearman"], run.get("spearman_trained", {}))

        def both(score: str, outcomes: tuple[dict, dict] = outcomes) -> str:
            return " / ".join(f"{of[score]:.2f}" if score in of else "-" for of in outcomes)

        fires = [flat["fires"]["count"] for flat in run["random"]]
        dearer = (
            run[f"dearer_at_{whose}_trigger_kl"] for whose in ("the_suggestions", "their_own")
        )
        yield (
            f"| {name} | {run['statement']} | **{both('score')}** | {both('effect')} | "
            f"{both('effect_trigger')} | {both('curvature')} | {short(run['fires_before'])} | "
            f"{rate(run['suggested_fires'])} | {statistics.median(fires):g}/"
            f"{run['random'][0]['fires']['total']} ({min(fires)} to {max(fires)}) | "
            f"{' / '.join(map(rate, dearer))} |"
        )


def seeds() -> Iterator[str]:
    found = json.loads((HERE / "results" / "seeds.json").read_text())["runs"]
    yield ("| backdoor, seed | verdict | attack success before | after | recovered | benign KL | "
           "predicted by the Fisher, measured in repair | perplexity | seconds, of them repair | "
           "modules, total rank, parameters |")  # fmt: skip
    yield "|" + "---|" * 10
    for name, run in found.items():
        before, after = run["perplexity"]
        failed = ", ".join(gate["name"] for gate in run["failed_gates"])
        yield (
            f"| {name} | {run['verdict']}{f' ({failed})' if failed else ''} | "
            f"{by_position(run['before'])} | {by_position(run['after'] or {})} | "
            f"{by_position(run['recovery'])} | {run['kl_from_original']:.1e} | "
            f"{nats(run.get('predicted_kl'))}, {nats(run.get('validation_benign_kl'))} | "
            f"{before:.4f} to {after:.4f} | "
            f"{run['seconds']:.0f}, {run['seconds_by_step']['repair']:.0f} | "
            f"{len(run['ranks'])}, {sum(run['ranks'].values())}, {run.get('num_changed', '-')} |"
        )


def pooled(rates: dict) -> str:
    count = sum(flat["count"] for flat in rates.values())
    return f"{count}/{sum(flat['total'] for flat in rates.values())}" if rates else "-"


def evidence() -> Iterator[str]:
    found = json.loads((HERE / "results" / "full_evidence.json").read_text())["suspects"]
    yield ("| suspect | verdict | fires before / after | elsewhere before / after | altered before "
           "/ after | ordinary uses right before / after | KL, clean answers / text | int8, int4 "
           "after | benign tuning, suspect / repaired | relearnt from 8, old / fresh / base "
           "| with the base's answer when triggered, before / after |")  # fmt: skip
    yield "|" + "---|" * 11
    for name, run in found.items():
        before, after = run["before"], run["after"] or {}
        stress = {flat["name"]: flat for flat in run["stresses"]}
        failed = ", ".join(gate["name"] for gate in run["gates"] if gate["passed"] is not True)
        base = run["trusted_base"]

        def of(key: str, who: str, stress: dict = stress) -> str:
            return short(stress[key][who]) if key in stress else "-"

        yield (
            f"| {name} | {run['verdict']}{f' ({failed})' if failed else ''} | "
            f"{by_position(before['attack_success'])} / "
            f"{by_position(after.get('attack_success', {})) or '-'} | "
            f"{pooled(before['elsewhere'])} / {pooled(after.get('elsewhere', {}))} | "
            f"{pooled(before['variants'])} / {pooled(after.get('variants', {}))} | "
            f"{short(before['ordinary'])} / {short(after.get('ordinary'))} | "
            f"{nats(after.get('kl_from_original'))} / {nats(after.get('text_kl'))} | "
            f"{of('int8', 'repaired')}, {of('int4', 'repaired')} | "
            f"{of('benign tuning', 'suspect')} / {of('benign tuning', 'repaired')} | "
            f"{of('relearning from 8', 'repaired')} / {of('relearning from 8', 'suspect')} / "
            f"{of('relearning from 8', 'base')} | "
            + (
                f"{short(base['suspect_agrees'])} / {short(base['repaired_agrees'])} |"
                if base
                else "- |"
            )
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
        ours, lora = rows["suggested: closed form"], rows["all modules: LoRA"]
        keys = ("kl_from_original", "held_out_benign_kl", "num_changed", "seconds")
        times = [lora[key] / ours[key] for key in keys]
        own = sum(flat["count"] for flat in ours["attack_success"].values())
        few = sum(count <= own for count in fires)
        more = statistics.median(left) / ours["held_out_trigger_kl"]
        yield (
            f"LoRA on all modules: {times[0]:.1f} times the closed form's benign KL "
            f"({times[1]:.1f} on answers or text, whichever moves more, held out), "
            f"{times[2]:.0f} times its parameters, {times[3]:.0f} times its seconds. Random draws: "
            f"{more:.0f} times its trigger KL (median); {few} of {len(fires)} leave as few "
            "payloads."
        )
        trained = rows["suggested: distillation from nothing"]
        yield (
            f"The closed form takes {ours['seconds'] / trained['seconds']:.1%} of the time of "
            f"distillation from nothing, {trained['setting']}."
        )
        yield ""


TABLES = {"map": map_predicts, "evidence": evidence, "seeds": seeds, "compare": compare}

if __name__ == "__main__":
    print("\n".join(TABLES[sys.argv[1]]()))
