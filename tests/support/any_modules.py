"""Small models of modules whose tensors are gated where they are read: what the tests of any tensor go through."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from wsn_fast import WSN, TaskHeads, convert
from wsn_fast.nn.gated import SubnetLayer
from wsn_fast.ops import topc_mask

DIM = 8
DENSITY = 0.4
GENERATOR = torch.Generator().manual_seed(0)
VECTORS = torch.randn(6, 5, DIM, generator=GENERATOR)
WORDS = torch.randint(0, 11, (6, 5), generator=GENERATOR)
LABELS = torch.arange(6) % 3


class Called(nn.Module):
    """Calls ``module`` with its input, ``times`` times, and returns one vector for each row."""

    def __init__(self, module: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.module, self.times = module, times

    def forward(self, x: Tensor) -> Tensor:
        out = self.module(*[x] * self.times)
        out = out[0] if isinstance(out, tuple) else out
        return out.mean(1) if out.ndim == 3 else out


class Recurrence(nn.Module):
    """Calls a cell for each time."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for time in range(x.shape[1]):
            state = self.cell(x[:, time], state)
        return state[0] if isinstance(state, tuple) else state


class Bare(nn.Module):
    """Parameters of its own, in lists and dicts too."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(5, DIM))
        self.token = nn.Parameter(torch.randn(1, 1, DIM))  # a vector: it needs an owner
        self.listed = nn.ParameterList([torch.randn(DIM, DIM) for _ in range(2)])
        self.named = nn.ParameterDict({"in": torch.randn(DIM, DIM), "bias": torch.randn(DIM)})

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh((x + self.positions + self.token) @ self.named["in"] + self.named["bias"])
        for matrix in self.listed:
            x = torch.tanh(x @ matrix)
        return x.mean(1)


class Experts(nn.Module):
    """Weights of three dimensions, of which a loop takes one matrix after the other, as Mixtral does."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(3, DIM, DIM) / 3)
        self.router = nn.Linear(DIM, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1)
        return sum(shares[..., i : i + 1] * torch.tanh(x @ self.gate_up[i]) for i in range(3)).mean(1)


class TiedDecoder(nn.Module):
    """Multiplies with the weight of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(11, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(self.inner(self.embed(x).mean(1))), self.embed.weight)


def decoded(h: Tensor, embed: nn.Module) -> Tensor:
    return F.linear(h, embed.weight)


class Helped(TiedDecoder):
    """The same, by a function that is no method."""

    def forward(self, x: Tensor) -> Tensor:
        return decoded(torch.relu(self.inner(self.embed(x).mean(1))), self.embed)


class TiedLayers(nn.Module):
    """An embedding and a linear layer that are one Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(11, DIM), nn.Linear(DIM, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embed(x).mean(1)))


class PlainLinear(nn.Linear):
    """A subclass that computes what nn.Linear computes."""


class Standardised(nn.Conv1d):
    """A convolution whose weight is standardised, as in BiT."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2), keepdim=True)
        return self._conv_forward(x, weight / (weight.std((1, 2), keepdim=True) + 1e-5), self.bias)


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = Standardised(DIM, DIM, 3), PlainLinear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x.transpose(1, 2))).mean(2))


class Low(nn.Module):
    """A linear layer with an adapter of low rank, as PEFT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(DIM, DIM)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(DIM, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, DIM, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class LowBare(nn.Linear):
    """The same with bare Parameters, as loralib has it, and with a method that users call by itself."""

    def __init__(self) -> None:
        super().__init__(DIM, DIM)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, DIM)), nn.Parameter(torch.randn(DIM, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x).mean(1)

    def forward_features(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.lora_B @ self.lora_A, self.bias)


class Sequenced(nn.Module):
    """nn.Transformer, with the input as source and as target."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Transformer(DIM, 2, 1, 1, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x, x.flip(1)).mean(1)


class Reads(nn.Module):
    """Returns what ``read`` gets of an embedding and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(5, 4), nn.Linear(4, 4)

    def read(self) -> list[Tensor]:
        return [self.embed.weight, self.linear.weight]

    def forward(self, x: Any = None) -> list[Tensor]:
        return self.read()


class Case(NamedTuple):
    """A model without heads.

    Attributes:
        make: makes the model.
        x: a batch for it.
        width: the number of its outputs for a row.
        owners: what ``WSN`` is told about tensors that are not gated.
        traced: whether ``torch.compile(fullgraph=True)`` can trace the model without this library.
        pickled: whether PyTorch can pickle such a model.
    """

    make: Callable[[], nn.Module]
    x: Tensor = VECTORS
    width: int = DIM
    owners: Mapping[str, Any] = MappingProxyType({})
    traced: bool = True
    pickled: bool = True


def _encoder(layers: int = 1, **kwargs: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(DIM, 2, 16, dropout=0.0, batch_first=True, **kwargs)
    return Called(nn.TransformerEncoder(layer, layers, enable_nested_tensor=not kwargs.get("norm_first", False)))


def _attention(**kwargs: Any) -> nn.Module:
    return Called(nn.MultiheadAttention(DIM, 2, batch_first=True, **kwargs), 3)


def _linear(change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch.nn.utils.weight_norm
        return Called(change(nn.Linear(DIM, DIM)))


class Keys(nn.Module):
    """Attention with keys and values of other sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(DIM, 2, kdim=3, vdim=5, batch_first=True, add_bias_kv=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, x[..., :3], x[..., :5])[0].mean(1)


CASES = {
    "attention": Case(_attention),
    "attention with bias_k": Case(lambda: _attention(add_bias_kv=True, bias=False)),
    "attention with kdim": Case(Keys),
    "encoder": Case(_encoder),
    "encoder, norms first": Case(lambda: _encoder(2, norm_first=True, activation="gelu")),
    "transformer": Case(Sequenced),
    "LSTM": Case(lambda: Called(nn.LSTM(DIM, DIM, batch_first=True, num_layers=2)), traced=False),
    "LSTM, both ways": Case(
        lambda: Called(nn.LSTM(DIM, DIM // 2, batch_first=True, bidirectional=True, proj_size=3)), width=6, traced=False
    ),
    "GRU": Case(lambda: Called(nn.GRU(DIM, DIM, batch_first=True, bias=False)), traced=False),
    "RNN": Case(lambda: Called(nn.RNN(DIM, DIM, batch_first=True)), traced=False),
    "LSTM cell": Case(lambda: Recurrence(nn.LSTMCell(DIM, DIM))),
    "GRU cell": Case(lambda: Recurrence(nn.GRUCell(DIM, DIM))),
    "embedding": Case(lambda: Called(nn.Embedding(11, DIM, padding_idx=0)), WORDS),
    "bag": Case(lambda: Called(nn.EmbeddingBag(11, DIM)), WORDS),
    "bag, sum": Case(lambda: Called(nn.EmbeddingBag(11, DIM, mode="sum", padding_idx=1)), WORDS),
    "bag, max": Case(lambda: Called(nn.EmbeddingBag(11, DIM, mode="max")), WORDS),
    "bilinear": Case(lambda: Called(nn.Bilinear(DIM, DIM, DIM), 2)),
    "bare": Case(Bare, owners={"per_task": "token"}),
    "experts": Case(Experts),
    "tied decoder": Case(TiedDecoder, WORDS, 11),
    "a function reads": Case(Helped, WORDS, 11),
    "tied layers": Case(TiedLayers, WORDS, 11),
    "subclasses": Case(Convolved),
    "adapter": Case(lambda: Called(Low())),
    "bare adapter": Case(LowBare),
    "weight_norm": Case(lambda: _linear(weight_norm), owners={"per_task": "weight_g"}),
    "weight_norm, parametrized": Case(
        lambda: _linear(parametrizations.weight_norm), owners={"per_task": "original0"}, pickled=False
    ),
    "spectral_norm": Case(lambda: _linear(spectral_norm), owners={"per_task": ["weight_u", "weight_v"]}),
    "spectral_norm, parametrized": Case(
        lambda: _linear(parametrizations.spectral_norm), owners={"per_task": ["_u", "_v"]}, pickled=False
    ),
    "pruned": Case(
        lambda: _linear(lambda layer: prune.l1_unstructured(layer, "weight", 0.2)), owners={"frozen": "weight_mask"}
    ),
}


class Net(nn.Module):
    """A model of :data:`CASES` with heads."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.body, self.heads = case.make(), TaskHeads(case.width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(self.body(x))


def model_of(name: str, **kwargs: Any) -> nn.Module:
    """The converted model with heads."""
    return convert(Net(CASES[name]), DENSITY, **kwargs)


def wsn_of(name: str, **kwargs: Any) -> WSN:
    return WSN(model_of(name), **CASES[name].owners, **kwargs)


def steps(wsn: WSN, optimizer: Any, x: Tensor, count: int = 2) -> None:
    """Train."""
    wsn.train()
    for _ in range(count):
        optimizer.zero_grad()
        F.cross_entropy(wsn(x), LABELS).backward()
        optimizer.step()


@torch.no_grad()
def logits(wsn: WSN, task: int, x: Tensor) -> Tensor:
    with wsn.eval().use_task(task):
        return wsn(x)


def gates(model: nn.Module) -> list[tuple[str, SubnetLayer, str]]:
    """All gated tensors: the name of the module, the module, and the name of the tensor in it."""
    layers = [(name, one) for name, one in model.named_modules() if isinstance(one, SubnetLayer)]
    return [(name, layer, gate.name) for name, layer in layers for gate in layer.gated()]


@torch.no_grad()
def masked_by_hand(dense: nn.Module, subnet: nn.Module) -> nn.Module:
    """``dense`` with the masks of the scores of ``subnet`` multiplied into its weights."""
    done = set()
    for name, layer, tensor in gates(subnet):
        param = dense.get_submodule(name).get_parameter(tensor)
        if id(param) not in done:  # tied
            done.add(id(param))
            param.mul_(topc_mask(getattr(layer, f"{tensor}_score"), layer.density))
    return dense


def twins(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A body that is converted, the same one that stays dense, masked by hand, and a batch."""
    case = CASES[name]
    torch.manual_seed(1)
    dense = case.make()
    torch.manual_seed(1)
    subnet = convert(case.make(), DENSITY)
    return subnet, masked_by_hand(dense, subnet), case.x


def masked(layer: SubnetLayer, name: str = "weight") -> Tensor:
    """The masked tensor for the scores as they are."""
    return torch.where(layer.masks_of_scores()[name], layer.param(name), 0.0)
