"""One variable-length attention function, and the kernels behind it.

Every kernel has the signature of `AttentionKernel`: attention inside each sequence under the mask
that the model's family says, nothing across sequences. `choose_kernel` picks one by name, once, at
start.

Letters: Tq query rows, Tk key rows, H heads, K kv heads, E head width, N sequences.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.cpu import planner, sdpa_by_length, shared_heads, within
from model.errors import UnsupportedError
from model.extras import how_to_install
from model.packing import Planner, Segments
from model.platform import resources

logger = logging.getLogger("nv_embed.attention")


class AttentionKernel(Protocol):
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: Segments,
        keys: Segments,
        *,
        causal: bool = False,
        window: int | None = None,
    ) -> Tensor:
        """q [Tq, H, E], k and v [Tk, K, E] -> [Tq, H, E].

        The rows of sequence i of `queries` are the last of sequence i of `keys`, and attend to all
        of its rows; causal: to themselves and those before them, of which a `window` takes so many,
        themselves included. Behind the last sequence there may be filler (CPU only), whose output
        rows hold anything.
        """
        ...


def sdpa_padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Segments,
    keys: Segments,
    *,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """All padded to the longest: for GPUs and dtypes that the varlen kernels refuse."""
    k, v, grouped = shared_heads(q, k, v)
    padded = _pad(q, queries), _pad(k, keys), _pad(v, keys)
    window = within(window, keys)
    if causal and queries is keys and window is None:
        # What is behind a sequence's end is behind all of its rows.
        out = F.scaled_dot_product_attention(*padded, is_causal=True, enable_gqa=grouped)
    else:
        mask = _padded_mask(queries, keys, causal, window)[:, None]
        out = F.scaled_dot_product_attention(*padded, attn_mask=mask, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(0, 1)[_padded_rows(queries)]


def _padded_mask(queries: Segments, keys: Segments, causal: bool, window: int | None) -> Tensor:
    """[N, 1 or longest query, longest key] whether it is seen."""
    lengths = keys.cu_seqlens.diff()[:, None, None]
    places = torch.arange(keys.max_seqlen, device=lengths.device)
    if not causal:
        return places < lengths
    rows = torch.arange(queries.max_seqlen, device=lengths.device)[:, None]
    last_seen = lengths - queries.cu_seqlens.diff()[:, None, None] + rows
    last_seen = torch.minimum(last_seen, lengths - 1)
    if window is None:
        return places <= last_seen
    return (places <= last_seen) & (places > last_seen - window)


def _padded_rows(segments: Segments) -> Tensor:
    """[T] the row that each packed row takes in the flattened padded tensor [N * max_seqlen]."""
    bounds = segments.cu_seqlens
    rows = sum(segments.lengths)
    lengths = bounds.diff()
    sequence = torch.repeat_interleave(
        torch.arange(segments.num_seqs, device=bounds.device), lengths, output_size=rows
    )
    within = torch.arange(rows, device=bounds.device) - bounds[:-1][sequence]
    return sequence * segments.max_seqlen + within


def _pad(x: Tensor, segments: Segments) -> Tensor:
    """[T, heads, E] -> [N, heads, max_seqlen, E], zeros after each sequence."""
    shape = (segments.num_seqs * segments.max_seqlen, *x.shape[1:])
    padded = x.new_zeros(shape).index_copy_(0, _padded_rows(segments), x)
    return torch.unflatten(padded, 0, (segments.num_seqs, segments.max_seqlen)).transpose(1, 2)


def varlen_kernel(attend: Callable[..., Tensor]) -> AttentionKernel:
    """A kernel around torch's `varlen_attn`, whose signature changes between releases."""
    parameters = inspect.signature(attend).parameters
    native_gqa = "enable_gqa" in parameters
    # One split of the keys, so that a text's bits do not depend on how many there are beside it.
    always: dict[str, Any] = {"num_splits": 1} if "num_splits" in parameters else {}

    def masked(window: int | None) -> dict[str, Any]:
        """Either way the mask's corner is where the last query meets the last key."""
        if window is None and "is_causal" in parameters:
            return {"is_causal": True}
        if "window_size" in parameters:
            return {"window_size": (-1 if window is None else window - 1, 0)}
        raise UnsupportedError(
            f"this torch's varlen_attn knows no sliding window ({window} tokens here): "
            "--attention flash-attn or padded, or --max-input-tokens within the window"
        )

    def varlen(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: Segments,
        keys: Segments,
        *,
        causal: bool = False,
        window: int | None = None,
    ) -> Tensor:
        options = always | masked(within(window, keys)) if causal else dict(always)
        if q.shape[1] != k.shape[1]:
            if native_gqa:
                options["enable_gqa"] = True
            else:
                groups = q.shape[1] // k.shape[1]
                k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return attend(
            q,
            k,
            v,
            queries.cu_seqlens,
            keys.cu_seqlens,
            queries.max_seqlen,
            keys.max_seqlen,
            **options,
        )

    return varlen


def flash_attn_kernel(attend: Callable[..., Tensor]) -> AttentionKernel:
    """A kernel around `flash_attn_varlen_func` of the flash-attn package."""

    def flash_attn(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: Segments,
        keys: Segments,
        *,
        causal: bool = False,
        window: int | None = None,
    ) -> Tensor:
        window = within(window, keys)
        options = {"window_size": (window - 1, 0)} if causal and window is not None else {}
        return attend(
            q,
            k,
            v,
            queries.cu_seqlens,
            keys.cu_seqlens,
            queries.max_seqlen,
            keys.max_seqlen,
            causal=causal,  # the mask's corner as in `varlen`, since flash-attn 2.1
            **options,
        )

    return flash_attn


def _load_varlen() -> AttentionKernel:
    with resources.for_good():  # torch's compiler comes along: 0.63 in place of 0.78 s
        varlen = importlib.import_module("torch.nn.attention.varlen")
    return varlen_kernel(varlen.varlen_attn)


def _load_flash_attn() -> AttentionKernel:
    return flash_attn_kernel(importlib.import_module("flash_attn").flash_attn_varlen_func)


@dataclass(frozen=True, slots=True)
class _Kernel:
    load: Callable[[], AttentionKernel]
    why_not: Callable[[torch.device, torch.dtype], str | None]
    """The reason why it cannot run there, or None when it can."""


def _always(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _flash_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cpu":  # first: on a CPU nothing else would help
        return "it runs on CUDA only"
    # On meta tensors the kernels accept float32, which CUDA does not: so we check ourselves.
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 (Ampere) or later"
    return None


def _varlen_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if reason := _flash_refusal(device, dtype):
        return reason
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return "this torch has no torch.nn.attention.varlen (2.10 or later has)"
    return None


def _flash_attn_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if reason := _flash_refusal(device, dtype):
        return reason
    if importlib.util.find_spec("flash_attn") is None:
        return f"the flash-attn package is not installed: {how_to_install('flash-attn')}"
    try:
        module = importlib.import_module("flash_attn")
    except ImportError as error:  # often: it was compiled for another torch
        logger.warning("flash-attn is installed and cannot be imported: %s", error)
        return f"the flash-attn package cannot be imported: {error}"
    if not hasattr(module, "flash_attn_varlen_func"):  # flash-attn-4 installs a folder beside it
        return f"what is installed as flash_attn is another package: {how_to_install('flash-attn')}"
    return None


_KERNELS = {
    # The same kernel as flash-attn's, compiled with torch: it cannot be for another one.
    "varlen": _Kernel(_load_varlen, _varlen_refusal),
    "flash-attn": _Kernel(_load_flash_attn, _flash_attn_refusal),
    "padded": _Kernel(lambda: sdpa_padded, _always),
    "sdpa": _Kernel(lambda: sdpa_by_length, _always),
}
KERNEL_NAMES = tuple(_KERNELS)


def choose_kernel(
    name: str, device: torch.device, dtype: torch.dtype
) -> tuple[str, AttentionKernel]:
    """The kernel of that name, or with "auto" the first that runs: (its name, the function).

    Raises UnsupportedError when a kernel asked for by name cannot run there.
    """
    if name == "auto":
        if device.type == "cpu":
            return "sdpa", sdpa_by_length
        name = next(n for n, kernel in _KERNELS.items() if not kernel.why_not(device, dtype))
    if name not in _KERNELS:
        raise UnsupportedError(f"unknown attention {name!r}; known: auto, {', '.join(_KERNELS)}")
    if reason := _KERNELS[name].why_not(device, dtype):
        raise UnsupportedError(f"attention {name!r} cannot be used on {device}: {reason}")
    return name, _KERNELS[name].load()


def planner_of(
    attend: AttentionKernel, dtype: torch.dtype, *, causal: bool, window: int | None = None
) -> Planner | None:
    """What prepares a batch for this kernel, where it wants that."""
    return planner(dtype, causal=causal, window=window) if attend is sdpa_by_length else None


def available_kernels(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Names of the kernels that can run there, best first."""
    return [name for name, kernel in _KERNELS.items() if not kernel.why_not(device, dtype)]
