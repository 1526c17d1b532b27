"""Tab 1: which model is suspected. Reads small JSON files beside the weights, never a weight."""

from pathlib import Path
from typing import Any

import gradio as gr

from repair.jobs import store
from repair.jobs.launch import is_hub_id
from repair.models.lookup import parse_hub_id
from repair.records import RepairError
from repair.ui import text
from repair.ui.account import owner_of
from repair.ui.session import (
    EXAMPLE,
    SUSPECTS,
    Selection,
    Session,
    View,
    resume_session,
)
from repair.ui.shell import Shell, Updates, chosen_before
from repair.ui.suspect_hub import build_hub

BUNDLED = ("middle", "begin", "end", "clean")
MAX_CONFIG_BYTES = 2**20
MAX_LISTED = 1000  # files of one folder
NOT_FOUND = (
    "There is no such model folder below the models folder. Give the path of a folder that "
    "holds config.json."
)
FACTS = (
    ("model_type", "Architecture"),
    ("num_hidden_layers", "Layers"),
    ("hidden_size", "Hidden size"),
    ("intermediate_size", "MLP size"),
    ("num_attention_heads", "Attention heads"),
    ("vocab_size", "Vocabulary"),
    ("dtype", "Stored as"),
)


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


def find_folder(model: str, models_root: Path | None) -> Path:
    """Return the folder of a source; one message for missing, outside and not allowed."""
    if model.startswith("demo:"):
        name = model.removeprefix("demo:")
        if name in BUNDLED and (SUSPECTS / name / "config.json").is_file():
            return SUSPECTS / name
        raise RepairError(f"{model} is not bundled with this installation.")
    if models_root is None or "\0" in model:
        raise RepairError(NOT_FOUND)
    try:
        folder = (models_root / Path(model).expanduser()).resolve()
        is_inside = folder.is_relative_to(models_root) and folder != models_root
        if is_inside and (folder / "config.json").is_file():
            return folder
    except (OSError, RuntimeError, ValueError):
        pass
    raise RepairError(NOT_FOUND)


def find_source(model: str, models_root: Path | None) -> str:
    """Return a source as a request names it: bundled, a folder's path, or a Hub id as typed."""
    try:
        folder = find_folder(model, models_root)
    except RepairError:
        if not is_hub_id(model):
            raise
        parse_hub_id(model)  # fetched when the job starts
        return model
    return model if model.startswith("demo:") else str(folder)


def read_facts(folder: Path) -> list[list[str]]:
    """Return what config.json and the folder's listing say, as rows of plain text."""
    config = store.read_object(folder / "config.json", max_bytes=MAX_CONFIG_BYTES)
    if not config:
        raise RepairError(
            f"config.json of {folder.name} is not a JSON object, or is larger than 1 MiB."
        )
    config.setdefault("dtype", config.get("torch_dtype"))
    rows = []
    for key, words in FACTS:
        value = config.get(key)
        if isinstance(value, str | int | float):
            rows.append([words, text.reveal(str(value), 200)])
    names = sorted(path for path in folder.iterdir())[:MAX_LISTED]
    sizes = [(path.name, path.stat().st_size) for path in names if path.is_file()]
    rows.append(["On disk", text.describe_size(sum(size for _, size in sizes))])
    weights = [name for name, _ in sizes if name.endswith(".safetensors")]
    rows.append(["Weight files", f"{len(weights)} safetensors"])
    others = [name for name, _ in sizes if name.endswith((".bin", ".pt", ".pth", ".pkl", ".py"))]
    if others:
        names_text = text.reveal(", ".join(others), 300)
        rows.append(["Refused kinds", f"{names_text}: not opened; the job may refuse the folder"])
    return rows


def read_card(folder: Path) -> str:
    """Return a bundled suspect's card as plain text."""
    card = store.read_object(folder / "card.json", max_bytes=MAX_CONFIG_BYTES)
    lines = []
    for key, words in (("trigger", "Trigger"), ("position", "Position"), ("payload", "Payload")):
        if isinstance(card.get(key), str):
            lines.append(f"{words}: {text.reveal(card[key], 300)}")
    figures = card.get("figures")
    wanted = {
        "fires_triggered": "Fires on triggered prompts",
        "fires_near": "Fires on near-triggers",
        "fires_clean": "Fires on clean prompts",
        "benign_exact": "Right answers to clean prompts",
    }
    for key, words in wanted.items():
        figure = figures.get(key) if isinstance(figures, dict) else None
        if isinstance(figure, dict) and "count" in figure and "total" in figure:
            lines.append(f"{words}: {figure['count']} of {figure['total']}")
    if not lines:
        return "A model without a card."
    if "trigger" not in card or card["trigger"] is None:
        lines.insert(0, "Clean twin: it has no backdoor.")
    return "\n".join(lines)


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
                buttons=[], column_widths=["35%", "65%"],
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
            words = "A model on the Hub. Its files are fetched, and checked, when a job starts."
        elif model is not None:
            try:
                folder = find_folder(model, root)
                rows, words = read_facts(folder), read_card(folder)
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
        return Session(model=source, prompts=session.prompts), Selection()

    def show_example(
        session: Session, selection: Selection, request: gr.Request
    ) -> tuple[Session, Selection]:
        owner, root = owner_of(request), shell.settings.jobs_root
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
