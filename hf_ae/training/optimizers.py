"""Optimizers, learning-rate schedules, and the moving average of the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import get_scheduler

from .arguments import TrainingArguments
from .precision import has_bf16


class KernelMuon(Optimizer):
    """Muon (Jordan et al. 2024) that also takes convolution kernels, each as a matrix: outputs × everything else.

    The updates have the root mean square of AdamW's (Liu et al. 2025). It orthogonalises in bfloat16 where the device
    has that, as torch.optim.Muon does everywhere, and else in float32.
    """

    def __init__(self, weights: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of all weights that have a gradient."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                average = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - momentum)
                direction = weight.grad.lerp(average, momentum).reshape(len(weight), -1)
                update = orthogonalized(direction, has_bf16(weight.device.type)).view_as(weight)
                weight.mul_(1 - rate * group["weight_decay"])
                weight.add_(update, alpha=-rate * 0.2 * math.sqrt(max(direction.shape)))


def orthogonalized(matrix: Tensor, in_bf16: bool, rounds: int = 5) -> Tensor:
    """About U·Vᵀ of a matrix U·S·Vᵀ, by Newton-Schulz iterations with Jordan's coefficients."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16() if in_bf16 else matrix.float().clone()
    tall = matrix.size(0) > matrix.size(1)
    x = x.T if tall else x
    x.div_(x.norm().clamp(min=1e-7))
    for _ in range(rounds):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


def make_optimizers(model: nn.Module, args: TrainingArguments) -> list[Optimizer]:
    """One or two for the model; and AdamW with β₁ = 0.5, as usual in adversarial training, for its discriminator if
    any."""
    discriminator = getattr(model, "discriminator", None)
    opponents = [] if discriminator is None else list(discriminator.parameters())
    optimizers = optimizers_of(model, args, leave_out=set(opponents))
    if opponents:
        rate = args.learning_rate if args.discriminator_learning_rate is None else args.discriminator_learning_rate
        optimizers.append(AdamW(opponents, rate, betas=(0.5, 0.99), weight_decay=0.0, fused=can_fuse(opponents)))
    return optimizers


def optimizers_of(model: nn.Module, args: TrainingArguments, leave_out: Collection[Tensor]) -> list[Optimizer]:
    """AdamW, or Muon for the weights of layers (not embeddings and codebooks) with AdamW for everything else."""
    parameters = [p for p in model.parameters() if p.requires_grad and p not in leave_out]
    if args.optimizer == "adamw":
        return [AdamW(parameters, args.learning_rate, weight_decay=args.weight_decay, fused=can_fuse(parameters))]
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    tables |= {p for name, p in model.named_parameters() if name.endswith("codebook")}
    matrices = [p for p in parameters if p.ndim >= 2 and p not in tables]
    rest = [p for p in parameters if p.ndim < 2 or p in tables]
    optimizers: list[Optimizer] = [KernelMuon(matrices, args.learning_rate, args.weight_decay)]
    if rest:
        optimizers.append(AdamW(rest, args.learning_rate, weight_decay=0.0, fused=can_fuse(rest)))
    return optimizers


def can_fuse(parameters: list[Any]) -> bool:
    return parameters[0].device.type in ("cpu", "cuda")


def make_schedulers(optimizers: Iterable[Optimizer], args: TrainingArguments, total_steps: int) -> list[Any]:
    """One learning-rate schedule for each optimizer."""
    return [get_scheduler(args.lr_scheduler, o, args.lr_warmup_steps, total_steps) for o in optimizers]


def make_ema(model: nn.Module, args: TrainingArguments) -> Any:
    """diffusers' moving average of the weights, warmed up, or None."""
    if not args.use_ema:
        return None
    from diffusers.training_utils import EMAModel

    ema = EMAModel(model.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    ema.to(next(model.parameters()).device)
    return ema


@contextlib.contextmanager
def averaged(model: nn.Module, ema: Any) -> Iterator[None]:
    """The model with its averaged weights, where there are any."""
    if ema is None:
        yield
        return
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    try:
        yield
    finally:
        ema.restore(model.parameters())
