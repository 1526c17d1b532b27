"""A triggered prompt token by token: which tokens are the trigger's, which the template's.

It is what locating goes by (`tokens.encode_pair`), in words: so an analyst sees whether the
tokenizer keeps the trigger as expected, before anything is measured.
"""

from repair.models.tokens import encode_pair, encode_rendered, render
from repair.records import PromptFile, TextPair

MAX_SHOWN = 400  # tokens of one prompt


def token_roles(
    tokenizer, texts: TextPair, file: PromptFile, *, use_template: bool
) -> list[tuple[str, str]]:
    """Return (text, role) of each token that the model is sent for `texts.triggered`.

    The roles are trigger, prompt and template. A token without characters of its own has its
    name in the vocabulary; one that spells only a further part of the same character has "".
    Raises RepairError where the trigger changes no token.
    """
    pair = encode_pair(
        tokenizer, texts, triggers=file.triggers, position="given", system=file.system,
        use_template=use_template,
    )  # fmt: skip
    rendered = render(tokenizer, texts.triggered, system=file.system, use_template=use_template)
    ids, offsets = encode_rendered(
        tokenizer, rendered, texts.triggered, use_template=use_template
    )
    inner = rendered.rfind(texts.triggered.strip()) if use_template else 0
    trigger, found, before = set(pair.trigger.tolist()), [], None
    for index, (start, end) in enumerate(offsets[:MAX_SHOWN]):
        if start == end:
            text = str(tokenizer.convert_ids_to_tokens(int(ids[index])))
        else:
            text = "" if (start, end) == before else rendered[start:end]
        before = (start, end)
        is_outside = end <= inner or start == end or index >= len(ids) - pair.num_template
        role = "trigger" if index in trigger else "template" if is_outside else "prompt"
        found.append((text, role))
    return found
