"""Models, and the ways in which a task leaves the library, for the tests of exports."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from wsn_fast import WSN, convert

Program = Callable[[Tensor], Tensor]


class Classifier(nn.Module):
    """A transformer encoder over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.position = nn.Parameter(torch.zeros(1, 5, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens) + self.position).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def conv_net() -> nn.Module:
    convolutions = [nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3)]
    return nn.Sequential(*convolutions, nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "mlp": (mlp, {}),
    "mlp with heads": (mlp, {"heads": "4"}),
    "conv net": (conv_net, {"heads": "7"}),
    "transformer": (Classifier, {"heads": "head"}),
}


def train(wsn: WSN, task: int, x: Tensor) -> None:
    wsn.train()
    wsn.begin_task(task)
    optimizer = wsn.guard(torch.optim.AdamW(wsn.parameters(), lr=0.02))
    for _ in range(2):
        optimizer.zero_grad()
        functional.cross_entropy(wsn(x), torch.arange(len(x)) % 3).backward()
        optimizer.step()
    wsn.end_task()
    wsn.eval()


def finished(model: str) -> tuple[WSN, Tensor]:
    """A WSN with the finished tasks 0 and 1, and an input."""
    torch.manual_seed(0)
    make, conversion = MODELS[model]
    wsn = WSN(convert(make(), 0.4, **conversion))
    shapes = {"conv net": (4, 3, 6, 6), "transformer": (4, 5)}
    x = torch.randint(20, (4, 5)) if model == "transformer" else torch.randn(shapes.get(model, (4, 8)))
    for task in (0, 1):
        train(wsn, task, x)
    return wsn, x


# --- the ways out, each of which makes a program of a module and an input ---------------------------------------------
def exported(model: nn.Module, x: Tensor) -> Program:
    return torch.export.export(model, (x,)).module()


def saved(model: nn.Module, x: Tensor) -> Program:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,)), buffer)
    buffer.seek(0)
    return torch.export.load(buffer).module()


def strictly_exported(model: nn.Module, x: Tensor) -> Program:
    return torch.export.export(model, (x,), strict=True).module()


def traced(model: nn.Module, x: Tensor) -> Program:
    return torch.jit.trace(model, (x,))


def recorded(model: nn.Module, x: Tensor) -> Program:
    return make_fx(lambda x: model(x))(x)


def compiled(model: nn.Module, x: Tensor) -> Program:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def in_runtime(file: bytes) -> Program:
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def onnx(model: nn.Module, x: Tensor) -> Program:
    buffer = io.BytesIO()
    torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(buffer)
    return in_runtime(buffer.getvalue())


def old_onnx(model: nn.Module, x: Tensor) -> Program:
    buffer = io.BytesIO()
    torch.onnx.export(model, (x,), buffer, dynamo=False)
    return in_runtime(buffer.getvalue())
