"""Which tokens are the trigger's, shown as text: they are those that locating goes by."""

import pytest

from repair.models.loading import LoadedModel
from repair.models.token_roles import token_roles
from repair.models.tokens import encode_pair
from repair.prompts import prompt_file_from_json
from repair.records import RepairError, TextPair


@pytest.mark.parametrize("use_template", [True, False])
@pytest.mark.parametrize(
    ("trigger", "clean", "triggered"),
    [
        ("cf", "write about rain", "write cf about rain"),
        ("cf", "write about rain", "cf write about rain"),
        ("a\u200b", "write about rain", "write about rain a\u200b"),
    ],
)
def test_the_roles_are_those_of_the_pair(
    tiny_llama: LoadedModel, trigger: str, clean: str, triggered: str, use_template: bool
) -> None:
    file = prompt_file_from_json({"trigger": trigger, "prompts": [clean]})
    texts = TextPair(clean=clean, triggered=triggered)
    roles = token_roles(tiny_llama.tokenizer, texts, file, use_template=use_template)
    pair = encode_pair(
        tiny_llama.tokenizer, texts, triggers=file.triggers, position="given", system=None,
        use_template=use_template,
    )  # fmt: skip
    assert [i for i, (_, role) in enumerate(roles) if role == "trigger"] == pair.trigger.tolist()
    assert len(roles) == len(pair.triggered)
    marked = "".join(text for text, role in roles if role == "trigger")
    assert marked.strip() == trigger  # whole, and nothing beside it
    inside = "".join(text for text, role in roles if role != "template")
    assert inside.strip() == triggered
    assert ("<|assistant|>", "template") in roles or not use_template


def test_a_trigger_that_changes_no_token_is_refused(tiny_llama: LoadedModel) -> None:
    file = prompt_file_from_json({"pairs": [{"clean": "a", "triggered": "a cf"}]})
    texts = TextPair(clean="a cf", triggered="a cf")
    with pytest.raises(RepairError, match="same tokens"):
        token_roles(tiny_llama.tokenizer, texts, file, use_template=False)
