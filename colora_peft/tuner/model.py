"""The tuner: what PEFT calls to wrap a network, and what it forwards from `PeftModel` to here.

`colora_peft.tuner.targets` decides which layer gets which rank, before the first layer is wrapped.
"""

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from .blending import Blend, blend_adapters
from .config import CoLoRAConfig
from .deltas import check_adapter_name
from .fingerprint import base_fingerprint, note_base
from .layer import CoLoRALayer, adapted_layers, carried_adapters
from .load_checks import check_state_dict, place_weights
from .mixed_batch import adapters_by_sample
from .offloading import check_nothing_offloaded, is_offloaded
from .peft_internals import replace_layer
from .statistics import freeze_statistics, leave_training_mode, release_statistics
from .targets import check_not_compiled, check_not_offloaded, matches, resolve_ranks


class CoLoRAModel(BaseTuner):
    """A network whose targeted layers carry CoLoRA adapters; made by `peft.get_peft_model`."""

    prefix: str = "colora_"
    tuner_layer_cls = CoLoRALayer
    target_module_mapping: dict[str, list[str]] = {}

    _fingerprint: str | None = None
    """Fingerprint of the base, taken before anything of it was trained or merged."""

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        _warn_of_shared_layers(model, adapter_name)
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: CoLoRAConfig, model_config: dict[str, Any]) -> CoLoRAConfig:
        # PEFT would look up defaults by architecture; here None means every layer, which _prepare_model resolves.
        return peft_config

    def _prepare_model(self, peft_config: CoLoRAConfig, model: nn.Module) -> None:
        # Before the first layer is wrapped, so that a refused configuration leaves the network as it was.
        names = [name for name, config in self.peft_config.items() if config is peft_config]
        try:
            for name in names:
                check_adapter_name(name)
            check_not_compiled(model)
            peft_config.ranks = resolve_ranks(peft_config, model)
            if not peft_config.inference_mode:
                check_not_offloaded(peft_config.ranks, model)
        except (TypeError, ValueError):
            # transformers would activate the name of a refused adapter later and silently run the base.
            for name in names:
                del self.peft_config[name]
            raise

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Does what BaseTuner.inject_adapter does; where no targets were given, it notes those found as PEFT does.

        Names that were given stay. PEFT shortens many of them to suffixes, after which they no longer name what
        `ranks` names, and an adapter that is loaded and saved again could not be loaded.
        """
        given = self.peft_config[adapter_name].target_modules
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        if given is None:
            config.target_modules = {name for name, rank in config.ranks.items() if rank > 0}
        elif not isinstance(given, str):
            config.target_modules = given
        note_base(config, adapter_name, self.model, self.fingerprint_of_base())
        freeze_statistics(self.model)

    def train(self, mode: bool = True) -> "CoLoRAModel":
        """Does what nn.Module.train does, but for layers with running statistics, which are frozen."""
        super().train(mode)
        leave_training_mode(self.model)
        return self

    def fingerprint_of_base(self) -> str | None:
        """Returns the `base_fingerprint` of the network before its first adapter came; None if that is not known."""
        merged = any(layer.merged for layer in self.model.modules() if isinstance(layer, BaseTunerLayer))
        if self._fingerprint is None and not merged:
            self._fingerprint = base_fingerprint(self.model)
        return self._fingerprint

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        layers = adapted_layers(self.model).values()
        if all(weight.dtype.itemsize >= 4 for layer in layers for weight in layer.weights_of(adapter_name)):
            return  # nothing that would be cast; PEFT's search for it takes much longer
        # PEFT puts the cast parameters in place of the old ones, and new parameters require gradients.
        before = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(before[name])

    @staticmethod
    def _check_target_module_exists(peft_config: CoLoRAConfig, key: str) -> Any:
        if peft_config.ranks.get(key, 0) > 0:
            return True
        # Not wrapped; PEFT still wants to hear whether that is because of exclude_modules.
        return matches(peft_config, set(), key)

    def _create_and_replace(
        self,
        peft_config: CoLoRAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,  # parameter_name, which single targeted parameters would need
    ) -> None:
        rank = peft_config.ranks.get(current_key, 0)
        if rank == 0:  # reached only when layers are injected after a state dict
            raise ValueError(f"The state dict has weights for layer {current_key!r} but its rank in `ranks` is 0.")
        layer = target if isinstance(target, CoLoRALayer) else CoLoRALayer(target)
        # What is made to be loaded into starts as nothing, however it was trained.
        init_weights = peft_config.init_weights or peft_config.inference_mode
        layer.update_layer(adapter_name, rank, peft_config.colora_alpha, init_weights, peft_config.method_version)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        if layer is not target:
            replace_layer(self, parent, target_name, layer, target)

    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> AbstractContextManager[None]:
        # PeftModel enters this around each forward pass, and drops `adapter_names` afterwards.
        adapter_names = kwargs.get("adapter_names")
        return nullcontext() if adapter_names is None else adapters_by_sample(self, adapter_names)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: Literal["cat", "linear", "svd"] = "cat",
        svd_rank: int | None = None,
    ) -> None:
        """Adds an adapter that is a weighted sum of others; see `colora_peft.tuner.blending`.

        The arguments are those of PEFT's LoRA. The default is "cat" instead of "svd": it is exact, and free at
        inference because the delta lives on the weight. The new adapter is frozen and not active; `set_adapter`
        activates it.

        Args:
            adapters: Names of the adapters to add up, each once.
            weights: A finite factor for each, negative ones included.
            adapter_name: Name of the sum.
            combination_type: "cat" (exact), "svd" (the nearest of a rank) or "linear" (factors are averaged).
            svd_rank: Rank for "svd"; None takes the highest of the adapters' ranks, layer by layer.

        Raises:
            ValueError: A name is unknown or taken, the weights do not fit, the combination type or rank does not
                exist, an adapter trains more than deltas, ranks differ under "linear", or the network is offloaded.
        """
        check_nothing_offloaded(self.model, "add_weighted_adapter")
        layers = adapted_layers(self.model)
        blend = Blend(adapters, weights, adapter_name, combination_type, svd_rank)
        config, deltas = blend_adapters(layers, self.peft_config, blend)
        for name, delta in deltas.items():
            layers[name].place_adapter(
                adapter_name, config.ranks[name], config.colora_alpha, delta, config.method_version
            )
            layers[name].set_requires_grad(adapter_name, False)
        self.peft_config[adapter_name] = config

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Does what BaseTuner.merge_adapter does; `safe_merge` checks all layers before the first is changed."""
        if safe_merge:
            self._check_safe_to_merge(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = True,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge and safe_merge:
            self._check_safe_to_merge(adapter_names)
        network = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        release_statistics(network)
        return network

    def _check_safe_to_merge(self, adapter_names: list[str] | None) -> None:
        """Checks that merging leaves every weight finite; offloaded layers are checked one by one as they merge."""
        for name, layer in adapted_layers(self.model).items():
            if not is_offloaded(layer.get_base_layer()):
                adapters = [a for a in adapter_names or layer.active_adapters if a in layer.scaling]
                try:
                    layer.merged_weight([a for a in adapters if a not in layer.merged_adapters], safe_merge=True)
                except ValueError as error:
                    raise ValueError(f"Layer {name!r} cannot be merged, and none was. {error}") from None

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: CoLoRAConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # The weights of an adapter pass here on their way since PEFT 0.21.
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        tuner = getattr(model, "base_model", None)
        return place_weights(tuner, adapter_name, remapped) if isinstance(tuner, CoLoRAModel) else remapped

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # Before the first weight is copied.
        check_state_dict(self, state_dict, f"{prefix}model.")
        super()._load_from_state_dict(state_dict, prefix, *args)


def tuner_of(model: nn.Module) -> CoLoRAModel:
    """Returns the tuner inside what get_peft_model returned, and refuses anything else."""
    tuner = getattr(model, "base_model", None)
    if not isinstance(model, PeftModel) or not isinstance(tuner, CoLoRAModel):
        raise TypeError(f"A {type(model).__name__} carries no CoLoRA adapters: pass what get_peft_model returned.")
    return tuner


def _warn_of_shared_layers(model: nn.Module, adapter_name: str) -> None:
    """Warns where a network that is about to get a tuner carries adapters of another one."""
    carried = carried_adapters(model)
    if not carried or (adapter_name not in carried and getattr(model, "_hf_peft_config_loaded", False)):
        return  # transformers makes a tuner for each adapter
    fate = "is replaced" if adapter_name in carried else "shares its layers with the new one"
    warnings.warn(
        f"The network carries adapter {carried[0]!r} already, which {fate}: models made of it before change with it. "
        "For a further adapter, call add_adapter or load_adapter of the first PeftModel with another adapter_name, or "
        "start from a fresh network.",
        stacklevel=3,
    )
