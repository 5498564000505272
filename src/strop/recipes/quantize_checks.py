"""What `quantize` refuses of its options before it looks at the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from strop.errors import FormatError, UsageError, nearest
from strop.files import compressed_tensors
from strop.methods import BLOCK_METHODS, METHODS
from strop.numerics import OBSERVERS
from strop.numerics.activation_observers import ActivationObserver, activation_observer
from strop.numerics.scheme import Scheme, parse_format
from strop.recipes.rows import Rows


def scheme_of(format: str) -> Scheme:
    """The scheme of a format that a folder can hold."""
    spec = parse_format(format)
    if spec.scheme.super_size is not None:
        compressed_tensors.check_scheme(spec.scheme)  # refuses it: no file that is written now holds the grid
    if spec.container is not None:
        raise FormatError(
            f"{format!r}: a GGUF file is written by `strop export MODEL --format {spec} -o FILE.gguf`; the same grid "
            f"in a folder is {spec.scheme}, whose codes an export takes over bit for bit"
        )
    return spec.scheme


def check_method(method: str, observer: str) -> None:
    """Refuse names that are unknown or do not go together."""
    known = [*METHODS, *BLOCK_METHODS]
    if method not in known:
        raise UsageError(f"method {method!r} is unknown{nearest(method, known)}; there are {', '.join(known)}")
    if observer not in OBSERVERS:
        raise UsageError(
            f"observer {observer!r} is unknown{nearest(observer, OBSERVERS)}; there are {', '.join(OBSERVERS)}"
        )
    if observer != "minmax" and method != "rtn":
        raise UsageError(f"observer {observer}: method {method} finds its scales itself; leave the observer out")


def check_scale_steps(steps: int, scheme: Scheme, *, has_rows: bool) -> None:
    """Refuse scales that cannot be trained."""
    if steps < 0:
        raise UsageError(f"scale_steps: a number of steps from 0 on is needed, got {steps}")
    if not has_rows:
        raise UsageError("scale_steps: scales are trained on rows; give some with --data")
    if scheme.activations is not None:
        raise UsageError(f"scale_steps: {scheme} rounds activations too; only formats of weights have scales to train")
    if not scheme.has_real_scales:
        raise UsageError(
            f"scale_steps: the scales of {scheme} are codes themselves, and cannot be trained; those of int4-g32 and "
            "nf4 can"
        )


def check_weights_only(schemes: Sequence[Scheme]) -> None:
    """Refuse formats that round activations among those to choose from."""
    found = [scheme.name for scheme in schemes if scheme.activations is not None]
    if found:
        raise FormatError(
            f"{', '.join(found)}: a budget and a repair choose among formats of weights, and 8-bit activations take no "
            "bits of the model; name formats such as int4-g32-full and int8-g32 with --formats, or round all layers "
            "alike (--format int8-a8)"
        )


def observing_activations(scheme: Scheme, name: str, data: Rows | None) -> Callable[[], ActivationObserver] | None:
    """What observes the inputs of each layer; None where the format fixes no scale for them."""
    make = activation_observer(name)
    if scheme.activations is None or not scheme.activations.is_static:
        if name != "minmax":
            raise UsageError(
                f"activation observer {name}: {scheme} fixes no scale for activations; leave it out, or use "
                "int8-a8-static"
            )
        return None
    if data is None:
        raise UsageError(
            f"{scheme}: the scale of the activations is fixed from data; give rows of the kind that the model will see "
            "(--data FILE), or use int8-a8, which needs none"
        )
    return make
