"""The tuner: what PEFT calls to wrap a network, and what it forwards from `PeftModel` to here.

Which layer gets which rank is decided in `colora_peft.tuner.targets`, before the first layer is wrapped.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from colora_peft.utils import some

from .blending import Blend, blend_adapters
from .config import CoLoRAConfig
from .deltas import check_adapter_name
from .fingerprint import base_fingerprint, note_base
from .layer import CoLoRALayer
from .load_checks import check_adapter_weights, weights_by_adapter
from .mixed_batch import BASE_NAME, pass_adapter_names
from .offloading import check_nothing_offloaded, is_offloaded
from .targets import check_not_offloaded, matches, resolve_ranks


class OwnWeights(NamedTuple):
    """The adapter weights that a network has."""

    by_adapter: dict[str | None, dict[str, Tensor]]
    """Under the names that state dicts have for them."""
    second_names: set[str]
    """The other names of weights that have several, because a block is registered twice."""


class CoLoRAModel(BaseTuner):
    """A network whose targeted layers carry CoLoRA adapters; made by `peft.get_peft_model`."""

    prefix: str = "colora_"
    tuner_layer_cls = CoLoRALayer
    target_module_mapping: dict[str, list[str]] = {}

    _loading: tuple[str, OwnWeights] | None = None
    """The adapter whose weights PEFT is about to load, and what they are loaded into."""

    _fingerprint: str | None = None
    """Of the base, taken before anything of it was trained or merged."""

    def _prepare_adapter_config(self, peft_config: CoLoRAConfig, model_config: dict[str, Any]) -> CoLoRAConfig:
        # PEFT would look up defaults by architecture; here None means every layer, which _prepare_model resolves.
        return peft_config

    def _prepare_model(self, peft_config: CoLoRAConfig, model: nn.Module) -> None:
        # Before the first layer is wrapped, so that a refused configuration leaves the network as it was.
        names = [name for name, config in self.peft_config.items() if config is peft_config]
        try:
            for name in names:
                check_adapter_name(name)
            peft_config.ranks = resolve_ranks(peft_config, model)
            if not peft_config.inference_mode:
                check_not_offloaded(peft_config.ranks, model)
        except (TypeError, ValueError):
            # transformers would activate the name of a refused adapter later and silently run the base.
            for name in names:
                del self.peft_config[name]
            raise

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As BaseTuner.inject_adapter; where no targets were given, those found are written down as PEFT does."""
        given = self.peft_config[adapter_name].target_modules
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        if given is None:
            config.target_modules = {name for name, rank in config.ranks.items() if rank > 0}
        note_base(config, adapter_name, self.model, self.fingerprint_of_base())

    def fingerprint_of_base(self) -> str | None:
        """`base_fingerprint` of the network as it was when its first adapter came; None if that is not known."""
        merged = any(layer.merged for layer in self.model.modules() if isinstance(layer, BaseTunerLayer))
        if self._fingerprint is None and not merged:
            self._fingerprint = base_fingerprint(self.model)
        return self._fingerprint

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        layers = (layer for layer in self.model.modules() if isinstance(layer, CoLoRALayer))
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
        layer.update_layer(adapter_name, rank, peft_config.colora_alpha, init_weights)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        # PeftModel enters this around each forward pass, and drops `adapter_names` afterwards.
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        self._check_mixed_batch(adapter_names)
        hooks = []
        try:
            for name, module in self.model.named_modules():
                if isinstance(module, CoLoRALayer | AuxiliaryTrainingWrapper):
                    hook = partial(pass_adapter_names, name, list(adapter_names))
                    hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _check_mixed_batch(self, adapter_names: list[str]) -> None:
        """Check that `adapter_names`, a name for each sample, can be served.

        Raises:
            ValueError: The model is in training mode or merged, or there is no adapter of such a name.
        """
        if isinstance(adapter_names, str) or not adapter_names:
            raise ValueError(f"The adapter_names are {adapter_names!r}: give a list with one name for each sample.")
        if self.training:
            raise ValueError("A batch with adapter_names is for inference: call model.eval() first.")
        layers = [layer for layer in self.modules() if isinstance(layer, CoLoRALayer)]
        if any(layer.merged for layer in layers):
            raise ValueError("A batch with adapter_names needs the adapters unmerged: call unmerge_adapter() first.")
        unknown = sorted(set(adapter_names) - set(self.peft_config) - {BASE_NAME})
        if unknown:
            raise ValueError(
                f"The adapter_names name {some(unknown)}, but the adapters are {some(sorted(self.peft_config))}; "
                f'"{BASE_NAME}" runs a sample without any.'
            )

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: Literal["cat", "linear", "svd"] = "cat",
        svd_rank: int | None = None,
    ) -> None:
        """Add an adapter that is a weighted sum of others; see `colora_peft.tuner.blending.blend_adapters`.

        As in PEFT's LoRA, but for the default "cat" (there "svd"): it is exact and costs nothing at inference, because
        the delta lives on the weight. The new adapter is frozen and not active; `set_adapter` activates it.
        """
        check_nothing_offloaded(self.model, "add_weighted_adapter")
        layers = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, CoLoRALayer)}
        blend = Blend(adapters, weights, adapter_name, combination_type, svd_rank)
        config, deltas = blend_adapters(layers, self.peft_config, blend)
        for name, delta in deltas.items():
            layers[name].place_adapter(adapter_name, config.ranks[name], config.colora_alpha, delta)
            layers[name].set_requires_grad(adapter_name, False)
        self.peft_config[adapter_name] = config

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As BaseTuner.merge_adapter; under `safe_merge`, all layers are checked before the first is changed."""
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
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _check_safe_to_merge(self, adapter_names: list[str] | None) -> None:
        """Check that merging would leave every weight finite. Offloaded layers are checked one by one as they merge.

        Raises:
            ValueError: It would not; names the layer.
        """
        for name, layer in self.model.named_modules():
            if isinstance(layer, CoLoRALayer) and not is_offloaded(layer.get_base_layer()):
                adapters = [a for a in adapter_names or layer.active_adapters if a in layer.scaling]
                try:
                    layer.merged_weight([a for a in adapters if a not in layer.merged_adapters], safe_merge=True)
                except ValueError as error:
                    raise ValueError(f"Layer {name!r} cannot be merged, and none was. {error}") from None

    # PEFT loads an adapter with strict=False and only warns of missing weights: that of another network would seem to
    # work. From 0.21 on it passes here on its way, and nowhere else; before, any state dict with adapter weights is
    # taken for that of an adapter.
    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: CoLoRAConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        tuner = getattr(model, "base_model", None)
        if isinstance(tuner, CoLoRAModel):
            tuner.check_unmerged(adapter_name)
            # PEFT does not find the place of weights inside of wrappers for checkpointing.
            own = tuner._own_weights()
            places = {f"base_model.model.{name}" for name in own.by_adapter.get(adapter_name, {})}
            remapped = {f"{key}.{adapter_name}" if key in places else key: tensor for key, tensor in remapped.items()}
            tuner._check_fit(remapped, "base_model.model.", adapter_name, own, shapes=False)
            tuner._loading = adapter_name, own
        return remapped

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # Before the first weight is copied. PEFT has left out by now what ignore_mismatched_sizes lets it ignore.
        loading, self._loading = self._loading, None
        if loading is not None:
            self._check_fit(state_dict, f"{prefix}model.", *loading, names=False)
        elif not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):
            for adapter in weights_by_adapter(state_dict, f"{prefix}model.", self.prefix):
                if adapter in self.peft_config:
                    self._check_fit(state_dict, f"{prefix}model.", adapter, self._own_weights())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _own_weights(self) -> OwnWeights:
        """All adapter weights that there are now."""
        first_names, named, second_names = {}, {}, set()
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if self.prefix not in name:
                continue
            name = name.replace("_checkpoint_wrapped_module.", "")
            if first_names.setdefault(id(parameter), name) == name:
                named[name] = parameter
            else:
                second_names.add(name.rpartition(".")[0])
        return OwnWeights(weights_by_adapter(named, "", self.prefix), second_names)

    def check_unmerged(self, adapter: str) -> None:
        """Check that unmerging will not subtract other weights than were added.

        Raises:
            ValueError: `adapter` is merged.
        """
        if any(adapter in layer.merged_adapters for layer in self.modules() if isinstance(layer, CoLoRALayer)):
            raise ValueError(f"Adapter {adapter!r} is merged: call unmerge_adapter() before you replace its weights.")

    def _is_sharded(self) -> bool:
        """Whether FSDP has put flat parameters in the place of those that state dicts name."""
        return any("_fsdp_wrapped_module" in name for name, _ in self.model.named_modules())

    def _check_fit(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        adapter: str,
        own: OwnWeights,
        names: bool = True,
        shapes: bool = True,
    ) -> None:
        """Check that `state_dict` holds all weights of `adapter` and none without a place (names), and their shapes.

        Raises:
            ValueError: It does not. An adapter that was made for it is taken off again.
        """
        if self._is_sharded():
            return
        loaded = weights_by_adapter(state_dict, prefix, self.prefix)
        expected = own.by_adapter.get(adapter, {})
        # Some versions of PEFT save what has two names under both.
        found = {name: t for name, t in loaded.get(adapter, {}).items() if name not in own.second_names}
        found |= loaded.get(None, {})
        if not names:
            expected = {name: tensor for name, tensor in expected.items() if name in found}
            found = {name: found[name] for name in expected}
        try:
            check_adapter_weights(expected, found, adapter, shapes)
        except ValueError:
            self._take_off_if_empty(adapter)
            raise

    def _take_off_if_empty(self, adapter: str) -> None:
        """Leave the network as it was before PEFT made room for an adapter whose weights then did not fit.

        Only if nothing can be lost: the delta is zero, and the adapter was made for loading, not for training.
        """
        layers = [layer for layer in self.modules() if isinstance(layer, CoLoRALayer) and adapter in layer.rank]
        config = self.peft_config[adapter]
        if config.modules_to_save or config.bias != "none":
            return
        if not config.inference_mode or not all(layer.is_empty(adapter) for layer in layers):
            return
        if list(self.peft_config) == [adapter]:
            self.unload()
        elif adapter not in self.active_adapters:
            self.delete_adapter(adapter)


def tuner_of(model: nn.Module) -> CoLoRAModel:
    """The tuner inside what get_peft_model returned.

    Raises:
        TypeError: `model` is something else.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(model, PeftModel) or not isinstance(tuner, CoLoRAModel):
        raise TypeError(f"A {type(model).__name__} carries no CoLoRA adapters: pass what get_peft_model returned.")
    return tuner
