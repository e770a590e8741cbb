"""What a configuration says of the model, its training and its log, checked; nothing is loaded for it."""

import json
from math import isfinite
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt

from qtale_lightning.architectures import known_model, planned_config
from qtale_lightning.models.locations import known_commit
from qtale_lightning.routing import method_of
from qtale_lightning.values import (
    CodeBits,
    Floats,
    Names,
    NonNegative,
    Positive,
    ShareBelowOne,
    UserPath,
    ranged,
)

WandbMode = Literal["auto", "online", "offline", "disabled"]


class ModelSettings:
    """The options of a :class:`~qtale_lightning.module.QTALEModule`, which inherits them.

    Defaults are the paper's or D-LLM's where they are known; the others are ours and say so.

    Args:
        name: The model, one of those that qtale_lightning/architectures names: smollm2-135m, gemma3-270m, llama2-7b, …
        path: A local folder or hub id to load its weights from, instead of the model's own source. The folder `model`
            of a finished run of the method full can be given, too: what it learned is where training starts.
        revision: Commit, branch or tag of the hub's repository. By default the model's own commit, or main with a
            path; a branch is looked up once, and its commit recorded.
        method: What decides about layers: full (LoRA alone, nothing is skipped), dllm, qtale, qtale-plus (its
            losses, in a recipe of ours), static (whole layers are dropped), random or mod (Mixture-of-Depths).
        router_width: Width of every router (D-LLM: 512).
        start_layer: First layer that tokens may skip (D-LLM: 2).
        reserved_tokens: Initial tokens of a sequence that execute every layer (D-LLM: 2). One is needed: a query needs
            a key to attend to.
        target_ratio: R_target, the share of layers that a token should execute (D-LLM: 0.5).
        lambda_ratio: λ1, weight of the ratio loss (D-LLM: 5). Of dllm and qtale; 0 for other methods.
        lambda_ratio_schedule: How λ1 gets there: sine rises from 0 over the whole training, λ1 · sin(π/2 · t / T)
            (D-LLM's code); constant is there from the first step on.
        ratio_budget: What L_ratio holds to the target: every token (D-LLM), or the mean over each sequence, whose hard
            tokens may execute more.
        ratio_ascent: Above 0, the mean ratio is a constraint: a multiplier takes λ1's place, and rises from 0 by
            dual ascent at this rate a step (λ1 weighs the validation objective alone, then). 0: none.
        lambda_entropy: λ2, weight of the entropy loss (unpublished; ours). Of qtale; 0 for other methods.
        lambda_prediction: Weight of foreseeing which tokens a layer's capacity goes to (unpublished; ours). Of mod; 0
            for other methods.
        temperature: Of the Gumbel-softmax (paper: 1).
        noise_schedule: Share of training, from its first step on, over which the noise in routers' decisions falls from
            Gumbel's to none, so that the rest trains for inference's decisions; 0 keeps it (paper).
        ratio_schedule: Share of training over which the target ratio falls from 1 to target_ratio; 0 is the paper.
            Without effect for full and static.
        router_bias: Of (skip, execute), with which routers begin (D-LLM: 0.1 and 2.0, so that 13 % are skipped at
            first).
        distillation: Weight of the KL of the answer tokens' logits to those at full depth. 0: none.
        teacher: Whose full depth that is: a finished run, such as one of the method full, or a model's folder. None:
            the weights that are trained.
        stages: Train LoRA and routers jointly, or lora-first or routers-first: the other joins in mid-training, while
            what began goes on at a tenth of its rate.
        noise_bits: In the second half of training, round the weights of half of the blocks, drawn anew in every step,
            to so many bits. None: of none.
        gates: What a router decides about: a layer (D-LLM), or a sublayer: attention and MLP have a router each, and
            count by their weights. Two routers of router_width 256 cost what one of 512 does. Goes with neither
            keep_kv nor stand_in_rank.
        keep_kv: A token leaves its keys and values in layers that it skips, too, instead of none. Costs their
            computation and memory.
        stand_in_rank: Rank of the map that stands in for a layer where tokens skip it, fitted in closed form before
            training, then trained. 0: what skips is left as it is.
        train_all: Train every weight instead of LoRA and routers (for models too small for LoRA).
        lora_rank: Rank of LoRA (paper: 8).
        lora_alpha: LoRA's scale is alpha / rank; None is the rank, a scale of 1 (D-LLM's code).
        lora_dropout: Of LoRA (D-LLM: 0.05).
        lora_dropout_at: Where that is: output, y = Wx + dropout(B(Ax)) in float32 (D-LLM's code), or input,
            y = Wx + B(A dropout(x)) (peft's, and the LoRA paper's).
        lora_init: Of LoRA's A, B being 0: normal, with a standard deviation of 1 / rank (D-LLM's code), or uniform
            within 1 / √width (peft's).
        lora_targets: Projections that get LoRA (paper: q, k, v).
        lr: Peak learning rate of LoRA (or of all weights). D-LLM's script: 9e-3 · effective batch / 256.
        router_lr: Peak learning rate of routers; None is the same as lr.
        betas: AdamW's (D-LLM's code: 0.9 and 0.95).
        weight_decay: AdamW's (D-LLM: 0.02).
        weight_decay_on: What decays: matrices, not biases and norms (D-LLM's code), or all.
        warmup: Share of training that warms the learning rate up; cosine to 0 follows (D-LLM: 2 of 10 epochs).
        seed: Of initial weights, Gumbel noise and dropout; the command line sets it from --seed_everything.

    Raises:
        ValueError: A value that can't be; the message names its option.
    """

    @ranged("model")
    def __init__(
        self,
        name: str = "smollm2-135m",
        path: UserPath | str | None = None,
        revision: str | None = None,
        method: str = "qtale",
        router_width: PositiveInt = 512,
        start_layer: NonNegativeInt = 2,
        reserved_tokens: PositiveInt = 2,
        target_ratio: ClosedUnitInterval = 0.5,
        lambda_ratio: NonNegative = 5.0,
        lambda_ratio_schedule: Literal["sine", "constant"] = "sine",
        ratio_budget: Literal["token", "sequence"] = "token",
        ratio_ascent: NonNegative = 0.0,
        lambda_entropy: NonNegative = 0.5,
        lambda_prediction: NonNegative = 0.0,
        temperature: Positive = 1.0,
        noise_schedule: ClosedUnitInterval = 0.0,
        ratio_schedule: ClosedUnitInterval = 0.0,
        router_bias: Floats[float] = Floats((0.1, 2.0)),  # noqa: B008 (a tuple)
        distillation: NonNegative = 0.0,
        teacher: UserPath | None = None,
        stages: Literal["joint", "lora-first", "routers-first"] = "joint",
        noise_bits: CodeBits | None = None,
        gates: Literal["layer", "sublayer"] = "layer",
        keep_kv: bool = False,
        stand_in_rank: NonNegativeInt = 0,
        train_all: bool = False,
        lora_rank: PositiveInt = 8,
        lora_alpha: Positive | None = None,
        lora_dropout: ShareBelowOne = 0.05,
        lora_dropout_at: Literal["output", "input"] = "output",
        lora_init: Literal["normal", "uniform"] = "normal",
        lora_targets: Names[str] = Names(("q_proj", "k_proj", "v_proj")),  # noqa: B008 (a tuple)
        lr: Positive = 2.8e-4,
        router_lr: Positive | None = None,
        betas: Floats[ShareBelowOne] = Floats((0.9, 0.95)),  # noqa: B008 (a tuple)
        weight_decay: NonNegative = 0.02,
        weight_decay_on: Literal["matrices", "all"] = "matrices",
        warmup: ClosedUnitInterval = 0.2,
        seed: int = 0,
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()  # of the LightningModule, where this is one
        self._arguments = arguments
        family, _ = known_model(name)
        self.how = method_of(method)  # what the name stands for
        for option, pair, example in (("betas", betas, "0.9,0.95"), ("router_bias", router_bias, "0.1,2.0")):
            if len(pair) != 2 or not all(map(isfinite, pair)):
                raise ValueError(f"--model.{option} {[*pair]}: give two numbers, such as {example}")
        lambdas = {
            option: value
            for option, value in arguments.items()
            if option.startswith("lambda_") and not option.endswith("_schedule")
        }
        for option, value in lambdas.items():
            if option not in self.how.weights and value != 0:
                raise ValueError(
                    f"method {method} has no {option.removeprefix('lambda_')} loss: --model.{option} is {value}, and "
                    "must be 0 (METHOD=… of make sets it)"
                )
        self._check_tools(ratio_budget, ratio_ascent, distillation, teacher, stages, noise_schedule)
        for option, given, off in (
            ("keep_kv", keep_kv, "keep_kv false"),
            ("gates sublayer", gates == "sublayer", "gates layer"),
        ):
            if given and not (self.how.decides and family.fused):
                why = (
                    "skips nothing by tokens"
                    if family.fused
                    else "is of a family whose layers are computed whole"
                )
                subject = f"method {method}" if family.fused else name
                raise ValueError(f"--model.{option}: {subject} {why}: give --model.{off}")
        if gates == "sublayer" and (keep_kv or stand_in_rank):
            other, off = ("keep_kv", "false") if keep_kv else ("stand_in_rank", "0")
            raise ValueError(
                f"--model.gates sublayer doesn't go with --model.{other}: give --model.{other} {off}, or "
                "--model.gates layer"
            )
        if stand_in_rank and not self.how.decides:
            raise ValueError(f"--model.stand_in_rank: method {method} skips nothing by tokens: leave it out")
        if not lora_targets and not train_all:
            raise ValueError(
                "--model.lora_targets is empty: give at least one projection, or --model.train_all true"
            )
        projections = [linear.rpartition(".")[2] for linear in family.linears]
        if unknown := set(lora_targets) - set(projections):
            known = ", ".join(projections)
            raise ValueError(
                f"--model.lora_targets {sorted(unknown)}: no such projections; choose from {known}"
            )
        self.name, self.path, self.method, self.seed = name, path, method, seed
        self.revision = known_commit(name, path, revision)
        self.routing_options = {
            "router_width": router_width,
            "start_layer": start_layer,
            "reserved_tokens": reserved_tokens,
            "gates": gates,
            "keep_kv": keep_kv,
            "stand_in_rank": stand_in_rank,
        }
        self.target_ratio, self.ratio_schedule, self.temperature = target_ratio, ratio_schedule, temperature
        self.noise_schedule = noise_schedule
        self.lambdas = {option.removeprefix("lambda_"): value for option, value in lambdas.items()}
        self.ratio_rises = lambda_ratio_schedule == "sine"
        self.lambdas["distillation"] = distillation
        self.ratio_budget, self.ratio_ascent, self.router_bias = ratio_budget, ratio_ascent, (*router_bias,)
        self.teacher_folder = None if teacher is None else model_folder(teacher)
        self.stages, self.noise_bits = stages, noise_bits
        self.train_all = train_all
        self.lora_options: dict[str, Any] = {
            "rank": lora_rank,
            "alpha": lora_rank if lora_alpha is None else lora_alpha,
            "dropout": lora_dropout,
            "dropout_at": lora_dropout_at,
            "init": lora_init,
            "targets": lora_targets,
        }
        self.lr, self.router_lr = lr, lr if router_lr is None else router_lr
        self.betas = (float(betas[0]), float(betas[1]))  # of no type that a checkpoint wouldn't be read with
        self.weight_decay, self.warmup = weight_decay, warmup
        self.decays_all = weight_decay_on == "all"

    def _check_tools(
        self,
        ratio_budget: str,
        ratio_ascent: float,
        distillation: float,
        teacher: str | None,
        stages: str,
        noise_schedule: float,
    ) -> None:
        """Refuse tools that would do nothing (ValueError)."""
        how, name = self.how, self.how.name
        if "lambda_ratio" not in how.weights and (ratio_budget != "token" or ratio_ascent):
            option = "ratio_ascent" if ratio_ascent else "ratio_budget"
            raise ValueError(
                f"method {name} has no ratio loss, so --model.{option} has no effect: leave it out"
            )
        if stages != "joint" and not how.routers:
            raise ValueError(
                f"method {name} has no routers, so --model.stages {stages} has no effect: leave it out"
            )
        if noise_schedule and not how.noisy:
            raise ValueError(
                f"method {name} has no noise in its decisions, so --model.noise_schedule has no effect: leave it out"
            )
        if distillation and teacher is None and not how.decides:
            raise ValueError(
                f"--model.distillation: method {name} skips nothing, so its own full depth teaches it nothing: give "
                "another --model.teacher, or leave it out"
            )
        if teacher is not None and not distillation:
            raise ValueError(
                f"--model.teacher {teacher} has no effect without --model.distillation: give its weight"
            )

    def check_teacher(self) -> None:
        """Refuse a teacher that isn't there, or speaks other tokens (ValueError); nothing of it is loaded."""
        if (folder := self.teacher_folder) is None:
            return
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            vocabulary, own = config["vocab_size"], planned_config(self.name, self.path)["vocab_size"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"--model.teacher: {folder} holds no model ({type(error).__name__}: {error}): give a finished run, or "
                "the folder of an exported model"
            ) from error
        if vocabulary != own:
            raise ValueError(
                f"--model.teacher: {folder} has {vocabulary} tokens, {self.name} has {own}: give a model with the same "
                "tokenizer"
            )

    @property
    def shape(self) -> SimpleNamespace:
        """The architecture that is trained, in the fields of RoutedConfig that costs are counted from."""
        base = planned_config(self.name, self.path)
        return SimpleNamespace(**base | self.routing(base["num_hidden_layers"]))

    def routing(self, layers: int) -> dict[str, Any]:
        """The routing of a base model of so many layers, in the fields of RoutedConfig.

        Raises:
            ValueError: The method can't have it so.
        """
        start_layer = self.routing_options["start_layer"]
        fields = self.how.fields(layers, start_layer, self.target_ratio, self.seed)
        return self.routing_options | {"method": self.method} | fields


def model_folder(path: str) -> Path:
    """The folder of a model: a run's exported one, or the folder itself."""
    folder = Path(path)
    return folder / "model" if (folder / "config.yaml").is_file() else folder
