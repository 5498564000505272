"""Rotating the residual stream of a model: other weights, the same function, and features without outliers.

The stream h, which every block reads through a norm and adds to, becomes h Q (Q orthogonal). A norm by the root mean
square alone commutes with Q once its gain stands in the linear layers behind it; so (SpinQuant's R1, Liu and others,
arXiv 2405.16406; QuaRot, arXiv 2404.00456)

    embedding E -> E Q;    a reader (W behind a norm of gain g) -> W diag(g) Q;    a writer -> Q^T W, bias b -> b Q

and a head that is tied to the embedding gets a weight of its own. Nothing of it costs anything at run time.

Which layers read and write is seen in one run over a few tokens, never by name: norms are the modules that return
h / rms(h) * g, readers take the very tensor that such a norm returned, writers gave the very difference of the stream
between two norms. Where that does not add up (layer norms that subtract the mean, scaled embeddings, a block that does
something else with the stream), or the logits change, the model is put back as it was and refused.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from strop.errors import ModelError
from strop.layers.base import is_linear
from strop.methods.hadamard import Rotation

TOLERANCE = 1e-4
"""Largest difference between the logits, as a share of the largest one."""

_CLOSE = 1e-4
"""Two tensors of the run are taken for equal within this share of the larger's largest value."""


@dataclass
class _Run:
    """What one run over a few tokens showed.

    Attributes:
        norms: Norms of the stream with the input of each, in the order of use.
        outputs: What each of these norms returned.
        readers: Names of the linear layers that took it, by norm.
        made: Outputs of linear layers by name.
    """

    norms: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    outputs: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    readers: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    made: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


@torch.no_grad()
def rotate_residual(model: Any, rotation: Rotation) -> None:
    """Rotate the residual stream of a causal language model in place; its logits stay what they were.

    Args:
        model: transformers' model, dense, in float32.
        rotation: Of the hidden size.

    Raises:
        ModelError: The model is not one whose stream can be rotated this way; it is left as it was.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    hidden = embedding.weight.shape[1]
    refusal = f"{type(model).__name__}: cannot rotate: "
    if len(rotation.signs) != hidden:
        raise ModelError(refusal + f"a rotation of {len(rotation.signs)} features for a hidden size of {hidden}")
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        raise ModelError(refusal + "its weights are not all in float32; open it with dtype float32")
    if head is None:
        raise ModelError(refusal + "it has no output head")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, embedding.weight.shape[0], (2, 16), generator=generator)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    expected, run, stream = _observe(model, tokens, embedding, hidden)
    writers = _writers(run, stream, refusal)
    tied = head.weight is embedding.weight
    was_tied = getattr(model.config, "tie_word_embeddings", None)
    try:
        if tied:
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
            model.config.tie_word_embeddings = False
        modules = dict(model.named_modules())
        for norm, readers in run.readers.items():
            gain = _take_gain(modules[norm], hidden, refusal + norm)
            for name in readers:
                weight = modules[name].weight
                weight.copy_(rotation.apply(weight * gain))
        for name in writers:
            module = modules[name]
            module.weight.copy_(rotation.apply(module.weight.t().contiguous()).t())
            if module.bias is not None:
                module.bias.copy_(rotation.apply(module.bias))
        embedding.weight.copy_(rotation.apply(embedding.weight))
        difference = (model(tokens).logits - expected).abs().max() / expected.abs().max()
        if not difference <= TOLERANCE:
            raise ModelError(
                refusal + f"the rotated model's logits differ by {difference:.1e} of the largest, so something else "
                "reads or writes its residual stream"
            )
    except BaseException:
        if tied:
            head.weight = embedding.weight
            model.config.tie_word_embeddings = was_tied
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
        raise


def _observe(model: Any, tokens: Tensor, embedding: nn.Module, hidden: int) -> tuple[Tensor, _Run, Tensor]:
    """The logits, what the run showed, and the stream as the embedding gives it."""
    run = _Run()
    stream: list[Tensor] = []
    names = {module: name for name, module in model.named_modules()}

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module is embedding:
            stream.append(output)
        elif not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
            return
        elif is_linear(module):
            run.made[names[module]] = output
            for norm, returned in run.outputs.items():
                if args[0].data_ptr() == returned.data_ptr() and args[0].shape == returned.shape:  # it, or a view of it
                    run.readers[norm].append(names[module])
        else:
            run.norms[names[module]], run.outputs[names[module]] = args[0], output
            run.readers[names[module]] = []

    hooks = [
        module.register_forward_hook(after)
        for module in model.modules()
        if module is embedding or is_linear(module) or _gain(module, hidden) is not None
    ]
    training = model.training
    model.eval()
    try:
        logits = model(tokens).logits
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return logits, run, stream[0]


def _gain(module: nn.Module, hidden: int) -> Tensor | None:
    """The g of a module that returns x / rms(x) * g, float32 [hidden], if it is one: a single vector, and tried out."""
    shapes = [tuple(parameter.shape) for parameter in module.parameters()]
    if shapes != [(hidden,)] or list(module.children()) or is_linear(module):
        return None
    x = 10 * torch.randn(4, hidden, generator=torch.Generator().manual_seed(1))  # beside which its epsilon is nothing
    try:
        returned = module.forward(x)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None  # it takes something else than one tensor of this width
    if not isinstance(returned, Tensor) or returned.shape != x.shape:
        return None
    scaled = x * x.square().mean(dim=-1, keepdim=True).rsqrt()
    gain = (scaled * returned).sum(dim=0) / scaled.square().sum(dim=0)
    return gain if _same(scaled * gain, returned) else None


def _take_gain(module: nn.Module, hidden: int, refusal: str) -> Tensor:
    """Make a norm's gain 1 and return what it was, whichever way its weight is meant (g, or 1 + g)."""
    gain = _gain(module, hidden)
    (weight,) = module.parameters()
    for neutral in (1.0, 0.0):
        weight.fill_(neutral)
        now = _gain(module, hidden)
        if gain is not None and now is not None and _same(now, torch.ones_like(now)):
            return gain
    raise ModelError(refusal + " has no weight that makes its gain 1")


def _writers(run: _Run, stream: Tensor, refusal: str) -> list[str]:
    """The linear layers that add to the stream, one between each two norms."""
    if not run.norms:
        raise ModelError(refusal + "it has no norm by the root mean square on its residual stream")
    for norm, names in run.readers.items():
        if not names:
            raise ModelError(refusal + f"no linear layer takes what {norm} returns")
    inputs = list(run.norms.items())
    if not _same(inputs[0][1], stream):
        raise ModelError(refusal + f"{inputs[0][0]} is not given the embedding as it is")
    writers: list[str] = []
    for (norm, before), (_, after) in itertools.pairwise(inputs):
        added = after - before
        found = [name for name, output in run.made.items() if output.shape == added.shape and _same(output, added)]
        if len(found) != 1:
            raise ModelError(refusal + f"what the stream gets behind {norm} is not the output of one linear layer")
        writers += found
    return writers


def _same(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= _CLOSE * other.abs().max().clamp(min=1e-30))
