"""Optimizers, learning-rate schedules, and the moving average of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import get_scheduler

from .arguments import TrainingArguments


class KernelMuon(Muon):
    """Muon (Jordan et al. 2024) that also takes convolution kernels, each as a matrix: outputs × everything else."""

    def __init__(self, weights: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        weights = list(weights)
        matrices = [w.detach().view(len(w), -1) for w in weights]  # Muon itself accepts matrices alone
        super().__init__(matrices, lr, weight_decay, adjust_lr_fn="match_rms_adamw")
        self.param_groups[0]["params"] = weights

    def _init_group(self, group: Any, params_with_grad: Any, grads: Any, muon_momentum_bufs: Any) -> Any:
        for weight in group["params"]:
            self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
        has_complex = super()._init_group(group, params_with_grad, grads, muon_momentum_bufs)
        for tensors in (params_with_grad, muon_momentum_bufs):
            tensors[:] = [t.view(len(t), -1) for t in tensors]
        grads[:] = [g.reshape(len(g), -1) for g in grads]
        return has_complex


def make_optimizers(model: nn.Module, args: TrainingArguments) -> list[Optimizer]:
    """One or two for the model; and AdamW with β₁ = 0.5, as usual in adversarial training, for its discriminator if
    any."""
    discriminator = getattr(model, "discriminator", None)
    opponents = [] if discriminator is None else list(discriminator.parameters())
    optimizers = optimizers_of(model, args, leave_out=set(opponents))
    if opponents:
        rate = args.discriminator_learning_rate or args.learning_rate
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
