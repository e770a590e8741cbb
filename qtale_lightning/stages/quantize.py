"""Quantization of a run's exported model: search, save what was found, pack."""

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.digests import of, of_model
from qtale_lightning.manifest import verify, writing
from qtale_lightning.models.modeling import RoutedForCausalLM
from qtale_lightning.quantization.calibration import Batch, padded_batches
from qtale_lightning.quantization.checkpoint import quantize_model
from qtale_lightning.quantization.final_norm import refit_final_norm
from qtale_lightning.quantization.mappings import decoder_layers, linear_shapes
from qtale_lightning.quantization.options import QuantizationOptions
from qtale_lightning.quantization.precision import Bits, allocate, uniform
from qtale_lightning.quantization.recipe import REMEDY, Recipe
from qtale_lightning.quantization.routers import check_routers, refit_routers
from qtale_lightning.results.fingerprints import FORMAT, differences, made
from qtale_lightning.results.predictions import predictions_file
from qtale_lightning.results.store import forget
from qtale_lightning.run import RunDirectory
from qtale_lightning.stages.export import load_exported
from qtale_lightning.stages.progress import console, progress
from qtale_lightning.stages.writing import FOLDER as WRITTEN

log = logging.getLogger(__name__)


def quantize(run: RunDirectory, data: CommonsenseDataModule, options: QuantizationOptions) -> None:
    """Quantizes the exported model at each of the options' precisions, calibrated on training sequences, routing on.

    Saves what the search found (``awq-search-Nbit.safetensors``), which later calls reuse, and the packed model
    (``model-awq-Nbit/``); routers, norms, embeddings and head keep full precision. Both say what they were made from
    (:mod:`~qtale_lightning.results.fingerprints`): a precision that is there from the same model, sequences and options
    stays, and any other is made anew, and what was measured of it is forgotten.

    Args:
        run: With an exported model.
        data: Gives the calibration sequences.
        options: What to make.

    Raises:
        FileNotFoundError: There is no exported model.
        ValueError: The group size doesn't divide a width, or the exported model is quantized itself.
        DamagedFileError: A file of the run isn't what it wrote.
    """
    if not options.bits:
        console.print("nothing is quantized: --quantize.bits is empty")
        return
    sequences = data.calibration_sequences(options.sequences) if options.calibrates else []
    if len(sequences) < options.sequences and options.calibrates:
        log.info(
            "--quantize.sequences %d: there are %d training sequences, all are taken",
            options.sequences,
            len(sequences),
        )
    made_from = _ingredients(run, data, options, sequences)
    precisions = dict.fromkeys(map(options.declared.held, options.bits))
    ingredients = {bits: made_from | options.settings(bits) for bits in precisions}
    missing = [bits for bits in precisions if not _is_there(run, bits, options.engine, ingredients[bits])]
    if not missing:
        said = ", ".join(f"{bits:g}" for bits in options.bits)
        console.print(f"{options.engine}, {said} bits: there already, of this model, rows and options")
        return
    started = time.perf_counter()
    model = load_exported(run)
    if options.refit_routers:
        check_routers(model)
    shapes = linear_shapes(model)
    wanted = {
        bits: uniform(shapes, int(bits), options.patterns or {}) for bits in missing if bits == int(bits)
    }
    searched = wanted | {width: uniform(shapes, width, {}) for width in options.candidates(missing)}
    batches = padded_batches(sequences, model.device)
    recipes = _recipes(run, batches, options, model, searched, made_from | options.search_settings())
    assert data.tokenizer is not None  # it made the sequences
    stored = AutoConfig.from_pretrained(run.model()).dtype
    for bits in missing:
        if bits in recipes:
            recipe = recipes[bits]
        else:
            recipe = allocate(shapes, {w: recipes[w] for w in options.candidates([bits])}, bits)
            log.info("%g bits: %s", bits, _share_of_widths(recipe))
        routers = _refitted(model, recipe, batches, bits) if options.refit_routers else None
        final_norm = refit_final_norm(model, recipe, batches, routers) if options.refits else None
        packed = _copied(model, stored)
        quantize_model(packed, recipe, final_norm, ingredients[bits], routers)
        with writing(run.root, run.model(bits, options.engine)) as folder:
            packed.save_pretrained(folder)
            data.tokenizer.save_pretrained(folder)
            # Not before the other model is on the disk, not after it is read.
            widths: list[float] = [*recipe.held] or [bits]
            for width in widths:
                _forget(run, width, options.engine)
        for width in widths:
            size = run.weight_bytes(width, options.engine)
            console.print(
                f"{options.engine}, {width:g} bits in groups of {options.group_size}: {size / 1e6:,.1f} MB "
                f"({size / run.weight_bytes():.2f} of the exported model's)"
            )
    console.print(f"quantized in {time.perf_counter() - started:.0f} s")


def _copied(model: RoutedForCausalLM, dtype: torch.dtype) -> RoutedForCausalLM:
    """A copy to be packed, in the dtype of the exported model's folder; it shares what packing replaces or leaves."""
    linears = {id(linear.weight) for layer in decoder_layers(model) for linear in layer.linears.values()}
    shared: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in linears:
            shared[id(parameter)] = parameter
        elif ".router." not in name:
            same = parameter.detach().to(dtype, copy=parameter.dim() == 1)  # of vectors, scales are divided
            shared[id(parameter)] = nn.Parameter(same, requires_grad=False)
    copied = copy.deepcopy(model, shared)
    copied.config.dtype = dtype
    return copied


def _refitted(
    model: RoutedForCausalLM, recipe: Recipe, batches: Sequence[Batch], bits: float
) -> dict[str, Tensor]:
    """The routers' weights that bring back the decisions; says how many they bring back."""
    refit = refit_routers(model, recipe, batches)
    before, after = (f"{share:.2%}" for share in refit.turned)
    console.print(
        f"{bits:g} bits turn {before} of the routers' decisions, {after} with their last linear fitted"
    )
    return refit.weights


def _ingredients(
    run: RunDirectory,
    data: CommonsenseDataModule,
    options: QuantizationOptions,
    sequences: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """What a packed model depends on besides the options, as its configuration says it."""
    if not run.model().is_dir():
        load_exported(run)  # says how to make it
    calibration = None
    if options.calibrates:
        every = len(data.calibration_sequences(len(sequences) + 1)) == len(sequences)
        calibration = {"digest": of(sequences), "sequences": len(sequences), "all": every}
    return {"format": FORMAT, "model": of_model(run.model()), "calibration": calibration}


def _is_there(run: RunDirectory, bits: float, engine: str, ingredients: Mapping[str, Any]) -> bool:
    """Whether a precision is there, made from the same; says so where it was made from anything else."""
    folder = run.model(bits, engine)
    if not folder.is_dir():
        return False
    made_from = made(run.quantization_config(bits, engine))
    if not made_from:
        console.print(f"{folder} doesn't say what it was made from, or in another format: {_REPLACED}")
        return False
    if differing := differences(made_from, ingredients):
        words = [_IN_WORDS.get(key, f"--quantize.{key} {made_from.get(key)}") for key in differing]
        console.print(f"{folder} was made with {', '.join(words)}: {_REPLACED}")
        return False
    return True


_REPLACED = "it stays until another is made to take its place, and what was measured of it goes with it"
_IN_WORDS = {
    "model": "another exported model",
    "calibration": "other training sequences",
    "patterns": "other --quantize.patterns",
}


def _forget(run: RunDirectory, bits: float, engine: str) -> None:
    """What was measured of a model that another one takes the place of."""
    for row in forget(run.root, bits, engine):
        name = predictions_file(run.root, row)
        for file in (name, run.root / WRITTEN / name.name):
            file.unlink(missing_ok=True)


def _share_of_widths(recipe: Recipe) -> str:
    counts = {width: list(recipe.bits.values()).count(width) for width in sorted(set(recipe.bits.values()))}
    return ", ".join(f"{count} linears at {width} bits" for width, count in counts.items())


def _recipes(
    run: RunDirectory,
    batches: Sequence[Batch],
    options: QuantizationOptions,
    model: RoutedForCausalLM,
    precisions: dict[float, Bits],
    made_from: dict[str, Any],
) -> dict[float, Recipe]:
    """A recipe for each precision: those of an earlier search of the same, and one search for all others."""
    found: dict[float, Recipe] = {}
    for bits, by_linear in precisions.items():
        path = run.search(bits, options.engine)
        if path.is_file():
            saved = Recipe.load(verify(run.root, path, REMEDY))
            if (saved.bits, saved.made_from) == (by_linear, made_from):
                found[bits] = saved
    missing = {bits: by_linear for bits, by_linear in precisions.items() if bits not in found}
    if not missing:
        return found
    if options.declared.calibrates:
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        log.info("calibrating on %d tokens of training sequences, routing on", tokens)
    layers = len(model.model.layers) * options.declared.passes(len(missing), options.in_order)
    with progress(f"{options.engine} search, layers", layers) as advance:
        recipes = options.declared(
            model,
            batches,
            list(missing.values()),
            options.group_size,
            options.symmetric,
            progress=lambda *_: advance(),
            **options.search_options,
        )
    for bits, recipe in zip(missing, recipes, strict=True):
        found[bits] = replace(recipe, made_from=made_from)
        if options.declared.calibrates:
            with writing(run.root, run.search(bits, options.engine)) as file:
                found[bits].save(file)
    return found
