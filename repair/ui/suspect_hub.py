"""The part of tab 1 that takes a suspect from the Hub: look it up, see what it is, sign in."""


import gradio as gr

from repair.models.lookup import HubModel, describe_account, look_up, read_config
from repair.records import RepairError
from repair.ui import text
from repair.ui.account import TOKENS, name_of, owner_of, token_of
from repair.ui.forecast import remember
from repair.ui.session import Selection, Session, View, aside
from repair.ui.shell import Shell, Updates

MAX_TOKEN = 400


def facts_of(found: HubModel) -> tuple[tuple[str, str], ...]:
    """Return what the Hub says about a model, as rows of plain text."""
    access = "anyone" if found.is_shared else "only with a token: kept for this job alone"
    return (
        ("Hub id", found.repo_id),
        ("Asked for", found.asked or "the default branch"),
        ("Commit", found.commit),
        ("To download", text.describe_size(found.num_bytes)),
        ("Files", text.reveal(", ".join(found.sizes), 600)),
        ("Licence", " ".join([found.licence or "not said", *found.licence_terms.values()])),
        ("May be read by", access),
    )


def find_base(adapter: HubModel, base: str, token: str | None) -> HubModel:
    """Return the whole model that an adapter is put on; raises RepairError for no such."""
    if not base:
        raise RepairError(
            f"{adapter.repo_id} is a LoRA adapter, not a whole model. Give its base as well: the "
            "model that it was made for."
        )
    found = look_up(base, token=token)
    if found.kind != "model":
        raise RepairError(f"The base {found.repo_id} is an adapter too. Give a whole model.")
    return found


def describe_login(request: gr.Request | None, shell: Shell) -> str:
    """Return in words whose Hub token this visitor's jobs use."""
    name = name_of(request)
    if name is not None:
        return f"Signed in as {name}."
    if TOKENS.find(owner_of(request)):
        return "Using the token you gave; it is kept in memory until the app ends."
    if shell.settings.space is not None:
        return "Not signed in: public models only."
    return (
        "Using this machine's own login."
        if token_of(request)
        else "No token: public models only, and no upload."
    )


def build_hub(shell: Shell, problem: gr.Textbox) -> None:
    """Build and wire the section."""
    space = shell.settings.space
    hub_id = gr.Textbox(
        label="Hub id", elem_id="hub-id", max_length=400, placeholder="owner/name@revision",
        info="The owner's name, a slash, the model's name; behind an @ a branch, tag or commit. "
        "Only its description and config.json are read now; files come when a job starts.",
    )  # fmt: skip
    base_id = gr.Textbox(
        label="Base of an adapter", elem_id="base-id", max_length=400, placeholder="owner/name",
        info="Only where the suspect is a LoRA adapter: the whole model that it was made for. What "
        "the adapter names itself is not trusted.",
    )  # fmt: skip
    find = gr.Button("Look it up", elem_id="find-hub")
    account = gr.Textbox(
        label="Hub account", interactive=False, elem_id="hub-account", max_lines=2,
    )  # fmt: skip
    typed: list[gr.Textbox | gr.Button] = []
    if space is None:
        typed = [
            gr.Textbox(
                label="Hub token", type="password", elem_id="hub-token", max_length=MAX_TOKEN,
                info="For private or gated models, and to upload. Kept in memory only.",
            ),
            gr.Button("Use this token", elem_id="use-token"),
            gr.Button("Forget the token", elem_id="forget-token"),
        ]  # fmt: skip

    def draw(view: View, selection: Selection, is_fresh: bool) -> Updates:
        is_free = not view.is_active
        return {
            find: gr.Button(interactive=is_free),
            hub_id: gr.Textbox(interactive=is_free),
            base_id: gr.Textbox(interactive=is_free),
        }

    shell.add(draw, [find, hub_id, base_id])

    def choose(
        session: Session, selection: Selection, request: gr.Request, source: object, base: object
    ) -> tuple[Session, Selection]:
        token = token_of(request)
        found = look_up(str(source or ""), token=token)
        facts, whole, base_source = facts_of(found), found, None
        if found.kind == "adapter":
            whole = find_base(found, str(base or "").strip(), token)
            base_source = f"{whole.repo_id}@{whole.commit}"
            facts += (("Base", whole.repo_id), ("Base's commit", whole.commit))
        remember(whole, read_config(whole, token=token))
        if space is not None and whole.num_bytes > space.max_model_bytes:
            raise RepairError(
                f"{whole.repo_id} has {text.describe_size(whole.num_bytes)}; this Space takes "
                f"{text.describe_size(space.max_model_bytes)}. Duplicate the Space on larger "
                "hardware, or use a machine of your own."
            )
        wanted = {
            "model": found.repo_id, "revision": found.commit, "adapter_base": base_source,
        }  # fmt: skip
        if all(getattr(session, name) == value for name, value in wanted.items()):
            return session, selection
        return aside(session, facts=facts, **wanted), Selection()

    shell.listen(
        find.click, hub_id.submit, base_id.submit, act=choose, inputs=[hub_id, base_id],
        problem=problem,
    )  # fmt: skip

    def show_account(request: gr.Request) -> str:
        return describe_login(request, shell)

    options = shell.quiet
    shell.on_load.append((show_account, account))
    if typed:
        token, use, forget = typed

        def use_token(request: gr.Request, value: object) -> tuple[str, str]:
            try:
                words = describe_account(str(value or "").strip())
            except RepairError as error:
                return str(error), ""
            TOKENS.keep(owner_of(request), str(value).strip())
            return f"Token of {words}; kept in memory until the app ends.", ""

        def forget_token(request: gr.Request) -> tuple[str, str]:
            TOKENS.keep(owner_of(request), None)
            return describe_login(request, shell), ""

        use.click(use_token, inputs=[token], outputs=[account, token], **options)
        forget.click(forget_token, outputs=[account, token], **options)
