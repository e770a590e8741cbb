"""The LightningModule: a frozen base model with trainable LoRA, and with what a method of routing adds."""

import math
import time
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import lightning as L
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from qtale_lightning.allocator import give_back
from qtale_lightning.losses import Losses, answer_loss, answer_places
from qtale_lightning.metrics import ExecutionRatio, RoutingDiagnostics, path_logs
from qtale_lightning.models.adapters import (
    add_lora,
    load_trainable_state,
    mark_trainable,
    merge_lora,
    trainable_state,
)
from qtale_lightning.models.families import route, routed_config
from qtale_lightning.models.modeling import RoutedForCausalLM
from qtale_lightning.models.routing import Routing
from qtale_lightning.models.sharding import shard
from qtale_lightning.models.sources import find_commit, load_base, load_tokenizer
from qtale_lightning.routing import Budget, Rows
from qtale_lightning.routing.router import Router
from qtale_lightning.settings import ModelSettings
from qtale_lightning.training import (
    Multiplier,
    Teacher,
    distillation_loss,
    fit_stand_ins,
    noise_bits,
    parameter_groups,
    rounded_blocks,
    routed_progress,
    staged_rate,
)

# What a checkpoint calls that which the method measured.
MEASURED = "measured"
# What a batch calls the places of `answer_places`, once they are known.
ANSWERS = "answers"
# And the multiplier of the ratio, where that is a constraint.
MULTIPLIER = "multiplier"


class QTALEModule(ModelSettings, L.LightningModule):
    """Fine-tunes a routed model: L = L_CE + the method's losses, each with its λ.

    The options are those of :class:`~qtale_lightning.settings.ModelSettings`.

    Attributes:
        rows: What the method, or stand-ins, may be measured on before training; set them before the model is loaded.
        measured: What it found, or a checkpoint says that it did; None until then.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Non-strict, since a checkpoint has no frozen weights; load_state_dict checks what it has.
        self.strict_loading = False
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self.model: RoutedForCausalLM
        self._tuner: Any = None
        self.rows: Rows | None = None
        self.measured: dict[str, Any] | None = None
        self.multiplier = Multiplier(self.ratio_ascent)
        self.routing_record: dict[str, dict[str, Any]] = {}  # of the last validation, see RoutingDiagnostics

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.name, self.path, self.commit())
        return self._tokenizer

    def configure_model(self, dtype: torch.dtype | None = None) -> None:
        """Load the base model and attach routers and LoRA; Lightning calls it before fitting.

        Args:
            dtype: Of frozen weights; None: as the trainer's precision says, or float32. What is trained is in float32.
        """
        if hasattr(self, "model"):
            return
        mixed = self._trainer is not None and str(self.trainer.precision).startswith("bf16")
        dtype = dtype or (torch.bfloat16 if mixed else torch.float32)
        dtype = torch.float32 if self.train_all else dtype
        base = load_base(self.name, self.path, dtype, self.seed, self.commit())
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.attach(base)
        if self.device_mesh is not None:  # of a strategy that shards
            shard(self.model, self.device_mesh["data_parallel"])
        self.validation_ratio = self._ratio()
        self.validation_routing = RoutingDiagnostics()

    def commit(self) -> str | None:
        """The one commit of the hub's repository that everything is loaded from; None for a model from elsewhere.

        Raises:
            HubError: A branch or tag can't be looked up; the message says what to do.
        """
        self.revision = find_commit(self.name, self.path, self.revision)
        return self.revision

    def fresh(self) -> "QTALEModule":
        """A module of the same configuration, commit and measurement, its model not loaded yet."""
        made = type(self)(**self._arguments | {"revision": self.revision})
        made.measured = self.measured
        return made

    def attach(self, base: Any) -> None:
        """Make ``base``, a model of a declared family, the one that is trained: routers, LoRA, and what is frozen.

        Raises:
            ValueError: The method measures something before training, and there are neither rows nor a finding.
        """
        fields = self.routing(base.config.num_hidden_layers)
        if self.measured is None:
            if self.how.measures and self.rows is None:
                raise ValueError(
                    f"the method {self.method} measures on training rows before training: set the module's `rows`, or "
                    "`measured` to what a checkpoint says"
                )
            self.measured = self.how.measure(base, self.rows, fields) if self.rows is not None else {}
        fields |= self.measured
        self.how.change(base, fields)
        self.model = route(base, routed_config(base.config, **fields))
        for part in self.model.modules():
            if isinstance(part, Router):
                part.begin_at(self.router_bias)
        if self.rows is not None and self.model.config.stand_in_rank:
            fit_stand_ins(self.model, self.rows)  # otherwise a checkpoint has them
        if not self.train_all:
            self._tuner = add_lora(self.model, **self.lora_options)
        mark_trainable(self.model, self.train_all)
        self.model.train()  # from_pretrained leaves it in evaluation mode, and Lightning would keep it there

    def _ratio(self, **options: Any) -> ExecutionRatio:
        config = self.model.config
        return ExecutionRatio(
            len(self.model.model.layers), config.dropped_layers, config.unit_shares, **options
        )

    def merge(self) -> RoutedForCausalLM:
        """Fold LoRA into the model, in place, and return it; nothing can be trained afterwards."""
        if self._tuner is not None:
            merge_lora(self._tuner)
            self._tuner = None
        return self.model.eval()

    def release(self) -> None:
        """Give up the model and its memory: what comes after training reads what is on the disk.

        What was trained is in the checkpoints; :meth:`configure_model` loads the base anew.
        """
        self._tuner = None
        self.__dict__.pop("teacher", None)
        if hasattr(self, "model"):
            del self.model
        give_back()

    # ---------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Trainable weights only."""
        return {f"model.{name}": value for name, value in trainable_state(self.model).items()}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load trainable weights, refusing those of another model or configuration (ValueError)."""
        load_trainable_state(
            self.model, {name.removeprefix("model."): value for name, value in state_dict.items()}
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Beside the weights: what the method measured before training, without which they fit no model."""
        checkpoint[MEASURED], checkpoint[MULTIPLIER] = self.measured, self.multiplier.value

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of a model that something else was measured for (ValueError)."""
        if (theirs := checkpoint.get(MEASURED, {})) != self.measured:
            raise ValueError(
                f"the checkpoint's model was made with {theirs or 'nothing'}, measured before training, this one with "
                f"{self.measured or 'nothing'}: resume where the run began, or start a new run"
            )
        self.multiplier.value = checkpoint.get(MULTIPLIER, 0.0)

    # ------------------------------------------------------------------------------------------------- training

    def losses(
        self,
        batch: dict[str, Tensor],
        routing: Routing,
        target: float,
        lambdas: Mapping[str, float] | None = None,
    ) -> Losses:
        """The loss terms of a batch of ``input_ids, attention_mask, labels (B, T)``; ``routing`` is filled in.

        ``lambdas`` weigh them in training; None: the objective that training ends with, without what only trains.
        """
        trains = lambdas is not None
        with rounded_blocks(self.model, noise_bits(self.noise_bits, self.progress) if trains else None):
            hidden = self.model.model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                routing=routing,
                use_cache=False,
            ).last_hidden_state
        labels = batch["labels"]
        places = batch[ANSWERS] if ANSWERS in batch else answer_places(labels)
        answer = labels[:, 1:] != -100
        # The head is computed where an answer token is predicted, and nowhere else.
        logits = self.model.lm_head(hidden.flatten(0, 1).index_select(0, places))
        ce = answer_loss(logits, labels.flatten().index_select(0, places + 1), answer)
        budget = Budget(target, "all" if trains and self.multiplier else self.ratio_budget)
        terms = self.how.losses(routing, len(self.model.model.layers), budget) if routing.gates else {}
        if lambdas is not None and lambdas["distillation"]:
            terms |= {"distillation": distillation_loss(logits, self.teacher.logits(batch, places), answer)}
        return Losses.weigh(ce, terms, self.lambdas if lambdas is None else lambdas)

    @property
    def progress(self) -> float:
        """Share of the training's steps that are done."""
        return self.trainer.global_step / float(self.trainer.estimated_stepping_batches)

    @property
    def routed_progress(self) -> float:
        """The same of those steps in which tokens skip layers; negative before them."""
        return routed_progress(self.stages, self.progress)

    def scheduled(self, final: float) -> float:
        """A ratio as it is in this step: falling linearly from 1 to ``final`` while ``ratio_schedule`` lasts."""
        return self._falling(final, self.ratio_schedule)

    def scheduled_noise(self) -> float:
        """Gumbel noise in this step's decisions, of 1: falling linearly to 0 while ``noise_schedule`` lasts."""
        return self._falling(0.0, self.noise_schedule) if self.noise_schedule else 1.0

    def _falling(self, final: float, share: float) -> float:
        """From 1 to ``final``, linearly, over a share of the steps in which tokens skip layers; 0: there at once."""
        progress = min(1.0, max(0.0, self.routed_progress) / share) if share else 1.0
        return 1.0 + progress * (final - 1.0)

    def scheduled_lambdas(self) -> dict[str, float]:
        """The losses' weights as they are in this step: λ1 rising along a sine, where it does (D-LLM's code)."""
        if self.routed_progress < 0:
            return dict.fromkeys(self.lambdas, 0.0)
        rise = math.sin(math.pi / 2 * self.routed_progress) if self.ratio_rises else 1.0
        ratio = self.multiplier.value if self.multiplier else rise * self.lambdas["ratio"]
        return self.lambdas | {"ratio": ratio}

    @cached_property
    def teacher(self) -> Teacher:
        """Of self-distillation, loaded on first use."""
        return Teacher(lambda: self.model, self.teacher_folder, self.model.dtype)

    def batch_seed(self, batch: int) -> int:
        """Seed of a batch's noise on this device."""
        return hash((self.seed, self.global_rank, batch)) & 0x7FFF_FFFF

    def on_before_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Find the answers while the batch is on the CPU."""
        return batch | {ANSWERS: answer_places(batch["labels"])} if "labels" in batch else batch

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed noise and dropout by (seed, rank, batch), so that a resumed run draws what an uninterrupted one does."""
        torch.manual_seed(self.batch_seed(self.trainer.fit_loop.epoch_loop.total_batch_idx + 1))
        self._batch_started = time.perf_counter()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One micro-batch: losses, routing statistics, logs."""
        rate = self.scheduled(self.model.config.rate)
        routing = Routing(temperature=self.temperature, noise=self.scheduled_noise(), rate=rate)
        target = self.scheduled(self.target_ratio)
        if self.routed_progress < 0:
            routing.threshold, routing.sample = 0.0, False
        lambdas = self.scheduled_lambdas()
        losses = self.losses(batch, routing, target, lambdas)
        if self.multiplier and self.routed_progress >= 0:
            self.multiplier.observe(losses.terms["ratio"])
        with self.device:  # to move it there would be waited for
            layers = self._ratio(sync_on_compute=False)
        layers.update(routing)
        per_layer = layers.compute()
        logs: dict[str, Any] = {
            "train/loss": losses.total,
            "train/ce": losses.ce,
            "train/execution_ratio": per_layer.mean(),
        }
        logs |= {f"train/{name}_loss": value for name, value in losses.terms.items()}
        if routing.gates:
            logs["train/target_ratio"] = target
            logs["train/lambda_ratio"] = lambdas["ratio"]
            logs |= {f"train/{name}": value for name, value in self.how.statistics(routing).items()}
            logs |= {f"train/execution_ratio_layer_{i:02d}": ratio for i, ratio in enumerate(per_layer)}
        self.log_dict({name: torch.as_tensor(value).detach() for name, value in logs.items()})
        self.log("loss", losses.total.detach(), prog_bar=True, logger=False)
        self.log("ratio", per_layer.mean(), prog_bar=True, logger=False)
        # Where it isn't finite, all gradients are NaN, on every device that they are summed over: all of them see it.
        return losses.total * torch.where(losses.total.detach().isfinite(), 1.0, torch.nan)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise or lower the multiplier by what all devices executed in this step; here, before the step is saved."""
        if self.multiplier.observed:
            self.multiplier.ascend(
                float(self.trainer.strategy.reduce(self.multiplier.excess(), reduce_op="mean"))
            )

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the speed of the micro-batch, forward and backward."""
        seconds = time.perf_counter() - self._batch_started
        self.log("train/tokens_per_second", float(batch["attention_mask"].sum()) / seconds)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """The objective at inference decisions (p ≥ 0.5, no noise) and the final target.

        The best checkpoint is the one that minimises it.
        """
        routing = Routing()
        losses = self.losses(batch, routing, self.target_ratio)
        self.validation_ratio.update(routing)
        self.validation_routing.update(routing, self.batch_seed(batch_idx))
        values = {"val/loss": losses.total, "val/ce": losses.ce}
        values |= {f"val/{name}_loss": value for name, value in losses.terms.items()}
        self.log_dict(values, batch_size=len(batch["input_ids"]), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Log the execution ratio and the diversity of paths of the whole validation set; keep the record."""
        self.log("val/execution_ratio", self.validation_ratio.compute().mean())
        self.routing_record = self.validation_routing.compute()
        self.log_dict({f"val/{name}": float(value) for name, value in path_logs(self.routing_record).items()})
        self.validation_ratio.reset()
        self.validation_routing.reset()

    def configure_optimizers(self) -> Any:
        """AdamW with separate rates for routers and the rest; linear warm-up, then cosine to 0, in each stage."""
        rates = self.lr, self.router_lr
        groups = parameter_groups(self.model, *rates, self.weight_decay, self.decays_all)
        optimizer = torch.optim.AdamW(groups, betas=self.betas)
        steps = int(self.trainer.estimated_stepping_batches)
        if self.stages == "joint":
            schedule = get_cosine_schedule_with_warmup(optimizer, int(self.warmup * steps), steps)
        else:
            of_groups = [staged_rate(self.stages, group["name"], steps, self.warmup) for group in groups]
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, of_groups)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
