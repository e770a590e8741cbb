"""Static layer drop: which layers go, and that the model without them is what skipping them would be."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtale_lightning.evaluation.cost import expected_execution, flops_ratio, kv_bytes_per_token
from qtale_lightning.metrics import ExecutionRatio
from qtale_lightning.models import Routing
from qtale_lightning.module import QTALEModule
from qtale_lightning.routing import METHODS, Rows
from qtale_lightning.routing.methods.static import block_influence
from tests.objectives import objective
from tests.routing.conftest import dense
from tests.tolerance import close, depth

STATIC = METHODS["static"]
ROWS = Rows([[5, 9, 40, 7], [11, 3, 64, 22, 90, 8]], 0.0)


def make_module(**options: Any) -> QTALEModule:
    settings = {"name": "tiny", "target_ratio": 0.7, "lora_dropout": 0.0} | options
    module = QTALEModule(**objective("static"), **settings)
    module.rows = ROWS
    return module


def test_influence_is_one_minus_the_cosine_of_what_a_layer_reads_and_gives() -> None:
    base = dense()
    states: list[list[Tensor]] = []
    for sequence in ROWS.sequences:
        with torch.no_grad():
            found = base.model(torch.tensor([sequence]), output_hidden_states=True).hidden_states
        states.append([*found])
    # Hugging Face's last state is behind the final norm: the last layer is left to the test below.
    for layer in range(4):
        pairs = [(one[layer][0], one[layer + 1][0]) for one in states]
        cosines = [torch.cosine_similarity(x, y, dim=-1) for x, y in pairs]
        expected = 1 - torch.cat(cosines).double().mean()
        assert float(block_influence(base, ROWS)[layer]) == pytest.approx(float(expected), rel=1e-5)


def test_layers_that_change_nothing_go_first() -> None:
    base = dense()
    with torch.no_grad():
        for index in (1, 4):
            base.model.layers[index].self_attn.o_proj.weight.zero_()
            base.model.layers[index].mlp.down_proj.weight.zero_()
    fields = STATIC.fields(5, 2, 0.6, 0)
    assert (fields["num_hidden_layers"], fields["start_layer"]) == (3, 3)
    assert STATIC.measure(base, ROWS, fields) == {"dropped_layers": [1, 4]}
    before = base(torch.tensor([[5, 9, 40]])).logits
    STATIC.change(base, {"dropped_layers": [1, 4]})
    assert torch.equal(base(torch.tensor([[5, 9, 40]])).logits, before)


def test_the_model_is_the_base_without_its_dropped_layers() -> None:
    module = make_module()
    module.configure_model()
    config = module.model.config
    assert (config.num_hidden_layers, len(config.dropped_layers)) == (4, 2)
    reference = QTALEModule(name="tiny", lora_dropout=0.0, **objective("full"))
    reference.configure_model()
    tokens, kept = torch.arange(5, 25)[None], [i for i in range(6) if i not in config.dropped_layers]
    with torch.no_grad():
        found = module.model.eval()(tokens, use_cache=False).logits
        model = reference.model.eval()
        model.model.layers = torch.nn.ModuleList([model.model.layers[i] for i in kept])
        model.config.num_hidden_layers = 4
        routing = Routing()
        close(found, model(tokens, routing=routing, use_cache=False).logits, depth(config))


def test_a_dropped_layer_counts_as_never_executed() -> None:
    module = make_module()
    module.configure_model()
    config, routing = module.model.config, Routing()
    with torch.no_grad():
        module.model.eval()(torch.arange(5, 25)[None], routing=routing, use_cache=False)
    ratio = ExecutionRatio(4, config.dropped_layers)
    ratio.update(routing)
    expected = [0.0 if layer in config.dropped_layers else 1.0 for layer in range(6)]
    assert ratio.compute().tolist() == expected == expected_execution(config, 0.5)
    assert kv_bytes_per_token(config, expected) == 4 * 2 * 2 * 32 * 2
    assert 4 / 6 < flops_ratio(config, expected, 10) < 0.75  # the head is computed as before
    with pytest.raises(ValueError, match="must be 0: it was dropped"):
        flops_ratio(config, [1.0] * 6, 10)


def test_a_checkpoint_says_which_layers_were_dropped() -> None:
    module = make_module()
    module.configure_model()
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["measured"] == {"dropped_layers": module.model.config.dropped_layers}
    module.on_load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="measured before training"):
        module.on_load_checkpoint({"measured": {"dropped_layers": [0, 1]}})
    again = make_module()
    again.rows = None
    with pytest.raises(ValueError, match="measures on training rows"):
        again.configure_model()
    again.measured = checkpoint["measured"]
    again.configure_model()
    assert again.model.config.dropped_layers == module.model.config.dropped_layers


def test_an_exported_model_has_no_weights_of_dropped_layers(tmp_path: Path) -> None:
    module = make_module()
    module.configure_model()
    module.merge().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    names = {name.split(".")[2] for name in loaded.state_dict() if name.startswith("model.layers.")}
    assert names == {"0", "1", "2", "3"}
    assert loaded.config.dropped_layers == module.model.config.dropped_layers
    assert not loaded.config.has_theta
    tokens = torch.arange(5, 15)[None]
    generated: Any = loaded.generate(tokens, max_new_tokens=4, do_sample=False)  # type: ignore[misc]
    for place in range(10, 14):
        with torch.no_grad():
            assert generated[0, place] == loaded(generated[:, :place], use_cache=False).logits[0, -1].argmax()
