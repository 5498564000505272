"""Several documents in one row, none seeing another.

`pack` puts documents into rows of at most `capacity` tokens (best fit, longest first). In the row each token carries
its document's number and a position that restarts with the document; the mask is explicit, [rows, 1, T, T], and lets a
token see the earlier tokens of its own document alone. Relying on the library to notice the restarted positions is not
enough: it does so only without a mask and without a cache, and not in every architecture.

`check_isolation` measures on the model itself that this holds, and refuses where it does not.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from strop.errors import TrainingError

if TYPE_CHECKING:
    from strop.data.batches import Batch

_NEXT_STEP = "turn packing off for this model (packing: false)"


@dataclass(frozen=True)
class PackedAttention:
    """What a model needs of the explicit mask.

    Attributes:
        dtype: The model's dtype; the mask is added to the scores (0 or the dtype's lowest value).
        window: How many tokens back, itself included, a token sees in the sliding layers; None where there are none, or
            where the window is longer than any row.
        mixed: Whether other layers see all tokens; the mask is then one for each kind of layer.
    """

    dtype: torch.dtype = torch.float32
    window: int | None = None
    mixed: bool = False


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the longest document first, each into the fullest row that still has room.

    Args:
        lengths: Tokens of each document, none above `capacity`.
        capacity: Tokens of a row.

    Returns:
        Rows of document indices; every index stands in exactly one row. The same lengths always give the same rows.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        place = bisect_left(room, (length, -1))
        if place == len(room):
            rows.append([index])
            left, row = capacity - length, len(rows) - 1
        else:
            left, row = room.pop(place)
            rows[row].append(index)
            left -= length
        insort(room, (left, row))
    return rows


def block_mask(documents: Tensor, attention: PackedAttention) -> Tensor | dict[str, Tensor]:
    """The additive mask [B, 1, T, T] in `attention.dtype`: 0 where a token may look, the lowest value elsewhere.

    Token q sees token k if both belong to one document and 0 <= q - k (< window, in sliding layers). Additive, since a
    mask of booleans is right for sdpa and silently wrong for eager attention, which adds it.

    Args:
        documents: The number of each token's document [B, T].
        attention: dtype and window.

    Returns:
        One mask, or for mixed layers one for each kind, ``full_attention`` and ``sliding_attention``, as models with
        such layers take them.
    """
    positions = torch.arange(documents.shape[1], device=documents.device)
    distance = positions[:, None] - positions[None, :]  # [T, T], query minus key
    seen = (documents[:, :, None] == documents[:, None, :]) & (distance >= 0)  # [B, T, T]
    if attention.window is None:
        return _additive(seen, attention.dtype)
    near = _additive(seen & (distance < attention.window), attention.dtype)
    if not attention.mixed:
        return near
    return {"full_attention": _additive(seen, attention.dtype), "sliding_attention": near}


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where True, the dtype's lowest value where False: [B, T, T] -> [B, 1, T, T]."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def packed_attention(model: Any, max_length: int) -> PackedAttention:
    """Read from a model's configuration what the mask must hold for rows of `max_length` tokens.

    A document is never longer than a row, so a sliding window at least that long changes nothing. A shorter one goes
    into the mask; where only some layers slide, each kind of layer gets its own. `check_isolation` then measures the
    result.

    Raises:
        TrainingError: If the attention cannot be written as an explicit mask.
    """
    config = model.config.get_text_config()
    implementation = getattr(config, "_attn_implementation", "sdpa")
    if implementation not in ("sdpa", "eager"):
        raise TrainingError(
            f"packing needs an explicit attention mask, which attention {implementation!r} does not take; load the "
            f"model with sdpa or eager attention, or {_NEXT_STEP}"
        )
    kinds = set(getattr(config, "layer_types", None) or ())
    unknown = sorted(kinds - {"full_attention", "sliding_attention", "chunked_attention"})
    if unknown:
        raise TrainingError(
            f"packing cannot keep documents apart in layers of the kind {', '.join(unknown)} of "
            f"{type(model).__name__}; {_NEXT_STEP}"
        )
    chunk = getattr(config, "attention_chunk_size", None)
    if "chunked_attention" in kinds and chunk is not None and chunk < max_length:
        raise TrainingError(
            f"packing: rows of max_length {max_length} tokens are longer than the chunks of {chunk} that "
            f"{type(model).__name__} attends in; set max_length to {chunk} or less, or {_NEXT_STEP}"
        )
    window = getattr(config, "sliding_window", None)
    if (kinds and "sliding_attention" not in kinds) or not getattr(config, "use_sliding_window", True):
        window = None
    if window is not None and window >= max_length:
        window = None
    return PackedAttention(dtype=model.dtype, window=window, mixed=window is not None and len(kinds) > 1)


@torch.no_grad()
def check_isolation(model: Any, batch: Batch) -> None:
    """Measure on the model that packed documents do not see each other and read as they do alone.

    One row of the batch is run three times: as it is; with every other document's tokens replaced, where the logits of
    the document in the middle must not move; and that document alone, where they must be the same up to rounding.

    Args:
        model: The model that will be trained, on its device.
        batch: A packed batch with at least one row of two documents; without one, nothing is to be checked.

    Raises:
        TrainingError: If the logits move, or the model does not take the mask; the message gives the measured figure.
    """
    row = next((r for r in range(batch.input_ids.shape[0]) if batch.document_count(r) > 1), None)
    if row is None:
        return
    one = batch.select(row)
    documents = one.documents
    assert documents is not None
    inside = documents[0] == 1  # the second document has others before it, and often behind it
    was_training = model.training
    model.eval()
    try:
        before = _logits(model, one.inputs())[0]
        other = one.with_ids(torch.where(inside[None], one.input_ids, _other_ids(one.input_ids, before.shape[-1])))
        after = _logits(model, other.inputs())[0]
        alone = _logits(model, {"input_ids": one.input_ids[:, inside], "use_cache": False})[0]
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise TrainingError(
            f"packing: {type(model).__name__} does not take the mask that keeps documents apart "
            f"({str(error).splitlines()[0]}); {_NEXT_STEP}"
        ) from error
    finally:
        model.train(was_training)
    spread = max(float(before[inside].float().std()), 1e-6)
    rounding = float(torch.finfo(before.dtype).eps)
    moved = _root_mean_square(after[inside] - before[inside]) / spread
    if not moved <= max(4 * rounding, 1e-6):
        raise TrainingError(
            f"packing: in {type(model).__name__} packed documents see each other: replacing one moved another's logits "
            f"by {moved:.1e} of their spread; {_NEXT_STEP}"
        )
    apart = _root_mean_square(alone - before[inside]) / spread
    if not apart <= max(16 * rounding, 1e-4):
        raise TrainingError(
            f"packing: in {type(model).__name__} a packed document does not read as it does alone: its logits differ "
            f"by {apart:.1e} of their spread; {_NEXT_STEP}"
        )


def _root_mean_square(difference: Tensor) -> float:
    return float(difference.float().square().mean().sqrt())


def _logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs).logits


def _other_ids(ids: Tensor, vocabulary: int) -> Tensor:
    """Ids that all differ from the given ones."""
    return (ids + 1 + vocabulary // 3) % vocabulary
