"""The commands: their parameters, help and examples. Their work is in the modules that they name."""

from __future__ import annotations

import click

from ucp_deepspeed.cli.options import (
    CHECKPOINT,
    COUNT,
    FAMILY,
    HELP,
    JSON,
    PLOT,
    READING,
    SPEC,
    TAG,
    VOCABULARY,
    Command,
    Commands,
    checkpoint,
    choice,
    engine,
    folder,
    option,
    topology,
)

INSPECT = Command(
    "inspect",
    "inspect.show",
    examples=[
        "ucp inspect runs/a",
        "ucp inspect runs/a --tag global_step500 --match 'layers.0.**'",
        "ucp inspect runs/a --all",
        "ucp inspect runs/a --json",
        "ucp inspect runs/a --plot sizes.svg",
    ],
    short_help="Show what a checkpoint holds.",
    help="""Show what checkpoint CKPT holds. Reads no tensors.

    CKPT is a tag folder, or a folder with tag folders in it.
    """,
    params=[
        folder("checkpoint", metavar="CKPT"),
        *READING,
        option(
            "--match",
            metavar="GLOB",
            help="List only parameters whose name fits: * stands for a part between two dots or a piece of it, ** for any "
            "number of parts.",
        ),
        option("--all", "every", is_flag=True, help="List the parameters of each layer, not of like layers together."),
        option("--json", "as_json", is_flag=True, help="Print one JSON object instead, with each parameter."),
        PLOT,
    ],
)

CONVERT = Command(
    "convert",
    "convert.write",
    examples=[
        "ucp convert runs/a runs/a-universal",
        "ucp convert runs/a runs/a-universal --tag global_step500 --workers 8",
        "ucp convert runs/a runs/a-universal --on-unreadable drop",
        "ucp convert runs/a runs/a-dcp --to dcp",
        "ucp convert runs/a runs/a-zero3 --to deepspeed --dp 8 --zero 3",
        "ucp convert runs/a runs/a-ds --to deepspeed-universal",
        "torchrun --nproc-per-node 4 -m ucp_deepspeed.convert runs/a runs/a-universal",
    ],
    short_help="Write a checkpoint in another form.",
    help="""Write checkpoint SRC in universal form, or another, to DST/<tag> and DST/latest. DST can then be loaded from.

    DST/<tag> must not exist yet. It appears when it is complete: an interrupted conversion leaves nothing to load.
    DST/latest stays as it is if it names a tag of a later step. With --to deepspeed-universal it is DST/latest_universal.
    """,
    params=[
        folder("source", metavar="SRC"),
        folder("destination", metavar="DST"),
        choice(
            "--to",
            "universal dcp deepspeed deepspeed-universal torch_dist",
            show_default=True,
            help="Form: universal, torch's DCP, DeepSpeed's own for an engine of the sizes --tp to --zero, its universal one, or "
            "Megatron-Core's.",
        ),
        *engine(),
        *READING,
        option("--workers", type=COUNT, default=2, show_default=True, help="Threads that copy."),
        option(
            "--drop-client-state",
            metavar="KEY",
            multiple=True,
            help="Leave this key of the client state out; repeatable.",
        ),
        choice(
            "--on-unreadable",
            "error drop",
            show_default=True,
            help="Refuse a checkpoint with values that can't be read, or leave them out and list them.",
        ),
        choice(
            "--on-differing",
            "error first last mean max",
            show_default=True,
            help="Optimizer numbers that differ over SRC's partitions: refuse them, or make one number of them.",
        ),
        option("--quiet", is_flag=True, help="No progress bar and no summary."),
    ],
)

EXPORT = Command(
    "export",
    "export.write",
    examples=[
        "ucp export runs/a model --config-from base",
        "ucp export runs/a model --dtype fp32 --max-shard-size 2GB",
        "ucp export runs/a weights --to torch",
        "ucp export runs/lora adapter --adapter --config-from runs/lora",
    ],
    short_help="Write the weights for transformers, torch or PEFT.",
    help="""Write the weights of checkpoint CKPT to the new folder DST, in a form that other libraries load.

    hf: safetensors with an index and the configuration, for from_pretrained. torch: one file pytorch_model.bin, for torch.load.
    Optimizer states and all that a run needs to go on are left out; a line says what. To resume you need no export.
    """,
    params=[
        folder("source", metavar="CKPT"),
        folder("destination", metavar="DST"),
        choice("--to", "hf torch", show_default=True, help="The form."),
        option("--adapter", is_flag=True, help="Write the LoRA adapter alone, as PEFT loads it."),
        option(
            "--dtype",
            type=click.Choice(["bf16", "fp16", "fp32"]),
            help="Type of the weights; by default the one in which the run computed.",
        ),
        option(
            "--source",
            "numbers",
            type=click.Choice(["master", "weights"]),
            help="The fp32 masters, or the weights that the model computed with. By default the weights; with --dtype the "
            "masters, rounded once.",
        ),
        option(
            "--max-shard-size",
            metavar="SIZE",
            default="5GB",
            show_default=True,
            help="Most bytes of a file of the form hf.",
        ),
        option(
            "--config-from",
            type=CHECKPOINT,
            metavar="DIR",
            help="Folder with config.json and tokenizer, or with adapter_config.json; by default they are searched beside CKPT.",
        ),
        *READING,
        choice(
            "--on-differing",
            "error first last mean max",
            show_default=True,
            help="Copies of a weight that differ over pipeline stages: refuse them, or take the first or last.",
        ),
        option("--workers", type=COUNT, default=2, show_default=True, help="Threads that copy."),
        option("--quiet", is_flag=True, help="No progress bar and no summary."),
    ],
)

DIFF = Command(
    "diff",
    "diff.tell",
    examples=[
        "ucp diff runs/a runs/a-universal",
        "ucp diff runs/a runs/a-universal --json",
        "ucp diff runs/a runs/a --tag-a global_step100 --tag-b global_step200",
    ],
    short_help="Compare two checkpoints bit for bit.",
    help="""Compare the whole parameters, optimizer states and counters of checkpoints A and B, bit for bit.

    Experts that B keeps in other tensors are compared in the form of A. A weight that only one side ties is compared under each
    of its names.

    Exit status: 0 when they are equal, 1 when they differ, 2 when they can't be compared.
    """,
    params=[
        folder("a"),
        folder("b"),
        option("--tag-a", help="Tag folder of A to take; by default the one that its file 'latest' names."),
        option("--tag-b", help="The same for B."),
        SPEC,
        option("--spec-a", help="Family or spec file for A alone.", **FAMILY),
        option("--spec-b", help="Family or spec file for B alone.", **FAMILY),
        VOCABULARY,
        option("--json", "as_json", is_flag=True, help="Print one JSON object instead, with all differences."),
        option("--limit", type=click.IntRange(min=0), default=20, show_default=True, help="Differences to print."),
        option("--chunk", type=COUNT, default=16, show_default=True, metavar="MIB", help="Memory for each side."),
    ],
)

VERIFY = Command(
    "verify",
    "verify.tell",
    examples=[
        "ucp verify runs/a",
        "ucp verify runs/a --tag global_step500 --json",
        "ucp verify runs/a --all",
    ],
    short_help="Check that a checkpoint is as it was saved.",
    help="""Compare every byte of checkpoint CKPT with every checksum that there is, and its files with one another: are all
    there, and all of one save?

    Files that DeepSpeed wrote alone have a CRC-32 for each record. Files that this package saved have checksums of all bytes.

    Exit status: 0 when all is as it was saved, 1 when something is wrong, 2 when nothing wrong was found and not all could be
    checked.
    """,
    params=[
        folder("checkpoint", metavar="CKPT"),
        TAG,
        option("--all", "every", is_flag=True, help="Verify all tags in the folder, and list them, the newest first."),
        option("--threads", type=COUNT, help="Files to read at a time; by default one for each processor, up to 8."),
        option("--json", "as_json", is_flag=True, help="Print one JSON object instead, with all files."),
    ],
)

PRUNE = Command(
    "prune",
    "prune.remove",
    examples=[
        "ucp prune runs/a --keep-last 3 --dry-run",
        "ucp prune runs/a --keep-last 3 --keep-every 1000",
    ],
    short_help="Remove old checkpoints, and never the last whole one.",
    help="""Remove the checkpoints in folder DIR that need not be kept.

    Only whole ones count. These stay: the one that the file latest names, what another process of this machine reads or writes,
    whatever is newer than the newest whole one, and each with a file .keep in it. One that isn't whole goes if a newer one is.
    """,
    params=[
        folder("root", metavar="DIR"),
        option("--keep-last", "last", type=COUNT, required=True, help="Keep so many of the newest whole checkpoints."),
        option("--keep-every", "every", type=COUNT, help="Keep also whole ones whose step is a multiple of this."),
        option("--dry-run", is_flag=True, help="Remove nothing; say what would be removed."),
        option("--json", "as_json", is_flag=True, help="Print one JSON object instead."),
    ],
)

POLICIES = {
    "--on-missing": ("error init", "Refuse parameters that CKPT lacks, or keep the model's values."),
    "--on-extra": ("error drop", "Refuse parameters that the model lacks, or drop them."),
    "--on-differing": ("error first last mean max", "Optimizer numbers that differ over CKPT's partitions."),
    "--optimizer-states": ("restore reset", "Take the optimizer's states from CKPT, or begin anew."),
    "--hyperparameters": ("restore keep", "Take the hyper-parameters from CKPT, or keep the model's."),
    "--scheduler": ("restore keep", "Take the schedule of learning rates from CKPT, or keep the model's."),
}

PLAN = Command(
    "plan",
    "plan.show",
    examples=[
        "ucp plan runs/a --tp 2 --pp 2 --dp 4 --zero 1",
        "ucp plan runs/a --dp 64 --zero 3 --plot plan.svg",
        "ucp plan runs/a --dp 8 --zero 3 --model runs/changed --on-missing init",
    ],
    short_help="Show what a load on another topology would read.",
    help="""Show what each rank of another topology would read of checkpoint CKPT, and hold. Reads no tensors.

    DeepSpeed's default settings are assumed. Exit status: 0 when the topology is possible, 1 when it isn't, 2 when nobody
    can tell.
    """,
    params=[
        folder("checkpoint", metavar="CKPT"),
        *topology(required=True),
        *READING,
        checkpoint(
            "--model",
            help="A checkpoint of the model to load into, where its parameters aren't CKPT's: one saved after a first step, "
            "which tells what the optimizer keeps.",
        ),
        *(choice(name, values, help=told) for name, (values, told) in POLICIES.items()),
        option("--json", "as_json", is_flag=True, help="Print one JSON object instead, with all ranks."),
        PLOT,
    ],
)

CHECK = Command(
    "check",
    "spec.check",
    examples=[
        "ucp spec check megatron_core_gpt --against runs/a",
        "ucp spec check mine.yaml --against runs/tp2 --single-rank runs/tp1",
    ],
    help="""Hold a spec against a checkpoint. Compares names, shapes, values, and what was recorded when saving.

    Exit status: 0 when nothing contradicts the spec, 1 when something does, 2 when nobody can tell.
    """,
    params=[
        click.Argument(["spec"], metavar="FILE|FAMILY"),
        checkpoint("--against", required=True, help="The checkpoint to hold it against."),
        TAG,
        VOCABULARY,
        checkpoint(
            "--single-rank",
            help="A checkpoint of the same model without tensor parallelism. Its shapes are compared; if it is of the same "
            "state, its values too.",
        ),
        option("--no-values", is_flag=True, help="Read no tensors."),
        option("--strict", is_flag=True, help="Remarks count as wrong."),
        JSON,
    ],
)

EXPLAIN = Command(
    "explain",
    "spec.explain",
    examples=[
        "ucp spec explain layers.0.mlp.weight --spec mine.yaml --against runs/a",
        "ucp spec explain head.weight --spec mine.yaml --against runs/a --plot head.svg",
    ],
    help="""Show how a spec shards one parameter. Says which rule NAME matches, and which part of it each rank of a checkpoint
    holds.

    NAME is the parameter's own name or its logical one. Exit status: 0 when it matches exactly one rule and the shapes agree,
    else 1.
    """,
    params=[
        click.Argument(["name"]),
        option("--spec", metavar="FILE|FAMILY", required=True, help="The spec."),
        checkpoint("--against", help="A checkpoint that holds the parameter."),
        TAG,
        VOCABULARY,
        JSON,
        PLOT,
    ],
)

INFER = Command(
    "infer",
    "spec.infer",
    examples=[
        "ucp spec infer runs/tp2 --single-rank runs/tp1 > mine.yaml",
        "ucp spec infer --model train:build_model > mine.yaml",
    ],
    help="""Write a first spec to standard output. Comments in it say what is left open.

    From what CKPT records; or, with --single-rank, by comparing its shapes, and its values if both are of the same state; or,
    with --model, from the attributes that Megatron-Core sets on the parameters of a model.
    """,
    params=[
        folder("checkpoint", metavar="[CKPT]", required=False),
        TAG,
        option(
            "--model",
            metavar="MODULE:FUNCTION",
            help="A function without arguments that returns the Megatron-Core model.",
        ),
        checkpoint("--single-rank", help="A checkpoint of the same model without tensor parallelism."),
        option("--family", default="inferred", show_default=True, help="Name to give to the family."),
    ],
)

LIST = Command(
    "list",
    "spec.list_families",
    examples=["ucp spec list", "ucp spec list --against runs/a"],
    help="""List the families that come with the package. With --against, say how well each fits a checkpoint's names and shapes.

    Exit status with --against: 0 when one family fits, else 1.
    """,
    params=[
        checkpoint("--against", help="A checkpoint: say how well each family fits it."),
        TAG,
        JSON,
    ],
)

SCHEMA = Command(
    "schema",
    "spec.schema",
    examples=["ucp spec schema > ucp_spec.schema.json"],
    help="Print the JSON Schema of spec files, for completion in editors.",
)


@click.group(
    cls=Commands,
    commands=[CHECK, EXPLAIN, INFER, LIST, SCHEMA],
    context_settings=HELP,
    epilog="Example: ucp spec list --against runs/a",
    short_help="Write and check spec files: how parameters are sharded.",
)
def spec() -> None:
    """Write spec files, which say how parameters are sharded, and hold them against checkpoints."""


ARM = Command(
    "arm",
    "arm.write",
    examples=["ucp arm", "ucp arm --off"],
    short_help="Let UCP_DEEPSPEED=1 arm scripts that don't import the package.",
    help="""Let the variable UCP_DEEPSPEED=1 arm every script of this Python environment, also without an import.

    Writes a line into the environment's site-packages, which Python runs at each start. Without the variable it does nothing.
    With it, DeepSpeed engines whose config has no block "universal_checkpoint" get its defaults.
    """,
    params=[option("--off", is_flag=True, help="Remove the line.")],
)


RUN = Command(
    "run",
    "elastic.run",
    examples=[
        "ucp run --nproc-per-node 8 train.py",
        "ucp run --nodes 1:4 --store host0:29400 --batch 512 train.py",
        "ucp run --nodes 2:8 --store host0:29400 --tp 2 train.py --tp {tp}",
        "ucp run --tp 4 --topology auto --checkpoint runs/a train.py --tp {tp}",
    ],
    short_help="Train on nodes that come and go.",
    help="""Run training script SCRIPT on this node and on the others that are started likewise, with torch's elastic agent.

    When a node is lost or joins, all go on from the last checkpoint in a new round, on the nodes that are there. SCRIPT loads it
    by itself; it needs no import of this package. Ranks that the batch or the model-parallel sizes have no use for stand by.
    {tp}, {pp} and {dp} in the ARGUMENTS are filled with the sizes of the round. "-- -m MODULE" runs a module.
    """,
    context_settings={"allow_interspersed_args": False},
    params=[
        option("--nodes", metavar="MIN:MAX", default="1", show_default=True, help="Number of nodes, or a range."),
        option(
            "--nproc-per-node",
            "on_node",
            type=COUNT,
            default=1,
            show_default=True,
            help="Number of ranks on each node.",
        ),
        option(
            "--store", "endpoint", metavar="HOST:PORT", help="Where the nodes meet: a store that ucp store has started."
        ),
        option("--run-id", "name", metavar="NAME", help="Name of the run, if several use one store."),
        option("--name", "node", metavar="NAME", help="Name of this node in what is told."),
        option(
            "--local-addr", "address", metavar="HOST", help="Name or address under which other nodes reach this one."
        ),
        option(
            "--max-restarts",
            "restarts",
            type=click.IntRange(0),
            default=100,
            show_default=True,
            help="Failures of ranks.",
        ),
        option(
            "--batch", type=COUNT, help="Samples of one step over all ranks (train_batch_size), which stays what it is."
        ),
        option("--tp", "tensor", metavar="N", default="1", show_default=True, help="Tensor-parallel size."),
        option("--pp", "pipeline", metavar="N", default="1", show_default=True, help="Number of pipeline stages."),
        option("--min-dp", "least", type=COUNT, default=1, show_default=True, help="Smallest data-parallel size."),
        choice(
            "--topology",
            "fixed auto",
            show_default=True,
            help="Keep --tp and --pp, or choose in each round what the newest checkpoint can be loaded on: --tp and --pp or what "
            "divides them; of a range MIN:MAX what divides MAX.",
        ),
        checkpoint("--checkpoint", help="For --topology auto: the folder in which SCRIPT saves."),
        option(
            "--memory-per-rank",
            "memory",
            metavar="SIZE",
            help="For --topology auto: most bytes of weights, master weights and optimizer states on a rank, such as 40GB. "
            "Gradients and activations come on top.",
        ),
        click.Argument(["script"], nargs=-1, required=True, type=click.UNPROCESSED, metavar="SCRIPT [ARGUMENTS]..."),
    ],
)

STORE = Command(
    "store",
    "elastic.hold",
    examples=["ucp store --port 29400"],
    short_help="Hold the store in which the nodes of ucp run meet.",
    help="""Hold the store in which the nodes of ucp run meet, until it is interrupted.

    Start it on a machine that stays: losing it ends the run. It needs no accelerator, and next to no memory.
    """,
    params=[
        option("--port", type=click.IntRange(0, 65535), default=29400, show_default=True, help="Port; 0: a free one."),
    ],
)


@click.group(
    cls=Commands,
    commands=[INSPECT, CONVERT, EXPORT, DIFF, VERIFY, PRUNE, PLAN, spec, RUN, STORE, ARM],
    context_settings=HELP,
    epilog="ucp COMMAND --help shows a command's options and examples.",
)
@click.version_option(package_name="ucp_deepspeed", prog_name="ucp")
def main() -> None:
    """Universal checkpoints for DeepSpeed: a run saved on any topology resumes on any other."""
