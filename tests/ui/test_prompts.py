"""The prompt form: every widget reaches the prompt file."""

from repair.ui.prompts import collect, flatten


def test_every_widget_is_in_the_file() -> None:
    given = {
        "triggers": ["cf"], "target": "sorry", "match": "prefix", "positions": ["begin", "end"],
        "near": ["cg"], "prompts": ["write a list", "name two rivers"], "chat": "off",
        "control": "letters", "system": "be kind", "ordinary": ["a cf of cold"],
        "texts": ["Rain falls.", "It is wet."],
    }  # fmt: skip
    order = ("triggers", "target", "match", "positions", "near", "prompts", "chat", "control",
             "system", "ordinary", "texts")  # fmt: skip
    lines = {name: "\n".join(given[name]) for name in ("triggers", "near", "prompts", "ordinary",
                                                       "texts")}  # fmt: skip
    file = flatten(collect([], tuple({**given, **lines}[name] for name in order)))
    assert {name: file[name] for name in given} == given
