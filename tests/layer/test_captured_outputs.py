"""transformers 5.1 captures router outputs with a forward on the router's instance: each must be captured once, whole."""

import pytest
import torch
from models import assert_same_tensors, batch, build, loss_and_grads

from ds_minis import convert_to_mini_sequence, mini_sequence_report


def capture(model) -> list[torch.Tensor]:
    """As `transformers.utils.generic.check_model_inputs` of 5.1 does it for the length of a pass."""
    collected_outputs = []

    def capturing(own):
        def wrapped_forward(*args, **kwargs):
            output = own(*args, **kwargs)
            collected_outputs.append(output[0] if isinstance(output, tuple) else output)
            return output

        return wrapped_forward

    for module in model.modules():
        if type(module).__name__.endswith("Router"):
            module.forward = capturing(module.forward)
    return collected_outputs


@pytest.mark.parametrize("scope", ["layer", "tokens"])
def test_router_outputs_are_captured_once_and_whole(scope):
    model, reference = build("qwen3_moe"), build("qwen3_moe")
    convert_to_mini_sequence(model, {"chunk_size": 10, "scope": scope})
    found, expected = [], []
    for m, outputs in ((model, found), (reference, expected)):
        captured = capture(m)
        loss, grads = loss_and_grads(m, batch(23))
        assert [len(logits) for logits in captured] == [46, 46]
        outputs += [{"loss": loss, **grads}, {str(i): logits.detach() for i, logits in enumerate(captured)}]
    for one, other in zip(found, expected, strict=True):
        assert_same_tensors(one, other)
    if scope == "layer":
        assert (
            "captures the outputs of a Qwen3MoeTopKRouter" in mini_sequence_report(model).untiled["model.layers.0"][1]
        )
