"""Export: the trained model in Hugging Face format, and how it is loaded again."""

import logging
from typing import Any

import torch

import qtale_lightning.quantization.checkpoint  # noqa: F401  # registers packed weights with transformers
from qtale_lightning.allocator import give_back
from qtale_lightning.bits_schedule import Schedule
from qtale_lightning.finite import check_finite
from qtale_lightning.manifest import writing
from qtale_lightning.models.modeling import RoutedForCausalLM
from qtale_lightning.models.phases import Phases
from qtale_lightning.models.routing import Routing
from qtale_lightning.models.sources import source_name
from qtale_lightning.module import QTALEModule
from qtale_lightning.precision import inference_dtype
from qtale_lightning.quantization.engines import DEFAULT, find
from qtale_lightning.results.store import load_or_new
from qtale_lightning.run import RunDirectory
from qtale_lightning.stages.loading import load_model
from qtale_lightning.stages.merging import merge

log = logging.getLogger(__name__)


def export(
    run: RunDirectory, module: QTALEModule, checkpoint: dict[str, Any] | None, dtype: torch.dtype
) -> None:
    """Merge the best checkpoint in float32 and save it in Hugging Face format, with routers and their configuration.

    Args:
        run: Where ``model/`` goes; nothing is done if it is there.
        module: A fresh module of the run's configuration, its model not loaded yet; it is used up.
        checkpoint: Trainable weights, as in the checkpoint's ``state_dict``; None exports the untrained model.
        dtype: Of the saved weights; routers stay in float32.

    Raises:
        ValueError: The checkpoint doesn't fit, a weight isn't finite, or merging changes the logits by more than
            rounding.
        OSError: The folder couldn't be written; nothing is left of it.
    """
    if run.model().is_dir():
        return
    module.configure_model(dtype)
    if checkpoint is not None:
        module.load_state_dict(checkpoint)
    check_finite(
        module.model.named_parameters(),
        f"nothing is exported to {run.model()}, since the base model or the checkpoint is damaged. Fetch the base "
        f"again; if that is sound, remove {run.best.parent}, and the same command trains again",
    )
    module.eval()
    model, drift = merge(module, dtype)
    # float32 merging moves logits of size ~10 by ~1e-5; anything near 1e-2 is not rounding.
    if not drift <= 1e-2:
        raise ValueError(
            f"merging LoRA changed logits by {drift:.3g}, more than rounding: the checkpoint is not sound"
        )
    model.config.dtype = dtype
    with writing(run.root, run.model()) as folder:
        model.save_pretrained(folder)
        module.tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(_model_card(run, module), encoding="utf-8")
    log.info("exported %s (merging moved a token's logits by %.2g at most)", run.model(), drift)


def _model_card(run: RunDirectory, module: QTALEModule) -> str:
    config = module.model.config
    source = source_name(module.name, module.path, module.revision)
    return (
        f"---\nlibrary_name: transformers\ntags: [qtale, routed-llama]\n---\n# {run.root.name}\n\n"
        f"{module.name} ({source}), fine-tuned with method `{module.method}`; LoRA is "
        f"merged. {module.how.describe(config)}\n\n"
        "```python\nimport qtale_lightning  # registers the model\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("model")\n'
        'tokenizer = AutoTokenizer.from_pretrained("model")\n```\n\n'
        "Results: `../results.md`; configuration: `../config.yaml`.\n"
    )


def missing(run: RunDirectory, bits: float = 16, engine: str = DEFAULT) -> FileNotFoundError:
    """That the run's model at a precision isn't there, and what makes it: the run's own command, where it is known."""
    if bits != 16:
        command = f"python -m qtale_lightning quantize {run.root} --quantize.bits {bits:g}"
        makes = f"`{command}{'' if engine == DEFAULT else f' --quantize.engine {engine}'}` makes it"
    elif begun := load_or_new(run.root).get("run"):
        makes = f"the run's own command goes on from where it was, and makes it: `{begun['command']}`"
    else:
        makes = "the command that began the run makes it, such as `make train` with the same variables"
    return FileNotFoundError(f"{run.model(bits, engine)} isn't there: {makes}.")


def load_exported(
    run: RunDirectory,
    bits: float = 16,
    engine: str = DEFAULT,
    schedule: Schedule | None = None,
) -> RoutedForCausalLM:
    """The run's model at a precision, in evaluation mode, on a GPU where there is one, in a dtype that is fast there.

    Memory that is free by then is given back first: a large model finds no room beside what another one left.

    Args:
        schedule: By which its precision is to fall while it writes, from `bits` on.

    Raises:
        FileNotFoundError: That precision isn't there; the message says which stage makes it.
        ValueError: The engine's folder holds others, or not all of the schedule's.
    """
    folder = run.model(bits, engine)
    if not folder.is_dir():
        raise missing(run, bits, engine)
    alone = int(bits) if bits != 16 and find(engine).holds and schedule is None else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    give_back()
    model = load_model(run, folder, inference_dtype(device), alone).eval().to(device)
    if schedule is not None:
        Phases(model, schedule, Routing()).end()  # refuses what it doesn't hold
        model.generation_config.bits_schedule = schedule.rows()
    return model
