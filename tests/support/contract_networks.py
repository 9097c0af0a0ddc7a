"""The rows of the PEFT contract matrix: a tiny network for each kind of layer, and how it is adapted."""

from collections.abc import Callable
from dataclasses import dataclass

import peft
import pytest
import torch
from packaging.version import Version
from peft import PeftModel, get_peft_model
from support.tiny_networks import tiny_nafnet
from torch import Tensor, nn

from colora_peft import CoLoRAConfig, CoLoRALayer

FIRST_LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), (3, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), (2, 6, 7)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1), (2, 6, 5, 4)),
    "conv3d": (lambda: nn.Conv3d(4, 8, 2), (2, 4, 3, 4, 3)),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2, bias=False), (2, 6, 5, 4)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), (2, 8, 5, 4)),
    "dilated": (lambda: nn.Conv2d(6, 8, 3, dilation=2), (2, 6, 7, 6)),
    "strided": (lambda: nn.Conv2d(6, 8, 3, stride=2), (2, 6, 7, 6)),
    "reflect": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (2, 6, 5, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 8, 2, stride=2), (2, 6, 3, 4)),
    # So large against its rank that it is trained without the gradient of the whole weight.
    "wide": (lambda: nn.Conv2d(48, 48, 3, padding=1), (2, 48, 4, 3)),
}
NETWORKS = (*FIRST_LAYERS, "nafnet")
SETTINGS = {"factors": {"ranks": 1}, "dense": {"ranks": 1000}, "saved": {"ranks": 1}}
"""`saved` trains the last layer whole, through `modules_to_save`."""


class Chain(nn.Module):
    """The layer under test, then layers that would show whatever it does wrong."""

    # Where accelerate may cut the network: PEFT asks for it when it loads an adapter onto an offloaded network.
    _no_split_modules: tuple[str, ...] = ()

    def __init__(self, kind):
        super().__init__()
        self.first = FIRST_LAYERS[kind][0]()
        self.middle = nn.Linear(48 if kind == "wide" else 8, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.tanh(self.first(x)).movedim(1, -1).contiguous()
        return self.last(torch.tanh(self.middle(x)))


@dataclass(frozen=True)
class Row:
    """One network, adapted in one way; everything it makes is the same each time."""

    kind: str
    settings: str

    def __str__(self) -> str:
        return f"{self.kind}-{self.settings}"

    @property
    def last(self) -> str:
        return "ending" if self.kind == "nafnet" else "last"

    def bare(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        return (tiny_nafnet() if self.kind == "nafnet" else Chain(self.kind)).eval().to(dtype)

    def x(self, dtype: torch.dtype = torch.float32) -> Tensor:
        shape = (1, 3, 8, 8) if self.kind == "nafnet" else FIRST_LAYERS[self.kind][1]
        return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)

    def config(self, **settings) -> CoLoRAConfig:
        saved = {"modules_to_save": [self.last]} if self.settings == "saved" else {}
        return CoLoRAConfig(**({"init_weights": False} | SETTINGS[self.settings] | saved | settings))

    def adapted(self, *names: str, seed: int = 1, dtype: torch.dtype = torch.float32, **options) -> PeftModel:
        """The network with an adapter of each of `names` (default: `default`), the first active, none the identity."""
        names, bare = names or ("default",), self.bare(dtype)
        torch.manual_seed(seed)
        model = get_peft_model(bare, self.config(), adapter_name=names[0], **options)
        for name in names[1:]:
            model.add_adapter(name, self.config(), **options)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".modules_to_save." in name:  # else a copy of the base
                    parameter.add_(torch.randn(parameter.shape).to(dtype) / 5)
        return model.eval()


ROWS = [Row(kind, settings) for kind in NETWORKS for settings in SETTINGS]
_PLAIN = [row for row in ROWS if row.settings != "saved"]
_FEW = [row for row in ROWS if row.kind in ("depthwise", "nafnet")]

all_rows = pytest.mark.parametrize("row", ROWS, ids=str)
plain_rows = pytest.mark.parametrize("row", _PLAIN, ids=str)
"""Where two adapters are active at once: `modules_to_save` does not add up."""
few_rows = pytest.mark.parametrize("row", _FEW, ids=str)
"""For bookkeeping that cannot depend on the kind of layer."""


def since(version: str) -> pytest.MarkDecorator:
    """Skips on a PEFT that does not do this yet."""
    return pytest.mark.skipif(Version(peft.__version__) < Version(version), reason=f"PEFT does so since {version}")


def run(model: nn.Module, x: Tensor) -> Tensor:
    """The output for `x` as a tensor, without a graph."""
    with torch.no_grad():
        output = model(x)
    return output if isinstance(output, Tensor) else output.reconstruction


def train(model: nn.Module, x: Tensor, steps: int = 3) -> PeftModel:
    """A few steps of SGD over all parameters, so that whatever requires a gradient moves."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(x)
        output = output if isinstance(output, Tensor) else output.reconstruction
        (output - 1).square().mean().backward()
        optimizer.step()
    return model.eval()


def tuner_layers(model: nn.Module) -> list[CoLoRALayer]:
    return [module for module in model.modules() if isinstance(module, CoLoRALayer)]


def plain_with_deltas(row: Row, model: PeftModel, *adapters: str) -> nn.Module:
    """The bare network with the deltas of `adapters` in its weights, from the definition instead of the product."""
    bare = row.bare()
    for name, layer in model.get_base_model().named_modules():
        for adapter in adapters if isinstance(layer, CoLoRALayer) else ():
            if adapter in layer.colora_dense:
                delta = layer.colora_dense[adapter] / layer.colora_dense[adapter].shape[1]
            elif adapter in layer.colora_B:
                r, k = layer.colora_A[adapter].shape
                delta = layer.colora_B[adapter] @ layer.colora_A[adapter] / (r * k**0.5)
            else:
                continue
            bare.get_submodule(name).weight.data += 16.0 * delta.detach().view_as(layer.weight)  # colora_alpha
    return bare


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(model: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """Gradient of each parameter that requires one, for a loss in which every output counts."""
    model.zero_grad()
    output = (forward or model)(x)
    output = output if isinstance(output, Tensor) else output.reconstruction
    (output.float() - 1).square().mean().backward()
    return {name: model.get_parameter(name).grad.clone() for name in trainable(model)}


def of_adapter(model: nn.Module, adapter: str) -> set[str]:
    """Names of the parameters of one adapter, `modules_to_save` included."""
    return {name for name, _ in model.named_parameters() if f".{adapter}." in f"{name}."}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers as they are now."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], atol: float = 0) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=atol, msg=lambda text, name=name: name + text)


def far(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs differ by far more than rounding."""
    return not torch.allclose(one, other, rtol=0, atol=1e-3)
