"""What a worker takes of memory, told before it is taken, and the block size that keeps it within a bound."""

from __future__ import annotations

from pcb_ray.errors import RequestError
from pcb_ray.files.checkpoint import DTYPE_BYTES
from pcb_ray.files.remote import PIECE
from pcb_ray.matrices import together
from pcb_ray.methods.svc import svc_bytes
from pcb_ray.planning import Plan
from pcb_ray.selection import adding_bytes, tally_bytes

# Elements of a block: on a CPU what hides the cost of Python and system calls, on a GPU that of launching kernels.
CPU_BLOCK, CUDA_BLOCK, MIN_BLOCK = 1 << 18, 1 << 23, 1 << 12
SMALLER = 8  # so many times smaller is the block of a second attempt, since there is no third
# Anonymous memory of a worker that has Python, torch and Ray loaded and no work yet.
PROCESS_BYTES = 450 << 20


def worker_bytes(plan: Plan, block_elements: int) -> int:
    """The most anonymous memory a worker takes with blocks of this size: what `--memory` bounds and the plan announces."""
    n, method = plan.N, plan.method
    raw = sum(max((DTYPE_BYTES[dtype] for dtype in plan.dtypes_of(source)), default=0) for source in range(n + 1))
    per_element = raw + 4 + 8 * n + method.element_bytes(n) + 16  # as read, theta, tau, the method's temporaries, output
    tallies = 0
    if method.ranks:  # those of a task have a tally each: in the total of a sweep, and in two answers that may yet be dropped
        entries = plan.sizes.tally_entries
        tallies = 3 * method.ranks * n * tally_bytes(entries) + adding_bytes(entries)
    return PROCESS_BYTES + block_elements * per_element + tallies + _ahead_bytes(plan) + _matrix_bytes(plan)


def _matrix_bytes(plan: Plan) -> int:
    """What the largest matrix takes that is merged or calibrated whole, however many models there are."""
    method, largest = plan.method, 0
    for views in plan.views:
        for group in together(views):
            hull = group[-1].stop - group[0].first
            for view in group:
                m, n = view.shape
                own = method.matrix_bytes(m, n, plan.N) if method.of_matrix is not None else 0
                calibrating = svc_bytes(m, n) if plan.recipe.calibrate else 0
                largest = max(largest, 8 * hull + max(own, calibrating))  # the result and a task vector
    return largest


def _ahead_bytes(plan: Plan) -> int:
    """What is fetched ahead, where inputs come over a network: the pieces that hold the chunk at hand and the next ones."""
    if not plan.is_remote:
        return 0
    window = plan.sizes.chunk_elements * (1 + plan.ahead)
    widths = [max((DTYPE_BYTES[dtype] for dtype in plan.dtypes_of(source)), default=0) for source in range(plan.N + 1)]
    return sum(width * window + 2 * PIECE for width in widths if width)


def least_block(plan: Plan) -> int:
    """Elements of the smallest block that its method can work with."""
    if plan.method.unit != "tensor":
        return MIN_BLOCK
    largest = max(tensor.numel for tensor in plan.tensors)  # a block is a whole tensor
    return -(-largest // MIN_BLOCK) * MIN_BLOCK


def smaller_block(plan: Plan, block: int) -> int:
    """Elements of a block for another attempt at what has run out of memory with this one; the same if it is the smallest."""
    return max(least_block(plan), block // SMALLER // MIN_BLOCK * MIN_BLOCK)


def choose_block(plan: Plan, device: str, memory: int | None, beside: int = 0) -> int:
    """Elements of a block: the most, up to what suits the device, with which a worker that takes `beside` more stays under `memory`
    bytes.

    Raises RequestError if the bound is too low."""
    block = CUDA_BLOCK if device == "cuda" else CPU_BLOCK
    least = least_block(plan)
    if plan.method.unit == "tensor":
        block = max(least, block) if memory is None else least
    while memory is not None and worker_bytes(plan, block) + beside > memory and block > least:
        block //= 2
    needed = worker_bytes(plan, block) + beside
    if memory is not None and needed > memory:
        raise RequestError(
            f"--memory: wanted at least {needed:,} bytes for a worker of {plan.N} models, found {memory:,}. "
            "Fix: give it that, or merge fewer models at once."
        )
    return block
