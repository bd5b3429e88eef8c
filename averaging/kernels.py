"""The arithmetic of the library, on single tensors or lists of tensors.

Everything is computed in float32 or better, whatever the dtype of the weights, and rounded once.
Averagers, soups and adapters hold no arithmetic of their own.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from averaging import compiled

if TYPE_CHECKING:
    from torch import Tensor

COMPILED = {getattr(torch, name): code for name, code in compiled.CODES.items()}

# Elements handled at a time on the CPU: large enough to outweigh the cost of calling an operation, small
# enough for the float64 sum and one converted operand to stay in the cache.
CPU_BLOCK = 128 * 1024
# On an accelerator a block only bounds the transient memory; it must be large enough to fill the chip.
DEVICE_BLOCK = 16 * 1024 * 1024

# Large enough that starting an operation on all cores costs little, small enough for the L3 cache.
LERP_BLOCK = 1024 * 1024

HALF = (torch.bfloat16, torch.float16)
WIDE = (torch.float64, torch.complex128)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype an average of ``dtype`` weights is kept and returned in: float32 or better.

    Half precision widens to float32 (complex32 to complex64); float32, float64 and their complex
    counterparts stay as they are.
    """
    return torch.promote_types(dtype, torch.float32)


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64, or complex128 for complex weights: exact for a sum of a few lower-precision numbers."""
    return torch.promote_types(dtype, torch.float64)


# Of each half format: its significant bits, the exponents of its smallest and largest normal numbers, and the bits of
# its exponent and of the smallest exponent but one.
_HALF_FORMAT = {torch.bfloat16: (8, -126, 127, 0x7F80, 0x0100), torch.float16: (11, -14, 15, 0x7C00, 0x0800)}


def round_into(out: Tensor, wide: Tensor, *, scale: float = 1.0, spare: Tensor | None = None) -> bool:
    """Round float64 ``wide`` times ``scale`` into ``out``'s dtype: to nearest, ties to even, in one rounding.

    ``out.copy_(wide)`` rounds float64 → float32 → half, and a value next to a midpoint of two half
    numbers may first be rounded onto the midpoint and then to the wrong side. So it is rounded to the
    half format's precision within float64 first; the copy is then exact.

    Args:
        out: where the result goes.
        wide: float64, or complex128 for a complex result; on ``out``'s device. Left as it is.
        scale: a power of two.
        spare: a tensor like ``wide``; with it no memory is allocated, save for uncommon values.

    Returns:
        True if ``out`` is known to be finite.
    """
    if out.is_complex():
        return round_into(torch.view_as_real(out), torch.view_as_real(wide), scale=scale)
    if spare is None:
        spare = torch.empty_like(wide)
    if out.dtype not in HALF:
        out.copy_(wide if scale == 1 else torch.mul(wide, scale, out=spare))
        return False
    if out.device.type == "cpu" and out.numel():
        # Like Veltkamp's split (Dekker 1971): w (2ˢ − 1), which is rounded to 53 bits, is w 2ˢ less w rounded to 53 − s
        # bits. Near the ends of the format's range it has fewer bits than that, which the result shows.
        bits, _, _, mask, second = _HALF_FORMAT[out.dtype]
        torch.mul(wide, (1 - 2.0 ** (53 - bits)) * scale, out=spare)
        out.copy_(spare.add_(wide, alpha=2.0 ** (53 - bits) * scale))
        bits16, scratch = out.view(torch.int16).reshape(-1), spare.reshape(-1).view(torch.int16)[: out.numel()]
        low, high = torch.bitwise_and(bits16, mask, out=scratch).aminmax()
        common = low.item() >= second
        if not common:  # zeros are common as well
            common = torch.sub(bits16, 1, out=scratch).bitwise_and_(0x7FFF).amin().item() >= second - 1
        if common and high.item() < mask:
            return True
    _round_any_into(out, wide * scale)
    return False


def _round_any_into(out: Tensor, wide: Tensor) -> None:
    """`round_into` a half format for any values: adds and subtracts a number so large that just the right bits survive.

    (A zero comes out positive.)
    """
    bits, lowest, highest, _, _ = _HALF_FORMAT[out.dtype]
    # 2**exponent of each value. Below `lowest` the format's spacing stays what it is there; above
    # `highest` all becomes infinite, and an infinite addend would make it NaN.
    power = torch.bitwise_and(wide.view(torch.int64), 0x7FF0000000000000).view(torch.float64)
    power.clamp_(2.0**lowest, 2.0**highest * 2)
    shift = 1.5 * 2.0 ** (53 - bits)
    out.copy_(torch.add(wide, power, alpha=shift).sub_(power, alpha=shift))


class Combiner:
    """Σ cᵢ·xᵢ / divisor in float64, summed in the order given and rounded once.

    It keeps its working memory, two float64 copies of the largest block it has seen: allocating that for every
    block would take longer than the arithmetic. For one thread at a time.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __call__(
        self, blocks: Iterable[Tensor], out: Tensor, coefficients: Sequence[float] | None = None, divisor: float = 1.0
    ) -> bool:
        """Combine tensors that fit the cache into ``out``.

        Args:
            blocks: at least one tensor, all alike and flat; taken one after the other, so they may share memory.
            out: where the result goes; its dtype is the result's. May lie on another device.
            coefficients: one per tensor; ones if ``None``.
            divisor: what the sum is divided by.

        Returns:
            True if ``out`` is known to be finite.
        """
        blocks = iter(blocks)
        block = next(blocks)
        total, wide = self._buffers(block)
        total.copy_(block)
        if coefficients is not None:
            total *= coefficients[0]
        for i, block in enumerate(blocks, start=1):
            wide.copy_(block)
            if coefficients is not None:
                wide *= coefficients[i]
            total += wide
        scale = 1.0
        if math.frexp(divisor)[0] == 0.5:  # a power of two: multiplying is exact too, and takes no time
            scale = 1 / divisor
        else:
            total /= divisor
        if out.device != total.device:
            return round_into(out, total.to(out.device), scale=scale)
        return round_into(out, total, scale=scale, spare=wide)

    def _buffers(self, block: Tensor) -> tuple[Tensor, ...]:
        key, size = (_wide_dtype(block.dtype), block.device), block.numel()
        memory = self._memory.get(key)
        if memory is None or memory.shape[1] < size:
            memory = self._memory[key] = torch.empty((2, size), dtype=key[0], device=key[1])
        return memory[:, :size].unbind()


def _memory(flat: Tensor) -> memoryview:
    return flat.detach().view(torch.uint8).numpy().data


class Products:
    """All inner products of d₀ = x₀ and dᵢ = xᵢ − x₀, in float64; of complex numbers the real parts.

    It keeps its working memory, a float64 copy of all blocks. For one thread at a time.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.float64)

    def __call__(self, blocks: Iterable[Tensor], count: int, total: Tensor) -> None:
        """Add the products of ``count`` tensors, all alike and flat, to ``total``; they may share memory."""
        wide = self._memory
        for i, block in enumerate(blocks):
            block = _reals(block)
            if i == 0:
                if self._memory.numel() < count * block.numel():
                    self._memory = torch.empty(count * block.numel(), dtype=torch.float64)
                wide = self._memory[: count * block.numel()].view(count, -1)
            wide[i].copy_(block)
            if i:
                wide[i] -= wide[0]
        total.addmm_(wide, wide.T)


def weighted_mean(
    blocks: Sequence[Tensor], weights: Sequence[Tensor], coefficients: Sequence[float], floor: float, out: Tensor
) -> None:
    """Σ λᵢwᵢxᵢ / Σ λᵢwᵢ element by element in float64, rounded once.

    Args:
        blocks: tensors that fit the cache, all alike and flat.
        weights: wᵢ, real and not negative, of the same length.
        coefficients: λᵢ, not negative.
        floor: the least wᵢ of the first tensor with a positive λᵢ; where all λᵢwᵢ are zero its values count.
        out: where the result goes; its dtype is the result's.
    """
    first = next(i for i, coefficient in enumerate(coefficients) if coefficient > 0)
    total = torch.zeros_like(blocks[0], dtype=_wide_dtype(blocks[0].dtype))
    share = torch.zeros_like(weights[0], dtype=torch.float64)
    for i, (block, weight) in enumerate(zip(blocks, weights, strict=True)):
        own = weight.double()
        if i == first:
            own = own.clamp(min=floor)
        own = own * coefficients[i]
        total.addcmul_(block.to(total.dtype), own.to(total.dtype))
        share += own
    round_into(out, torch.where(share == 0, blocks[first].to(total.dtype), total / share))


def refactored(factors: Sequence[tuple[Tensor, Tensor]], rank: int) -> tuple[Tensor, Tensor, float, float]:
    """Σ BᵢAᵢ as a product B A of rank ``rank``: its truncated singular value decomposition.

    With QR decompositions of [B₁ … Bₙ] and [A₁; …; Aₙ]ᵀ only a matrix of the sum of the ranks is decomposed. B and A
    share the singular values alike, B = U √S and A = √S Vᵀ; where the sum has a lower rank they end in zeros.

    Args:
        factors: (Bᵢ, Aᵢ), matrices in float64.
        rank: columns of B and rows of A.

    Returns:
        B, A, and the squared Frobenius norms of what is lost and of the whole sum.
    """
    left, right = torch.cat([b for b, _ in factors], 1), torch.cat([a for _, a in factors]).T
    (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left), torch.linalg.qr(right)
    u, s, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    squares, roots = s.square(), s[:rank].sqrt()
    b, a = left.new_zeros(len(left), rank), left.new_zeros(rank, len(right))
    b[:, : len(roots)] = (q_left @ u[:, :rank]) * roots
    a[: len(roots)] = roots[:, None] * (vt[:rank] @ q_right.T)
    return b, a, float(squares[rank:].sum()), float(squares.sum())


def squares_of(parameter: Tensor) -> Tensor:
    """Zeros for the sum of squares of its gradients: real, float32 or better, of its shape and on its device."""
    return torch.zeros_like(parameter, dtype=accumulator_dtype(parameter.dtype).to_real(), requires_grad=False)


def add_square_(total: Tensor, gradient: Tensor, weight: float) -> None:
    """``total ← total + weight |gradient|²``, in place."""
    size = gradient.abs().to(total.dtype)
    total.addcmul_(size, size, value=weight)


def project(blocks: Iterable[Tensor], direction: Tensor, total: Tensor) -> None:
    """Add ⟨direction, xᵢ⟩ of each flat tensor to ``total``, in float64; of complex numbers the real part."""
    wide = _reals(direction).double()
    for i, block in enumerate(blocks):
        total[i] += torch.dot(_reals(block).double(), wide)


def _reals(flat: Tensor) -> Tensor:
    return torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat


def combine(
    groups: Iterable[tuple[Sequence[Tensor], Tensor]],
    coefficients: Sequence[float] | None = None,
    divisor: float = 1.0,
) -> None:
    """Σ cᵢ·xᵢ / divisor of each group's tensors, as `Combiner` computes it, block by block into the group's ``out``.

    On the CPU the blocks of large tensors are shared out among all cores, which beats all cores sharing each block.
    Transient memory is a few blocks, not a copy of a tensor.

    Args:
        groups: (tensors, out): at least one tensor, all of one shape and device; and where the result goes,
            whose dtype is the result's, and which may lie on another device.
        coefficients: one per tensor; ones if ``None``.
        divisor: what the sum is divided by.
    """
    combiners = threading.local()
    mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad  # is each thread's own

    def run(blocks: list[Tensor], out: Tensor) -> None:
        with mode():
            alike = all(t.dtype is blocks[0].dtype for t in blocks)  # BEMA's EMA is wider than what it is combined with
            tensors = (*blocks, out)
            if compiled.kernels and alike and all(t.dtype in COMPILED and t.device.type == "cpu" for t in tensors):
                source, target = COMPILED[blocks[0].dtype], COMPILED[out.dtype]
                compiled.kernels.combine([*map(_memory, blocks)], source, coefficients, divisor, _memory(out), target)
                return
            combiners.__dict__.setdefault("own", Combiner())(blocks, out, coefficients, divisor)

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            pending = []
            for tensors, out in groups:
                flats, flat_out = [tensor.reshape(-1) for tensor in tensors], out.view(-1)
                on_cpu = flats[0].device.type == "cpu"
                block = CPU_BLOCK if on_cpu else DEVICE_BLOCK
                for start in range(0, len(flat_out), block):
                    blocks, part = [flat[start : start + block] for flat in flats], flat_out[start : start + block]
                    if on_cpu and threads > 1 and len(flat_out) > block:
                        pending.append(pool.submit(run, blocks, part))
                    else:
                        run(blocks, part)
            for future in pending:
                future.result()
    finally:
        torch.set_num_threads(threads)  # the workers' setting is also that of threads to come


def accumulated_bytes(weights: Mapping[str, Tensor], *, wide: bool = False) -> int:
    """The size of `accumulators` of these ``weights``."""
    dtype_of = _wide_dtype if wide else accumulator_dtype
    return sum(tensor.numel() * dtype_of(tensor.dtype).itemsize for tensor in weights.values())


def accumulators(weights: Mapping[str, Tensor], *, wide: bool = False) -> dict[str, Tensor]:
    """Copies of ``weights`` in float32 or better, or in float64 if ``wide``, on the same devices.

    Raises:
        ValueError: ``wide`` on a device that has no float64.
    """
    dtype_of = _wide_dtype if wide else accumulator_dtype
    for name, tensor in weights.items():
        if wide and tensor.device.type == "mps":
            raise ValueError(
                f"{name!r} is on {tensor.device}, which has no float64, so nothing can be accumulated in it there: "
                "absorb less often instead (a larger every=)"
            )
    return {name: tensor.detach().to(dtype_of(tensor.dtype), copy=True) for name, tensor in weights.items()}


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``, rounded once; itself if that is its dtype."""
    if tensor.dtype in WIDE and accumulator_dtype(dtype) is not dtype:
        # Conversion alone would round twice.
        out = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
        combine([([tensor], out)])
        return out
    return tensor.to(dtype)


def lerp_(accumulated: dict[str, Tensor], weights: Mapping[str, Tensor], weight: float) -> None:
    """``accumulated ← accumulated + weight (weights − accumulated)``, in place, paired by name.

    Accumulators that are not on their weights' device (after a restore) move there first. Half-precision weights
    are widened block by block, so nothing the size of the model is ever allocated.
    """
    targets, sources = [], []
    wider: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for name, target in accumulated.items():
        source = weights[name]
        if target.get_device() != source.get_device():  # by number, which costs a quarter of comparing devices
            target = accumulated[name] = target.to(source.device)
        if target.dtype is source.dtype:
            targets.append(target)
            sources.append(source)
        else:
            wider.setdefault((target.device, target.dtype), []).append((target, source))
    if targets:
        torch._foreach_lerp_(targets, sources, weight)
    for (device, dtype), pairs in wider.items():
        block = LERP_BLOCK if device.type == "cpu" else DEVICE_BLOCK
        scratch = torch.empty(min(block, sum(target.numel() for target, _ in pairs)), dtype=dtype, device=device)
        for targets, sources in _batches(pairs, block):
            sizes = [target.numel() for target in targets]
            parts = torch.split(scratch[: sum(sizes)], sizes)
            widened = [part.view(target.shape) for part, target in zip(parts, targets, strict=True)]
            torch._foreach_copy_(widened, sources)
            torch._foreach_lerp_(targets, widened, weight)


def gap(average: Tensor, weights: Tensor) -> tuple[float, float, int]:
    """Σ |average − weights|², Σ |weights|², and how many entries differ; summed in float64 on the average's device."""
    wide = _wide_dtype(average.dtype)
    ours, theirs = average.to(wide), weights.to(average.device, wide)
    difference = ours - theirs
    return difference.abs().square_().sum().item(), theirs.abs().square_().sum().item(), int((difference != 0).sum())


def unmoved(average: Tensor, weights: Tensor, weight: float) -> tuple[int, int]:
    """How many entries `lerp_` would leave as they are though they are not equal, and how many are not equal."""
    weights = weights.to(average.device)
    moved = {"": average.clone()}
    lerp_(moved, {"": weights}, weight)
    apart = average != weights
    return int((apart & (moved[""] == average)).sum()), int(apart.sum())


def _batches(pairs: Iterable[tuple[Tensor, Tensor]], block: int) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """``pairs`` in groups of at most ``block`` elements: large ones in pieces, small ones together."""
    batch: tuple[list[Tensor], list[Tensor]] = ([], [])
    room = block
    for pair in pairs:
        for target, source in _pieces(*pair, block):
            if target.numel() > room:
                yield batch
                batch, room = ([], []), block
            batch[0].append(target)
            batch[1].append(source)
            room -= target.numel()
    yield batch


def _pieces(target: Tensor, source: Tensor, block: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views that make up both tensors, of at most ``block`` elements, whatever the tensors' strides."""
    if target.numel() <= block:
        yield target, source
        return
    outermost = max((dim for dim, length in enumerate(target.shape) if length > 1), key=target.stride)
    for half in zip(target.chunk(2, outermost), source.chunk(2, outermost), strict=True):
        yield from _pieces(*half, block)
