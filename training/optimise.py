"""Fast training of a small model on a GPU: CUDA graphs, bfloat16 weights, Muon and AdamW."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .schedule import Budget, Log, learning_rate

MATRICES = ("transformer_blocks.", "encoder.layers.", "encoder.block.")  # hidden layers, updated by Muon
MOMENTUM = 0.95  # Muon's
AVERAGING = 0.999  # decay of the moving average of the weights
CHECKPOINT_SECONDS = 60


@contextmanager
def fast_products() -> Iterator[None]:
    """Inside, float32 matrix products may use TF32; outside, the process's precision is as before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def fit(
    stage: str,
    model: nn.Module,
    loss: Callable[..., Tensor],
    batches: Iterator[tuple[Tensor, ...]],
    budget: Budget,
    log: Log,
    *,
    adam_rate: float,
    muon_rate: float = 0.0,
    warmup: int,
    memory_format: torch.memory_format = torch.preserve_format,
    checkpoint: Callable[[], None] | None = None,
) -> None:
    """Train `model` in place, on a GPU in bfloat16. It is float32 again and holds the averaged weights at the end.

    Args:
        stage: its name in the log.
        model: on the device to train on; all its parameters are trained.
        loss: of one of the `batches`.
        adam_rate, muon_rate: peak learning rates.
        warmup: steps of linear warm-up; a resumed run warms up again.
        memory_format: of the weights in bfloat16.
        checkpoint: called about once a minute, while `model` holds the averaged weights.
    """
    model.train().requires_grad_(True)
    optimiser = Optimiser(model, adam_rate, muon_rate)
    averages = [weight.clone() for weight in optimiser.weights]
    if optimiser.weights[0].is_cuda:
        model.to(dtype=torch.bfloat16, memory_format=memory_format)
    stepper = Stepper(loss, model)
    first, saved = budget.step, budget.seconds
    for step, progress in budget:
        mean = stepper(*next(batches))
        optimiser.step(learning_rate(step - first, progress, warmup))
        decay = min(AVERAGING, (1 + step - first) / (10 + step - first))  # a shorter memory in the first steps
        torch._foreach_lerp_(averages, optimiser.weights, 1 - decay)
        log.add(stage, step, mean)
        if checkpoint and budget.seconds - saved > CHECKPOINT_SECONDS:
            saved = budget.seconds
            set_weights(model, averages)
            checkpoint()
            set_weights(model, optimiser.weights)
    model.to(dtype=torch.float32, memory_format=torch.contiguous_format).eval().requires_grad_(False)
    model.zero_grad()
    set_weights(model, averages)


@torch.no_grad()
def set_weights(model: nn.Module, weights: list[Tensor]) -> None:
    torch._foreach_copy_(list(model.parameters()), weights)


class Stepper:
    """`stepper(*inputs)` returns `loss(*inputs)` and adds its gradients to those of the parameters.

    On a GPU, forward and backward passes are recorded as one CUDA graph per shape of the inputs and then replayed:
    kernel launches would dominate the time of a model this small.
    """

    def __init__(self, loss: Callable[..., Tensor], model: nn.Module):
        self.loss = loss
        self.parameters = list(model.parameters())
        self.recorded: dict[tuple, tuple] = {}
        self.pool, self.stream = None, None
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)

    def __call__(self, *inputs: Tensor) -> Tensor:
        if not inputs[0].is_cuda:
            return self._run(inputs)
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self.recorded:
            self.recorded[shapes] = self._record(inputs)
        graph, places, loss = self.recorded[shapes]
        torch._foreach_copy_(places, list(inputs))
        graph.replay()
        return loss.clone()

    def _run(self, inputs) -> Tensor:
        loss = self.loss(*inputs)
        loss.backward()
        return loss.detach()

    def _record(self, inputs) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        places = [x.clone() for x in inputs]
        self.stream = stream = self.stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # warm-up: libraries choose and load their kernels
                self._run(places)
            torch._foreach_zero_([p.grad for p in self.parameters])
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=stream):
            loss = self._run(places)
        self.pool = graph.pool()
        return graph, places, loss


class Optimiser:
    """Updates float32 master weights and copies them to the model, whose parameters may be bfloat16.

    Muon (K. Jordan 2024; scaled to Adam's step size as in arXiv 2502.16982) updates the matrices of hidden layers,
    batched by shape; AdamW updates everything else.
    """

    def __init__(self, model: nn.Module, adam_rate: float, muon_rate: float, decay: float = 0.01):
        named = list(model.named_parameters())
        self.parameters = [p for _, p in named]
        self.weights = [p.detach().float().clone() for p in self.parameters]
        self.gradients = [torch.zeros_like(w) for w in self.weights]
        self.muon_rate, self.adam_rate, self.decay = muon_rate, adam_rate, decay
        shapes, others = defaultdict(list), []
        for i, (name, p) in enumerate(named):
            hidden = p.ndim == 2 and any(part in name for part in MATRICES)
            hidden = hidden and not any(part in name for part in ("norm", "relative_attention_bias"))
            shapes[p.shape].append(i) if hidden else others.append(i)
        self.groups = list(shapes.values())
        self.momenta = [torch.zeros(len(group), *shape, device=p.device) for shape, group in shapes.items()]
        for weight, gradient in zip(self.weights, self.gradients, strict=True):
            weight.grad = gradient
        self.adam = torch.optim.AdamW(
            [self.weights[i] for i in others], betas=(0.9, 0.99), weight_decay=decay, fused=p.is_cuda
        )

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update with `rate` (0..1) times the peak learning rates, then zero the gradients. Clips their norm to 1."""
        torch._foreach_copy_(self.gradients, [p.grad for p in self.parameters])
        torch._foreach_zero_([p.grad for p in self.parameters])
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.gradients)))
        torch._foreach_mul_(self.gradients, torch.clamp(1 / (norm + 1e-6), max=1.0))
        self.adam.param_groups[0]["lr"] = rate * self.adam_rate
        self.adam.step()
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            self._muon(group, momentum, rate * self.muon_rate)
        torch._foreach_copy_(self.parameters, self.weights)

    def _muon(self, group: list[int], momentum: Tensor, rate: float) -> None:
        gradient = torch.stack([self.gradients[i] for i in group])
        momentum.lerp_(gradient, 1 - MOMENTUM)
        update = orthogonalise(torch.lerp(gradient, momentum, MOMENTUM))
        update *= 0.2 * max(update.shape[-2:]) ** 0.5
        weights = [self.weights[i] for i in group]
        torch._foreach_mul_(weights, 1 - rate * self.decay)
        torch._foreach_add_(weights, list(update.float().unbind(0)), alpha=-rate)


def orthogonalise(x: Tensor) -> Tensor:
    """Approximate the (semi-)orthogonal matrices nearest to `x` [N, A, B] by five Newton-Schulz steps."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).to(torch.bfloat16 if x.is_cuda else x.dtype)
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x
