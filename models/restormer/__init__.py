from .configuration_restormer import RestormerConfig
from .modeling_restormer import RestormerForImageRestoration, RestormerPreTrainedModel

__all__ = ["RestormerConfig", "RestormerForImageRestoration", "RestormerPreTrainedModel"]
