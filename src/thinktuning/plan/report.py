"""The plan, printed."""

from rich.console import Console
from rich.table import Table

from thinktuning.plan.job import GIB, PlanOptions
from thinktuning.plan.memory import BACKWARD, Plan
from thinktuning.plan.work import work_of

_ON_GPU = "Counted are tensors: CUDA's context and its allocator's fragments come on top."
_ON_CPU = (
    "Counted are tensors: libraries come on top, and what glibc keeps of freed ones: a fifth, and "
    "more with LoRA. It keeps little with MALLOC_MMAP_THRESHOLD_=1048576 in the environment, but "
    "rollouts then take nearly twice as long."
)


def print_plan(plan: Plan, options: PlanOptions, console: Console) -> None:
    """Print memory at each moment, the largest micro-batch, and the work of a step."""
    job = plan.job
    console.print(_heading(plan), _memory(plan), sep="\n")
    console.print(_verdict(plan))
    console.print(_work(plan, options))
    if job.strategy == "fsdp2" and job.cpu_offload:
        console.print("Offloaded weights, gradients and optimizer state are in host memory.")
    console.print(_ON_GPU if job.gpu else _ON_CPU)


def _heading(plan: Plan) -> str:
    job, sizes = plan.job, plan.sizes
    shape = f"{job.prompt_tokens} + {job.completion_tokens} tokens"
    ranks = "1 device" if job.ranks == 1 else f"each of {job.ranks} devices, {job.strategy}"
    return (
        f"{job.pretrained}: {sizes.parameters / 1e6:,.1f}M parameters, "
        f"{sizes.trained / 1e6:,.1f}M trained; {ranks}; {shape}, micro-batches of "
        f"{min(job.micro_batch_size, job.rows)}"
    )


def _memory(plan: Plan) -> Table:
    table = Table("GiB on a device")
    for name in plan.moments:
        table.add_column(name, justify="right")
    kinds = dict.fromkeys(kind for moment in plan.moments.values() for kind in moment)
    for kind in kinds:
        sizes = [moment[kind] for moment in plan.moments.values()]
        table.add_row(kind, *(_gib(size) if size else "" for size in sizes))
    table.add_section()
    totals = [moment.total() for moment in plan.moments.values()]
    table.add_row("total", *(_gib(total) for total in totals), style="bold")
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:.3f}" if size < GIB else f"{size / GIB:.2f}"


def _verdict(plan: Plan) -> str:
    job = plan.job
    device = f"{_gib(job.device_memory)} GiB"
    peak = f"Peak: {_gib(plan.peak)} GiB, at the {plan.limit}, of {device}."
    largest = plan.largest_micro_batch
    if largest == job.rows:
        return f"{peak} Largest micro_batch_size: {largest}, all rollouts of an optimizer step."
    if largest:
        return f"{peak} Largest micro_batch_size: {largest}, limited by the {BACKWARD}."
    short = {name: m.total() for name, m in plan.moments.items() if m.total() > job.device_memory}
    return f"{peak} No micro_batch_size fits: {', '.join(short) or BACKWARD} needs more."


def _work(plan: Plan, options: PlanOptions) -> Table:
    timed = options.tflops is not None or options.bandwidth is not None
    table = Table("of a step, at most")
    for column in ("tokens", "TFLOP", *(["seconds"] if timed else [])):
        table.add_column(column, justify="right")
    for name, work in work_of(plan.job, plan.sizes, plan.moments).items():
        row = [name, f"{work.tokens:,}", f"{work.flop / 1e12:,.2f}"]
        seconds = work.seconds(options.tflops, options.bandwidth)
        if timed:
            row.append("" if seconds is None else f"{seconds:,.1f}")
        table.add_row(*row)
    return table
