"""Quantization of a run's exported model: search, save what was found, pack."""

import json
import logging
import time
from collections.abc import Sequence

from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.files import replacing
from qtale_lightning.models.modeling import RoutedLlamaForCausalLM
from qtale_lightning.quantization.calibration import Batch, padded_batches
from qtale_lightning.quantization.checkpoint import PackedConfig, quantize_model
from qtale_lightning.quantization.engines import ENGINES
from qtale_lightning.quantization.final_norm import refit_final_norm
from qtale_lightning.quantization.mappings import LINEARS, linear_shapes
from qtale_lightning.quantization.options import QuantizationOptions
from qtale_lightning.quantization.precision import Bits, allocate, uniform
from qtale_lightning.quantization.recipe import Recipe
from qtale_lightning.run import RunDirectory
from qtale_lightning.stages.export import load_exported
from qtale_lightning.stages.progress import console, progress

log = logging.getLogger(__name__)


def quantize(run: RunDirectory, data: CommonsenseDataModule, options: QuantizationOptions) -> None:
    """Quantizes the exported model at each of the options' precisions, calibrated on training sequences, routing on.

    Saves what the search found (``awq-search-Nbit.safetensors``), which later calls reuse, and the packed model
    (``model-awq-Nbit/``); routers, norms, embeddings and head keep full precision.

    Args:
        run: With an exported model.
        data: Gives the calibration sequences.
        options: Precisions that are there already are skipped.

    Raises:
        ValueError: The group size doesn't divide a width, a precision is there with other options, or the exported
            model is quantized itself.
    """
    missing = [bits for bits in options.bits if not run.model(bits, options.engine).is_dir()]
    for bits in set(options.bits) - set(missing):
        _check_alike(run, bits, options)
    if not missing:
        return
    started = time.perf_counter()
    model = load_exported(run)
    shapes = linear_shapes(model)
    wanted = {
        bits: uniform(shapes, int(bits), options.patterns or {}) for bits in missing if bits == int(bits)
    }
    searched = wanted | {width: uniform(shapes, width, {}) for width in options.candidates(missing)}
    sequences = data.calibration_sequences(options.sequences) if options.calibrates else []
    batches = padded_batches(sequences, model.device)
    recipes = _recipes(run, batches, options, model, searched)
    assert data.tokenizer is not None  # it made the sequences
    for bits in missing:
        if bits in recipes:
            recipe = recipes[bits]
        else:
            recipe = allocate(shapes, {w: recipes[w] for w in options.candidates([bits])}, bits)
            log.info("%g bits: %s", bits, _share_of_widths(recipe))
        final_norm = refit_final_norm(model, recipe, batches) if options.refits else None
        packed = load_exported(run, as_stored=True)
        quantize_model(packed, recipe, final_norm)
        with replacing(run.model(bits, options.engine)) as folder:
            packed.save_pretrained(folder)
            data.tokenizer.save_pretrained(folder)
        size = run.weight_bytes(bits, options.engine)
        console.print(
            f"{options.engine}, {bits:g} bits in groups of {options.group_size}: {size / 1e6:,.1f} MB "
            f"({size / run.weight_bytes():.2f} of the exported model's)"
        )
    console.print(f"quantized in {time.perf_counter() - started:.0f} s")


def _check_alike(run: RunDirectory, bits: float, options: QuantizationOptions) -> None:
    """Raises ValueError where the folder of a precision was made with other options."""
    folder = run.model(bits, options.engine)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    there = PackedConfig(**config["quantization_config"])
    layers = range(config["num_hidden_layers"])
    names = {f"model.layers.{layer}.{linear}": (1, 1) for layer in layers for linear in LINEARS}
    whole = bits == int(bits)
    for option, value, asked in (
        ("group_size", there.group_size, options.group_size),
        ("symmetric", not there.zero_point, options.symmetric),
        ("refit_norm", there.refit_norm, options.refits),
        ("patterns", whole and {name: there.bits_of(name) for name in names},
         whole and uniform(names, int(bits), options.patterns or {})),
    ):  # fmt: skip
        if value != asked:
            was = f" ({value})" if option != "patterns" else ""
            raise ValueError(
                f"{folder} was made with another --quantize.{option}{was}: remove it to quantize again"
            )


def _share_of_widths(recipe: Recipe) -> str:
    counts = {width: list(recipe.bits.values()).count(width) for width in sorted(set(recipe.bits.values()))}
    return ", ".join(f"{count} linears at {width} bits" for width, count in counts.items())


def _recipes(
    run: RunDirectory,
    batches: Sequence[Batch],
    options: QuantizationOptions,
    model: RoutedLlamaForCausalLM,
    precisions: dict[float, Bits],
) -> dict[float, Recipe]:
    """A recipe for each precision: those saved by an earlier search, and one search for all others."""
    found: dict[float, Recipe] = {}
    for bits, by_linear in precisions.items():
        path = run.search(bits, options.engine)
        if path.is_file():
            saved = Recipe.load(path)
            if (saved.bits, saved.group_size, saved.symmetric) == (
                by_linear,
                options.group_size,
                options.symmetric,
            ):
                found[bits] = saved
    missing = {bits: by_linear for bits, by_linear in precisions.items() if bits not in found}
    if not missing:
        return found
    if options.calibrates:
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        log.info("calibrating on %d tokens of training sequences, routing on", tokens)
    with progress(f"{options.engine} search, layers", len(model.model.layers)) as advance:
        recipes = ENGINES[options.engine](
            model,
            batches,
            list(missing.values()),
            options.group_size,
            options.symmetric,
            progress=lambda *_: advance(),
        )
    for bits, recipe in zip(missing, recipes, strict=True):
        if options.calibrates:
            recipe.save(run.search(bits, options.engine))
        found[bits] = recipe
    return found
