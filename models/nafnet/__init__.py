from .configuration_nafnet import NAFNetConfig
from .modeling_nafnet import NAFNetForImageRestoration, NAFNetPreTrainedModel

__all__ = ["NAFNetConfig", "NAFNetForImageRestoration", "NAFNetPreTrainedModel"]
