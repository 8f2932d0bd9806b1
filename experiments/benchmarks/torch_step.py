"""The training step in PyTorch, as a peer: the released algorithm, and the same as fast as PyTorch allows.

Written from the facts about the released code. Needs PyTorch.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

EPSILON, STEP_SIZE, ATTACK_STEPS = 0.031, 0.0078, 5
SCALE, MARGIN, TAU_B, BETA_REG = 10.0, 0.1, 1.2, 6.0  # RoBal-N on CIFAR-10-LT


class Variant(NamedTuple):
    """Options of PyTorch.

    Attributes:
      name: of the variant in tables.
      redundant: the released code's four outer passes instead of the two distinct ones.
      channels_last: NHWC memory layout.
      bfloat16: autocast to bfloat16.
      compiled: mode of torch.compile; '' for none.
    """

    name: str
    redundant: bool = False
    channels_last: bool = False
    bfloat16: bool = False
    compiled: str = ""


RELEASED = Variant("released", redundant=True)
CPU_VARIANTS = (
    Variant("two passes"),
    Variant("channels_last", channels_last=True),
    Variant("channels_last, compiled", channels_last=True, compiled="default"),
    Variant("compiled", compiled="default"),
)
GPU_VARIANTS = (
    Variant("channels_last, bf16", channels_last=True, bfloat16=True),
    Variant("channels_last, bf16, compiled", channels_last=True, bfloat16=True, compiled="default"),
    Variant(
        "channels_last, bf16, CUDA graphs", channels_last=True, bfloat16=True, compiled="reduce-overhead"
    ),
)


def pgd(predict: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, y: torch.Tensor, steps: int) -> Any:
    """Makes PGD steps on the cross entropy from a one-sided start, with the gradient of the images only."""
    adversarial = x + EPSILON * torch.rand_like(x)
    for _ in range(steps):
        adversarial = adversarial.detach().requires_grad_()
        with torch.enable_grad():
            loss = functional.cross_entropy(predict(adversarial).float(), y)
        (gradient,) = torch.autograd.grad(loss, adversarial)
        moved = adversarial.detach() + STEP_SIZE * gradient.sign()
        adversarial = torch.minimum(torch.maximum(moved, x - EPSILON), x + EPSILON).clamp(0, 1)
    return adversarial.detach()


def margin_adjusted(cosines: torch.Tensor, y: torch.Tensor, log_prior: torch.Tensor) -> torch.Tensor:
    """Returns RoBal's loss with a uniform margin and a class-aware bias."""
    margins = MARGIN * functional.one_hot(y, cosines.shape[1])
    return functional.cross_entropy(SCALE * (cosines - margins) + TAU_B * log_prior, y)


def divergence(nat: torch.Tensor, adv: torch.Tensor) -> torch.Tensor:
    """Returns RoBal's regulariser."""
    return functional.kl_div((adv.softmax(1) + 1e-12).log(), nat.softmax(1), reduction="batchmean")


def stepper(
    network: nn.Module,
    variant: Variant,
    *,
    robal: bool,
    attack_steps: int = ATTACK_STEPS,
    device: str = "cpu",
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Returns a function ``(images [B, C, H, W], labels [B]) -> loss`` that makes one training step.

    Args:
      network: returns logits; for RoBal, cosines.
      variant: options of PyTorch.
      robal: RoBal-N, or plain adversarial training.
      attack_steps: of the inner attack.
      device: 'cpu' or 'cuda'.
    """
    layout = torch.channels_last if variant.channels_last else torch.contiguous_format
    network = network.to(device, memory_format=layout)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
    call: Any = torch.compile(network, mode=variant.compiled) if variant.compiled else network
    log_prior = torch.linspace(0, -4, 10, device=device).log_softmax(0)

    def precision() -> Any:
        return torch.autocast(device, torch.bfloat16) if variant.bfloat16 else contextlib.nullcontext()

    def logits(x: torch.Tensor) -> torch.Tensor:
        if variant.compiled == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        with precision():
            return call(x).float()

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x.to(memory_format=layout)
        network.eval()
        adversarial = pgd(logits, x, y, attack_steps)
        network.train()
        adv = logits(adversarial)
        if not robal:
            loss = functional.cross_entropy(adv, y)
        elif variant.redundant:
            loss = margin_adjusted(adv, y, log_prior) + 0.0 * functional.cross_entropy(logits(x), y)
            loss = loss + BETA_REG * divergence(logits(x), logits(adversarial))
        else:
            loss = margin_adjusted(adv, y, log_prior) + BETA_REG * divergence(logits(x), adv)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
