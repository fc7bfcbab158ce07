"""Pictures of what commands tell, for people who would rather look than read. Needs matplotlib, the extra ``plots``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ucp_deepspeed.cli.printing import box_in_words, echo, in_words, state_bytes
from ucp_deepspeed.remote import located
from ucp_deepspeed.transfer.planning.target_ranks import layer_of
from ucp_deepspeed.transfer.planning.targeting import TargetPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#999999")
"""They are told apart by colour-blind readers as well."""

MOST_DRAWN = 512
"""Ranks and files in one picture; of more, every second or third or … is drawn."""

MOST_NAMED = 48
"""Names beside an axis: more can't be read."""

MOST_LOCAL = 8
"""Ranks whose local tensor is drawn by itself."""


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _write(figure: Figure, path: Path) -> None:
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none"}):  # text that can be searched, and is small
        figure.savefig(path, dpi=160)
    echo(f"wrote {path}", err=True)


def _count_bytes(axis: Any, most: int) -> None:
    """Mark an axis by a power of two."""
    step = 1 << max(most // 6, 1).bit_length()
    axis.set_ticks(range(0, most + step, step), [in_words(mark) for mark in range(0, most + step, step)])


def draw_sizes(report: Mapping[str, Any], path: Path) -> None:
    """Draw how large each layer's states are, in a report of ``ucp inspect --json``."""
    layers: dict[str, list[Mapping[str, Any]]] = {}
    for name, entry in report["parameters"].items():
        layer = layer_of(name)
        title = ".".join(map(str, layer)) if layer else name.rpartition(".")[0] or name
        layers.setdefault(title, []).append(entry)
    sizes = {title: state_bytes(entries) for title, entries in layers.items()}
    states = list(dict.fromkeys(state for of_layer in sizes.values() for state in of_layer))
    figure = _new_figure(8, 1.2 + 0.22 * min(len(sizes), 2 * MOST_NAMED))
    axes = figure.subplots()
    starts = [0] * len(sizes)
    for number, state in enumerate(states):
        widths = [of_layer.get(state, 0) for of_layer in sizes.values()]
        axes.barh(range(len(sizes)), widths, left=starts, label=state, color=COLOURS[number % len(COLOURS)])
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    every = ceil(len(sizes) / (2 * MOST_NAMED)) or 1
    axes.set_yticks(range(0, len(sizes), every), list(sizes)[::every], fontsize=8)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    _count_bytes(axes.xaxis, max(starts))
    axes.set_title(f"{report['path']}, step {report['global_steps']}", fontsize=9)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    _write(figure, path)


def draw_plan(plan: TargetPlan, folder: Path, path: Path) -> None:
    """Draw the bytes that each rank reads and holds, and from which files it reads."""
    ranks = plan.ranks[:: ceil(len(plan.ranks) / MOST_DRAWN)]
    files = sorted(plan.files)
    files = files[:: ceil(len(files) / MOST_DRAWN) or 1]
    names = [str(located(file).relative_to(folder)) for file in files]
    figure = _new_figure(10, 4 + 0.16 * min(len(files), MOST_NAMED))
    sizes, sources = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1 + 0.16 * min(len(files), MOST_NAMED)))
    edges = [number - 0.5 for number in range(len(ranks) + 1)]
    sizes.stairs([rank.bytes_held for rank in ranks], edges, fill=True, color="#c4c4c4", label="holds")
    sizes.stairs([rank.bytes_read for rank in ranks], edges, color=COLOURS[0], linewidth=1.6, label="reads")
    _count_bytes(sizes.yaxis, max(max(rank.bytes_held, rank.bytes_read) for rank in ranks))
    sizes.set_title(f"{folder} on {plan.topology}", fontsize=9)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    held = [[file in rank.files for rank in ranks] for file in files]
    if held:
        sources.imshow(held, aspect="auto", interpolation="nearest", cmap="Blues", vmin=0, vmax=1.4)
    every = ceil(len(names) / MOST_NAMED) or 1
    sources.set_yticks(range(0, len(names), every), names[::every], fontsize=7)
    step = ceil(len(ranks) / 16)
    labels = [f"{rank.model_parallel_rank}·{rank.data_parallel_rank}" for rank in ranks[::step]]
    sources.set_xticks(range(0, len(ranks), step), labels, fontsize=8)
    sources.set(xlabel="model-parallel rank · data-parallel rank", ylabel="reads from")
    _write(figure, path)


def draw_parameter(report: Mapping[str, Any], path: Path) -> None:
    """Draw a whole tensor and the ranks' local tensors with the boxes in a report of ``ucp spec explain --json``."""
    held = [(number, rank) for number, rank in enumerate(report["ranks"]) if rank["pieces"]]
    boxes: dict[str, tuple[Sequence[Sequence[int]], list[int]]] = {}
    for number, rank in held:
        for piece in rank["pieces"]:
            boxes.setdefault(str(piece["logical"]), (piece["logical"], []))[1].append(number)
    shown = held[:MOST_LOCAL]
    figure = _new_figure(9, max(4.0, 0.9 * len(shown) + 1))
    grid = figure.add_gridspec(max(len(shown), 1), 2, width_ratios=(3, 2))
    # At most two dimensions are drawn: those that are cut come first.
    extents = enumerate(report["shape"])
    uncut = {dim for dim, extent in extents if all(list(box[dim]) == [0, extent] for box, _ in boxes.values())}
    dims = sorted(sorted(range(len(report["shape"])), key=uncut.__contains__)[:2])
    whole = figure.add_subplot(grid[:, 0])
    for box, numbers in boxes.values():
        _draw_box(whole, box, dims, numbers[0], _ranks_in_words(numbers, len(held)))
    _frame(whole, report["shape"], dims, f"{report['logical_name']} {report['shape']}")
    for place, (number, rank) in enumerate(shown):
        axes = figure.add_subplot(grid[place, 1])
        for piece in rank["pieces"]:
            _draw_box(axes, piece["local"], dims, number, box_in_words(piece["logical"]))
        _frame(axes, rank["shape"], dims, f"rank {number}: {rank['shape']}")
    if len(shown) < len(held):
        figure.supxlabel(f"the local tensors of {len(held) - len(shown)} more ranks are not drawn", fontsize=8)
    _write(figure, path)


def _draw_box(axes: Axes, box: Sequence[Sequence[int]], dims: Sequence[int], number: int, label: str) -> None:
    from matplotlib.patches import Rectangle

    (low, high), (left, right) = [*(box[dim] for dim in dims), (0, 1), (0, 1)][:2]
    colour = COLOURS[number % len(COLOURS)]
    axes.add_patch(
        Rectangle((left, low), right - left, high - low, facecolor=colour, alpha=0.55, edgecolor="black", linewidth=0.6)
    )
    axes.text((left + right) / 2, (low + high) / 2, label, ha="center", va="center", fontsize=8)


def _frame(axes: Axes, shape: Sequence[int], dims: Sequence[int], title: str) -> None:
    rows, columns = [*(shape[dim] for dim in dims), 1, 1][:2]
    axes.set(xlim=(0, columns), ylim=(rows, 0), xticks=(0, columns), yticks=(0, rows))
    axes.tick_params(labelsize=7)
    axes.set_title(title, fontsize=8)
    if len(dims) == 2:
        axes.set_xlabel(f"dimension {dims[1]}", fontsize=7, labelpad=-6)
    if dims:
        axes.set_ylabel(f"dimension {dims[0]}", fontsize=7, labelpad=-6)


def _ranks_in_words(numbers: Sequence[int], count: int) -> str:
    if len(numbers) == count > 1:
        return "all ranks"
    shown = ", ".join(map(str, numbers[:6])) + (", …" if len(numbers) > 6 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}"
