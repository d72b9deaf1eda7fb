"""Where the layer number of a module name is, in the names of the families there are."""

from __future__ import annotations

import pytest

from soppu.module_names import split_layer


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.layers.7.mlp.up_proj", ("model.layers.", 7, ".mlp.up_proj")),
        ("transformer.h.11.attn.c_attn", ("transformer.h.", 11, ".attn.c_attn")),
        (
            "model.layers.3.experts.5.w1",
            ("model.layers.", 3, ".experts.5.w1"),
        ),  # the first counts
        ("lm_head", None),
        ("model.layers", None),
        ("blocks.3", None),  # a layer itself is no module of it
        ("model.l4yers.q_proj", None),
    ],
)
def test_the_layer_number_is_the_first_part_that_is_a_number(
    name: str, parts: tuple[str, int, str] | None
) -> None:
    assert split_layer(name) == parts
    if parts:
        assert f"{parts[0]}{parts[1]}{parts[2]}" == name
