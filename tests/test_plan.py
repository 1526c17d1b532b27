"""What was asked for is what is repaired, or one sentence says why not."""

import pytest

from repair.plan import check_request
from repair.records import ModuleRef, RepairError

MODULES = tuple(
    ModuleRef(
        layer=layer, component="up_proj", path=f"model.layers.{layer}.mlp.up_proj", d_in=32,
        d_out=48,
    )
    for layer in range(4)
)  # fmt: skip


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"modules": 99}, "99 modules were asked for; this model has 4"),
        ({"modules": ["model.layers.9.mlp.up_proj"]}, "no linear module"),
        ({"modules": "auto", "rank": 33}, "Rank 33 is not possible.*Choose 1 to 32"),
    ],
)
def test_what_the_model_has_not_is_refused(request_: dict, words: str) -> None:
    with pytest.raises(RepairError, match=words):
        check_request(request_, MODULES)


@pytest.mark.parametrize(
    "request_",
    [{"modules": 4}, {"modules": [MODULES[1].path]}, {"modules": "auto", "rank": 32}],
)
def test_what_the_model_has_is_accepted(request_: dict) -> None:
    check_request(request_, MODULES)
