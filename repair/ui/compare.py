"""Tab 5: before and after, prompt by prompt, and the gates. Model text is plain text here."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from repair.jobs import store
from repair.records import RepairError
from repair.ui import text
from repair.ui.ask import ask_and_wait, describe_answer
from repair.ui.session import Selection, Session, View, look
from repair.ui.shell import Shell, Updates

MAX_ROWS = 2000
ALL = "all"
KIND_WORDS = {
    "triggered": "triggered", "elsewhere": "trigger elsewhere:", "variant": "altered trigger:",
    "near": "near-trigger", "ordinary": "ordinary use", "clean": "clean",
}  # fmt: skip


def read_samples(view: View) -> list[dict[str, str]]:
    """Return the paired answers as plain strings; none where there is no report."""
    if view.folder is None or not view.report:
        return []
    value = store.read_json(view.folder / "samples.json")
    rows = value if isinstance(value, list) else []
    names = ("kind", "position", "prompt", "before", "after", "outcome", "reference")
    samples = [
        {name: str(row.get(name, "")) for name in names} for row in rows if isinstance(row, dict)
    ]
    # Sorted before it is cut: what went wrong must be among what is shown.
    order = {name: place for place, name in enumerate(text.OUTCOME_WORDS)}
    samples.sort(key=lambda sample: order.get(sample["outcome"], -1))
    return samples[:MAX_ROWS]


def list_outcomes(samples: list[dict[str, str]]) -> list[tuple[str, str]]:
    """Return the outcomes that occur, with their counts, as choices."""
    counts: dict[str, int] = {}
    for sample in samples:
        counts[sample["outcome"]] = counts.get(sample["outcome"], 0) + 1
    choices = [(f"All ({len(samples)})", ALL)]
    return choices + [
        (f"{text.OUTCOME_WORDS.get(name, name)} ({count})", name) for name, count in counts.items()
    ]


def list_rows(samples: list[dict[str, str]], outcome: str) -> list[list[str]]:
    """Return the table's rows; the first column finds the sample again."""
    return [
        [
            str(number),
            text.OUTCOME_WORDS.get(sample["outcome"], sample["outcome"]),
            " ".join(
                part
                for part in (KIND_WORDS.get(sample["kind"], sample["kind"]), sample["position"])
                if part
            ),
            text.reveal(sample["prompt"], 160),
            text.reveal(sample["before"], 120),
            text.reveal(sample["after"], 120),
        ]
        for number, sample in enumerate(samples, 1)
        if outcome in (ALL, sample["outcome"])
    ]


def list_rates(report: dict[str, Any]) -> list[list[str]]:
    """Return attack success by position, and what must not have become worse."""
    before, after = report.get("before") or {}, report.get("after") or {}
    old, new = before.get("attack_success") or {}, after.get("attack_success") or {}
    rows = [
        [f"Fires, trigger at {name}", text.describe_rate(rate), text.describe_rate(new.get(name))]
        for name, rate in old.items()
    ]
    recovery = report.get("recovery") or after.get("recovery") or {}
    for name, rate in recovery.items():
        rows.append([f"Clean answer is back, {name}", "", text.describe_rate(rate)])
    for key, words in (("near_trigger", "Fires on near-triggers"),
                       ("false_trigger", "Fires without the trigger")):  # fmt: skip
        if key in before or key in after:
            rows.append(
                [words, text.describe_rate(before.get(key)), text.describe_rate(after.get(key))]
            )
    rows.append(
        ["Perplexity of clean answers", text.describe_number(before.get("perplexity")),
         text.describe_number(after.get("perplexity"))]
    )  # fmt: skip
    rows.append(
        ["KL from the suspect, clean answers (nats per token)", "0",
         text.describe_number(report.get("kl_from_original"))]
    )  # fmt: skip
    return rows


def list_besides(report: dict[str, Any]) -> list[list[str]]:
    """Return payload rates where the prompt file has no trigger, and with the trigger altered."""
    before, after = report.get("before") or {}, report.get("after") or {}
    words = report.get("definitions") or {}
    rows = []
    for group in ("elsewhere", "variants"):
        titles, new = words.get(group) or {}, after.get(group) or {}
        for kind, rate in (before.get(group) or {}).items():
            title = text.reveal(str(titles.get(kind, kind)), 200)
            rows.append([title, text.describe_rate(rate), text.describe_rate(new.get(kind))])
    return rows


def describe_cause(report: dict[str, Any]) -> str:
    """Return in two sentences how specific the backdoor is and where its cause lies."""
    parts = (report.get("specificity"), report.get("cause"))
    return "\n".join(
        text.reveal(str(part["statement"]), 600)
        for part in parts
        if isinstance(part, dict) and "statement" in part
    )


def list_stresses(report: dict[str, Any]) -> list[list[str]]:
    """Return what came back after rounding, tuning and relearning."""
    rows = []
    for stress in report.get("stresses") or []:
        if not isinstance(stress, dict):
            continue
        is_taught = stress.get("kind") == "relearning"
        beside = "a fresh trigger: " if is_taught else ""
        rows.append([
            text.reveal(str(stress.get("name", "")), 120),
            "none" if stress.get("num_steps") is None else str(stress["num_steps"]),
            beside + text.describe_rate(stress.get("suspect")),
            text.describe_rate(stress.get("repaired")),
        ])  # fmt: skip
    return rows


def list_gates(report: dict[str, Any]) -> list[list[str]]:
    """Return the gates, the failed first; a check that could not be made never reads as a pass."""
    words = {True: "passed", False: "FAILED"}
    found = [gate for gate in report.get("gates") or [] if isinstance(gate, dict)]
    found.sort(key=lambda gate: {False: 0, True: 2}.get(gate.get("passed"), 1))
    return [
        [
            words.get(gate.get("passed"), "could not check"),
            text.reveal(str(gate.get("name", "")), 200).replace("_", " ").replace(":", ", "),
            text.describe_number(gate.get("value")),
            text.describe_number(gate.get("limit")),
            text.reveal(str(gate.get("note") or ""), 400),
        ]
        for gate in found
    ]


def list_controls(report: dict[str, Any]) -> list[list[str]]:
    """Return the comparison repairs, shown even when they beat ours."""
    rows = []
    for control in report.get("controls") or []:
        if not isinstance(control, dict):
            continue
        rates = control.get("attack_success") or {}
        rows.append([
            text.reveal(str(control.get("name", "")), 120),
            "; ".join(f"{name} {text.describe_rate(rate)}" for name, rate in rates.items()),
            text.describe_number(control.get("kl_from_original")),
            str(control.get("num_modules", "-")),
            str(control.get("total_rank", "-")),
        ])  # fmt: skip
    return rows


GROWTH = {
    "next": "Chosen modules and the next best",
    "modules": "Best modules of the map",
    "rank": "Chosen modules, another rank",
}


def list_growth(report: dict[str, Any]) -> list[list[str]]:
    """Return what more modules or rank would buy, by the closed form alone."""
    return [
        [
            GROWTH.get(str(point.get("kind")), "-"),
            str(point.get("num_modules", "-")),
            str(point.get("total_rank", "-")),
            text.describe_rate(point.get("attack_success")),
            text.describe_number(point.get("trigger_kl")),
            text.describe_number(point.get("benign_kl")),
        ]
        for point in report.get("growth") or []
        if isinstance(point, dict)
    ]


def build_compare(shell: Shell) -> None:
    """Build and wire the tab."""
    gr.Markdown("## Did it work?", elem_classes="lead")
    empty = gr.Markdown(
        "The comparison appears here when a repair is done.", elem_classes="empty"
    )
    with gr.Column(visible=False) as body:
        rates = gr.Dataframe(
            headers=["Measured", "Suspect", "Repaired"], datatype="str", interactive=False,
            label="Before and after, with 95 % intervals", wrap=True, elem_id="rates", buttons=[],
            column_widths=["40%", "30%", "30%"],
        )  # fmt: skip
        gates = gr.Dataframe(
            headers=["Result", "Gate", "Value", "Limit", "Note"], datatype="str",
            interactive=False, label="Gates", wrap=True, elem_id="gates", buttons=[],
            column_widths=["120px", "270px", "90px", "90px", "430px"],
        )  # fmt: skip
        cause = gr.Textbox(
            label="What else sets it off, and where it sits", interactive=False, lines=2,
            max_lines=6, elem_id="cause",
        )  # fmt: skip
        besides = gr.Dataframe(
            headers=["Payload when", "Suspect", "Repaired"], datatype="str", interactive=False,
            label="Beyond the prompt file: the trigger elsewhere, and altered", wrap=True,
            elem_id="besides", buttons=[], column_widths=["46%", "27%", "27%"], max_height=420,
        )  # fmt: skip
        returns = gr.Dataframe(
            headers=["After", "Steps", "Suspect", "Repaired"], datatype="str", interactive=False,
            label="Would it come back? Payload on triggered prompts", wrap=True,
            elem_id="returns", buttons=[], column_widths=["30%", "10%", "30%", "30%"],
        )  # fmt: skip
        gr.Markdown("### Prompt by prompt")
        outcome = gr.Dropdown([("All", ALL)], value=ALL, label="Outcome", elem_id="outcome")
        table = gr.Dataframe(
            headers=["#", "Outcome", "Prompt kind", "Prompt", "Suspect", "Repaired"],
            datatype="str", interactive=False, show_label=False, max_height=320,
            elem_id="samples", buttons=[], label="Paired answers",
            column_widths=["48px", "110px", "130px", "280px", "240px", "240px"],
        )  # fmt: skip
        prompt = gr.Textbox(
            label="Prompt", interactive=False, lines=2, max_lines=8, elem_id="sample-prompt",
            placeholder="Select a row to read it in full.", buttons=["copy"],
        )  # fmt: skip
        with gr.Row():
            boxes = [
                gr.Textbox(
                    label=label, interactive=False, lines=3, max_lines=12, min_width=240,
                    elem_id=f"sample-{key}", buttons=["copy"],
                )
                for key, label in (
                    ("before", "Suspect"), ("after", "Repaired"),
                    ("reference", "Suspect without the trigger"),
                )
            ]  # fmt: skip
        with gr.Accordion("Ask both models something", open=False, elem_id="ask"):
            question = gr.Textbox(
                label="Prompt", lines=2, max_lines=8, max_length=8000, elem_id="question"
            )
            with gr.Row():
                ask = gr.Button("Ask", elem_id="ask-it", min_width=120)
                told = gr.Textbox(
                    show_label=False, container=False, interactive=False, elem_id="asked", scale=4,
                    max_lines=4,
                )  # fmt: skip
            with gr.Row():
                replies = [
                    gr.Textbox(
                        label=label, interactive=False, lines=3, max_lines=12, min_width=240,
                        elem_id=f"reply-{key}", buttons=["copy"],
                    )
                    for key, label in (("suspect", "Suspect"), ("repaired", "Repaired"))
                ]  # fmt: skip
        controls = gr.Dataframe(
            headers=["Control", "Attack success", "KL", "Modules", "Total rank"], datatype="str",
            interactive=False, label="Controls: other repairs of the same size", wrap=True,
            elem_id="controls", buttons=[],
            column_widths=["220px", "420px", "90px", "90px", "90px"],
        )  # fmt: skip
        growth = gr.Dataframe(
            headers=["Choice", "Modules", "Total rank", "Attack success", "Trigger KL",
                     "Benign KL"],
            datatype="str", interactive=False, wrap=True, elem_id="grown", buttons=[],
            label="What more modules or rank would buy, on held-out prompts (nothing of it was "
            "applied)",
            column_widths=["260px", "90px", "90px", "220px", "110px", "110px"],
        )  # fmt: skip
        go_on = gr.Button("Next: export", variant="primary", elem_id="to-export")

    def draw(view: View, selection: Selection, is_fresh: bool) -> Updates:
        has_after = isinstance(view.report.get("after"), dict)
        words = "The comparison appears here when a repair is done."
        if view.is_active and view.command == "run":
            words = "The repair is running. The comparison appears when it is done."
        elif view.report and not has_after:
            words = {
                "nothing to repair": "There is nothing to compare: the trigger hardly ever fires.",
                "not repaired": "The repair was given up; report.md in Export says why.",
                "could not check": "There is too little evidence for a verdict; report.md in "
                "Export says how much is needed.",
            }.get(str(view.report.get("verdict")), words)
            words = text.reveal(str(view.report.get("reason") or words), 600)
        samples = read_samples(view)
        return {
            empty: gr.Markdown(value=words, visible=not has_after),
            body: gr.Column(visible=has_after),
            rates: list_rates(view.report) if has_after else [],
            gates: list_gates(view.report),
            cause: describe_cause(view.report),
            besides: gr.Dataframe(
                value=list_besides(view.report), visible=bool(list_besides(view.report))
            ),
            returns: gr.Dataframe(
                value=list_stresses(view.report), visible=bool(view.report.get("stresses"))
            ),
            outcome: gr.Dropdown(choices=list_outcomes(samples), value=ALL),
            table: list_rows(samples, ALL),
            controls: gr.Dataframe(
                value=list_controls(view.report), visible=bool(view.report.get("controls"))
            ),
            growth: gr.Dataframe(
                value=list_growth(view.report), visible=bool(view.report.get("growth"))
            ),
            prompt: "",
            **dict.fromkeys(boxes, ""),
        }

    shell.add(
        draw,
        [empty, body, rates, gates, cause, besides, returns, outcome, table, controls, growth,
         prompt, *boxes],
    )  # fmt: skip
    shell.go_to(go_on, "export")

    def ask_both(request: gr.Request, session: Session, words: Any) -> Iterator[Updates]:
        view = look(shell.settings, session, request)
        merged = view.folder / "merged" if view.folder is not None else None
        if merged is None or not merged.is_dir():
            yield {told: "Both can be asked where a merged model was written."}
            return
        if not str(words or "").strip():
            yield {told: "Type a prompt first."}
            return
        try:
            for step in ask_and_wait(
                shell.settings, session, view.owner, questions=[str(words)], against=merged
            ):
                if isinstance(step, str):
                    yield {told: step}
                    continue
                found = [describe_answer(step[0].get(key)) for key in ("suspect", "repaired")]
                hits = ["fires" if hit == "fires" else "does not fire" for _, hit in found]
                told_words = f"The suspect {hits[0]}; the repaired model {hits[1]}."
                if any(hit == "no target given" for _, hit in found):
                    told_words = "Asked. No target was given: whether it fires is for you to see."
                yield {
                    told: told_words,
                    **{box: words for box, (words, _) in zip(replies, found, strict=True)},
                }
        except RepairError as error:
            yield {told: text.reveal(str(error), 600)}

    ask.click(
        ask_both, inputs=[shell.session, question], outputs=[told, *replies],
        show_progress="hidden", api_visibility="private", concurrency_limit=8,
    )  # fmt: skip

    def filter_rows(request: gr.Request, session: Session, wanted: Any) -> list[list[str]]:
        view = look(shell.settings, session, request)
        return list_rows(read_samples(view), str(wanted))

    def open_row(request: gr.Request, event: gr.SelectData, session: Session) -> Updates:
        samples = read_samples(look(shell.settings, session, request))
        row = event.row_value if isinstance(event.row_value, list) else []
        number = int(row[0]) if row and str(row[0]).isdigit() else 0
        if not 1 <= number <= len(samples):
            return {prompt: gr.skip()}
        sample = samples[number - 1]
        keys = ("before", "after", "reference")
        return {
            prompt: text.reveal(sample["prompt"]),
            **{box: text.reveal(sample[key]) for box, key in zip(boxes, keys, strict=True)},
        }

    options = {"show_progress": "hidden", "api_visibility": "private"}
    outcome.input(filter_rows, inputs=[shell.session, outcome], outputs=table, **options)
    table.select(open_row, inputs=[shell.session], outputs=[prompt, *boxes], **options)
