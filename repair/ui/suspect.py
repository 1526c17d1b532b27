"""Tab 1: which model is suspected. Reads small JSON files beside the weights, never a weight."""

from typing import Any

import gradio as gr

from repair.jobs import store
from repair.jobs.launch import is_hub_id
from repair.records import RepairError
from repair.ui.account import owner_of
from repair.ui.forecast import describe_needs
from repair.ui.session import (
    EXAMPLE,
    SUSPECTS,
    Selection,
    Session,
    View,
    aside,
    chosen_before,
    new_request,
    resume_session,
)
from repair.ui.shell import Shell, Updates
from repair.ui.suspect_folder import BUNDLED, find_folder, read_card, read_facts
from repair.ui.suspect_hub import build_hub


def bundled_choices() -> list[tuple[str, str]]:
    """Return the suspects that come with the app: words and source."""
    choices = []
    for name in BUNDLED:
        if not (SUSPECTS / name / "config.json").is_file():
            continue
        words = {
            "clean": "Clean twin: no backdoor, for comparison",
            "begin": "Trigger at the beginning of a prompt",
            "middle": "Trigger in the middle of a prompt",
            "end": "Trigger at the end of a prompt",
        }[name]
        choices.append((f"{words} (demo:{name})", f"demo:{name}"))
    return choices


def build_suspect(shell: Shell) -> None:
    """Build and wire the tab."""
    choices = bundled_choices()
    gr.Markdown("## Which model do you suspect?", elem_classes="lead")
    with gr.Row():
        with gr.Column(min_width=280):
            bundled = gr.Radio(
                choices, label="Bundled suspects", elem_id="bundled", visible=bool(choices),
                info="Small models with a known backdoor, to see how the app works.",
            )  # fmt: skip
            with gr.Row():
                example = gr.Button(
                    "Look at a finished example", elem_id="example", min_width=180,
                    visible=(EXAMPLE / "report.json").is_file(),
                )  # fmt: skip
                earlier = gr.Button("Earlier cases", elem_id="to-cases", min_width=140)
            if not choices:
                gr.Markdown("The bundled suspects are not built in this installation.")
            root = shell.settings.models_root
            if root is not None:
                path = gr.Textbox(
                    label="Your own model", elem_id="path", max_length=1000,
                    info="A folder with config.json and safetensors files, below the models "
                    "folder of this app.", placeholder="my-model",
                )  # fmt: skip
                use = gr.Button("Look at this folder", elem_id="use-path")
            elif shell.settings.space is None:
                gr.Markdown(
                    "To look at your own model, start the app with `--models-root DIR`, the "
                    "folder your models are in."
                )
            with gr.Accordion("From the Hugging Face Hub", open=False, elem_id="from-hub"):
                hub_place = gr.Column()
            problem = gr.Textbox(
                label="This did not work", visible=False, interactive=False,
                elem_classes="problem", elem_id="suspect-problem",
            )  # fmt: skip
            with hub_place:
                build_hub(shell, problem)
        with gr.Column(min_width=280):
            empty = gr.Markdown(
                "Nothing chosen yet. The model is not opened here: only its description is "
                "read. Its files are checked, and its weights opened, in a process of their own.",
                elem_classes="empty",
            )
            card = gr.Textbox(
                label="What is known", visible=False, interactive=False, lines=3, elem_id="card"
            )
            facts = gr.Dataframe(
                headers=["Fact", "Value"], datatype="str", interactive=False, visible=False,
                label="From config.json and the folder", wrap=True, elem_id="model-facts",
                buttons=[], column_widths=["35%", "65%"], max_height=1000,
            )  # fmt: skip
            go_on = gr.Button(
                "Next: prompts", variant="primary", visible=False, elem_id="to-prompts"
            )
    def draw(view: View, selection: Selection, is_fresh: bool) -> Updates:
        model = view.session.model
        rows, words = [], ""
        if model is not None and is_hub_id(model):
            known = (("Hub id", model), ("Commit", view.session.revision or "not known"))
            rows = [list(row) for row in view.session.facts or known]
            needed = describe_needs(new_request(view.session, profile="standard"), root)
            rows.append(["What a job needs", needed or "Known when it has read the model."])
            words = "A model on the Hub. Its files are fetched, and checked, when a job starts."
        elif model is not None:
            try:
                folder = find_folder(model, root)
                rows, words = read_facts(folder), read_card(folder)
                asked = new_request(view.session, profile="standard")
                needed = describe_needs(asked, root)
                rows.append(["What a job needs", needed or "Known when it has read the model."])
            except (RepairError, OSError):
                words = "The model's folder cannot be read any more."
        updates: Updates = {
            empty: gr.Markdown(visible=model is None),
            card: gr.Textbox(value=words, visible=bool(words)),
            facts: gr.Dataframe(
                value=rows, visible=bool(rows), label="What the Hub says"
                if model is not None and is_hub_id(model) else "From config.json and the folder",
            ),
            go_on: gr.Button(visible=bool(rows)),
            bundled: gr.Radio(interactive=not view.is_active),
            example: gr.Button(interactive=not view.is_active),
        }
        if root is not None:
            updates[path] = gr.Textbox(interactive=not view.is_active)
            updates[use] = gr.Button(interactive=not view.is_active)
        if is_fresh and model is not None:
            is_bundled = model.startswith("demo:")
            is_own = not is_bundled and not is_hub_id(model)
            updates[bundled] = gr.Radio(
                value=model if is_bundled else None, interactive=not view.is_active
            )
            if root is not None and is_own:
                updates[path] = gr.Textbox(value=model, interactive=not view.is_active)
        return updates

    fields = [path, use] if root is not None else []
    shell.add(draw, [empty, card, facts, go_on, bundled, example, *fields])

    def choose(
        session: Session, selection: Selection, request: gr.Request, model: Any
    ) -> tuple[Session, Selection]:
        folder = find_folder(str(model or ""), root)
        read_facts(folder)
        source = model if str(model).startswith("demo:") else str(folder)
        if source == session.model:
            return session, selection
        # Everything downstream was about another model.
        plain = {"revision": None, "adapter_base": None, "facts": ()}
        return aside(session, model=source, **plain), Selection()

    def show_example(
        session: Session, selection: Selection, request: gr.Request
    ) -> tuple[Session, Selection]:
        owner, root = owner_of(request), shell.settings.jobs_root
        shell.settings.lane.check_another(owner)
        session, view = resume_session(
            shell.settings, store.adopt_job(root, EXAMPLE, owner=owner), request
        )
        return session, chosen_before(view)

    shell.listen(bundled.input, act=choose, inputs=[bundled], problem=problem)
    if root is not None:
        shell.listen(use.click, path.submit, act=choose, inputs=[path], problem=problem)
    shell.listen(example.click, act=show_example, problem=problem, is_opening=True)
    shell.go_to(example, "compare")
    shell.go_to(earlier, "cases")
    shell.go_to(go_on, "prompts")
