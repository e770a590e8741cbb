"""The routed model: a family's own of Hugging Face, whose decoder layers have routers."""

import json
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, LogitsProcessorList, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from qtale_lightning.bits_schedule import Schedule
from qtale_lightning.compat.loading import misshaped
from qtale_lightning.models import decoding, sampling
from qtale_lightning.models.attach import attach_routers
from qtale_lightning.models.cache import RoutedCache
from qtale_lightning.models.config import RoutedConfig
from qtale_lightning.models.packing import branch_mask
from qtale_lightning.models.phases import Phases
from qtale_lightning.models.routing import Routing
from qtale_lightning.routing import method_of
from qtale_lightning.routing.perturbation import Perturber

# The name under which `quantization.checkpoint` registers its quantizer with transformers.
PACKED = "qtale"

# Arguments of `from_pretrained` that say where files are: the configuration's as much as the weights'.
_WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class RoutedModel(PreTrainedModel):
    """The decoder stack; it makes the call's :class:`Routing` complete and hands it to the layers."""

    config: RoutedConfig
    embed_tokens: Any
    layers: Any  # of routed layers
    rotary_emb: Any
    perturber: Perturber | None = None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RoutedCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        routing: Routing | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states ``(B, T, D)`` behind the final norm.

        Args:
            input_ids: ``(B, T)``.
            attention_mask: ``(B, seen + T)``, 1 for real tokens; padding may stand on either side.
            position_ids: ``(B, T)`` or ``(1, T)``; by default positions are counted from the tokens seen.
            past_key_values: What earlier calls on the same sequences left; packed execution only.
            inputs_embeds: ``(B, T, D)`` instead of ``input_ids``.
            use_cache: Return a :class:`RoutedCache` for later calls.
            routing: How to decide, and where decisions are recorded.

        Raises:
            ValueError: A mask or cache that doesn't fit, or masked execution with a cache.
        """
        routing = Routing() if routing is None else routing
        self.complete(routing)
        routing.ids = input_ids
        if routing.resume:
            input_ids, inputs_embeds = None, routing.states[routing.resume]
        inputs = input_ids if input_ids is not None else inputs_embeds
        if inputs is None:
            raise ValueError("give input_ids or inputs_embeds")
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and routing.execution == "packed" and not self.training
        if past_key_values is None and use_cache and routing.branch is None:
            past_key_values = RoutedCache()
        if past_key_values is not None:
            if not isinstance(past_key_values, RoutedCache):
                raise ValueError(
                    f"a routed model needs a RoutedCache, not a {type(past_key_values).__name__}"
                )
            if routing.execution == "masked":
                raise ValueError(
                    "masked execution computes whole sequences: use packed execution with a cache"
                )
            if routing.branch is not None:
                raise ValueError("branches of a prompt are computed in one call: leave the cache out")
        seen = past_key_values.seen if past_key_values is not None else 0
        self.locate(routing, attention_mask, (inputs.shape[0], inputs.shape[1]), seen, inputs.device)

        output = super().forward(
            input_ids=input_ids,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            routing=routing,
            **kwargs,
        )
        if past_key_values is not None:
            past_key_values.seen += inputs.shape[1]
        return output

    def complete(self, routing: Routing) -> None:
        """Fill in what the caller left to the model, and forget what an earlier call with the same object made."""
        routing.shares = self.config.unit_shares
        routing.start()
        if routing.threshold is None:
            routing.threshold = self.config.threshold
        routing.thresholds = self.config.thresholds(routing.threshold)
        routing.method, routing.seed = method_of(self.config.method), self.config.routing_seed
        routing.keep_kv, routing.perturber = self.config.keep_kv, self.perturber
        if routing.rate is None:
            routing.rate = self.config.rate
        if routing.sample is None:
            routing.sample = self.training
        if routing.execution is None:
            routing.execution = "masked" if self.training else "packed"
        if routing.resume and (routing.execution == "masked" or routing.resume not in routing.states):
            raise ValueError(
                f"a pass can resume at layer {routing.resume} in packed execution only, and only where an earlier pass "
                f"of the same Routing kept it (kept: {sorted(routing.states) or 'none'})"
            )

    def locate(
        self, routing: Routing, mask: Tensor | None, shape: tuple[int, int], seen: int, device: torch.device
    ) -> None:
        """Mark real tokens, and those behind the reserved initial ones: counted in each sequence after padding."""
        batch, length = shape
        if mask is None:
            routing.tokens = torch.ones(batch, length, dtype=torch.bool, device=device)
            place = torch.arange(seen, seen + length, device=device).expand(batch, length)
        else:
            if mask.shape != (batch, seen + length):
                raise ValueError(
                    f"attention_mask has shape {tuple(mask.shape)}, but {seen} tokens were seen before these "
                    f"{length}: give the mask of all of them, {(batch, seen + length)}"
                )
            routing.tokens = mask[:, seen:].bool()
            place = mask.long().cumsum(1)[:, seen:] - 1
        if routing.branch is not None:  # among the tokens that it sees: of other branches it knows nothing
            visible = branch_mask(routing.branch, routing.branch) & routing.tokens[:, None, :]
            place = visible.tril().sum(-1) - 1
        behind = mask is None and seen >= self.config.reserved_tokens
        routing.free = routing.tokens if behind else routing.tokens & (place >= self.config.reserved_tokens)
        routing.places, routing.length = place, seen + length


class RoutedForCausalLM(PreTrainedModel, GenerationMixin):
    """A model with a language-model head and routers; ``generate()`` is Hugging Face's."""

    config: RoutedConfig
    model: RoutedModel
    lm_head: nn.Linear
    stack: type[RoutedModel]  # the class of `model`
    _keep_in_fp32_modules_strict = ["router"]  # noqa: RUF012 (transformers' type, no ClassVar)

    def __init__(self, config: RoutedConfig) -> None:
        super().__init__(config)
        self.attach(config)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves, or changes precision: what was made of the weights isn't kept beside them."""
        decoding.forget(self)
        return super()._apply(fn, recurse)

    def attach(self, config: RoutedConfig) -> None:
        """Make what a family's own class has built a routed model, in place."""
        self.model.__class__ = self.stack
        attach_routers(self, config)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str] | None = None,
        *args: Any,
        bits: int | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load, and refuse a folder whose weights don't match its routing configuration.

        Args:
            pretrained_model_name_or_path: A folder or hub id; all other arguments are those of transformers.
            bits: Of those that the folder holds; by default its widest, and where its codes are nested others, too, for
                a schedule (`phases`).

        Raises:
            ValueError: Routers are missing from, left over in, or shaped otherwise than the configuration says, or the
                folder doesn't hold that precision.
        """
        if cls is RoutedForCausalLM:  # of whichever family it is
            auto: Any = AutoModelForCausalLM
            more = kwargs if bits is None else {**kwargs, "bits": bits}
            return auto.from_pretrained(pretrained_model_name_or_path, *args, **more)
        path, wants_info = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        config = kwargs.get("config")
        source = path if config is None else config
        if isinstance(source, str | PathLike):
            where = {key: kwargs[key] for key in _WHERE if key in kwargs}
            assert cls.config_class is not None
            config = kwargs["config"] = cls.config_class.from_pretrained(source, **where)
        packed = getattr(config, "quantization_config", None)
        if (
            config is not None and bits is not None and isinstance(packed, dict)
        ):  # whose quantizer says what else it holds
            packed = config.quantization_config = packed | {"read": bits}
        elif bits not in (None, 16):
            raise ValueError(f"{path} holds a model that isn't quantized, and none at {bits} bits")
        if config is not None and isinstance(packed, dict) and packed.get("quant_method") == "awq":
            # transformers gives this format to another package; the suite's quantizer runs it by PyTorch's kernels.
            config.quantization_config = packed | {"quant_method": PACKED}
        # Annotated as the model alone, but a pair when the loading info is asked for; so is what is returned here.
        loaded: tuple[Self, dict[str, Any]]
        loaded = super().from_pretrained(
            path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )  # type: ignore[assignment]
        model, info = loaded
        wrong = [
            f"{problem} {sorted(map(str, names))[:3]}"
            for names, problem in (
                (info["missing_keys"], "missing"),
                (info["unexpected_keys"], "left over"),
                (info["mismatched_keys"] or misshaped(model), "misshaped"),
            )
            if names
        ]
        if wrong:
            raise ValueError(
                f"the weights in {path} don't match its config.json (start_layer "
                f"{model.config.start_layer}, router_width {model.config.router_width}, gates {model.config.gates}): "
                + "; ".join(wrong)
            )
        # Of a generation configuration that came from the model's, transformers reads nothing that it doesn't know.
        file = Path(path or "") / "generation_config.json"
        if file.is_file() and (schedule := json.loads(file.read_bytes()).get("bits_schedule")) is not None:
            model.generation_config.bits_schedule = schedule  # type: ignore[attr-defined]
        return loaded if wants_info else model  # type: ignore[return-value]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        routing: Routing | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``(B, T, V)``, as Hugging Face's model, with ``routing`` as :class:`RoutedModel` takes it.

        Where ``logits_to_keep`` asks for the last positions only, packed execution's last layer computes no others.
        """
        inputs = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
        kept = kwargs.get("logits_to_keep", 0)
        cache = kwargs.get("past_key_values")
        if isinstance(cache, RoutedCache) and inputs is not None and inputs.shape[1] == 1:
            routing = Routing() if routing is None else routing
            routing.asked = None
            logits = decoding.next_token(self, input_ids, attention_mask, routing, cache, kwargs)
            if logits is not None:
                return CausalLMOutputWithPast(logits=logits, past_key_values=cache)
        if inputs is not None and isinstance(kept, int) and not kwargs.get("output_hidden_states"):
            routing = Routing() if routing is None else routing
            length, routing.asked = inputs.shape[1], None
            if 0 < kept < length:
                asked = torch.arange(length, device=inputs.device) >= length - kept
                routing.asked = asked.expand(inputs.shape[:2])
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, routing=routing, **kwargs)

    def generate(self, *args: Any, generation_config: Any = None, **kwargs: Any) -> Any:
        """Hugging Face's; where the generation configuration has a `bits_schedule`, precision falls by it: `phases`.

        Raises:
            ValueError: The schedule is none, rises, or asks for a precision that the model doesn't hold.
        """
        chosen = self.generation_config if generation_config is None else generation_config
        schedule = kwargs.pop("bits_schedule", getattr(chosen, "bits_schedule", None))
        generate: Any = super().generate  # type: ignore[misc]
        if schedule is None:
            return generate(*args, generation_config=generation_config, **kwargs)
        routing = kwargs["routing"] = kwargs.get("routing") or Routing()
        phases = Phases(self, Schedule.read(schedule), routing)
        processors = LogitsProcessorList([*(kwargs.pop("logits_processor", None) or []), phases])
        try:
            return generate(*args, generation_config=generation_config, logits_processor=processors, **kwargs)
        finally:
            phases.end()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
    ) -> Any:
        """generate() asks for its cache here: ours, where it would make a DynamicCache."""
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = RoutedCache()
            model_kwargs["past_key_values"].of_one_call = True
            return None
        return super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args
        )

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """generate() decodes here, greedily or by chance: as one CUDA graph, where `sampling` can."""
        how = logits_processor, stopping_criteria, generation_config
        if not synced_gpus:
            found = sampling.sample(self, input_ids, *how, streamer, model_kwargs)
            if found is not None:
                return found
        return super()._sample(input_ids, *how, synced_gpus, streamer, **model_kwargs)  # type: ignore[misc,arg-type]
