"""`gristmill checkpoint …`: check, convert, compare and average folders of models, and checkpoints of a run."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from gristmill.flows.errors import UsageError
from gristmill.flows.fetched import fetched, local_path
from gristmill.flows.terminal import print_table, size

checkpoint_app = typer.Typer(
    help="Check, convert, compare and average folders of models, ours and Hugging Face's, and checkpoints of a run.",
    no_args_is_help=True,
)

Folder = Annotated[
    str,
    typer.Argument(
        help="A folder with config.json and safetensors, or a checkpoint (work/…, kept/…); one at s3://… is fetched."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON in place of lines for people.")]


@checkpoint_app.command()
def verify(folder: Folder, as_json: AsJson = False) -> None:
    """Read every tensor: is each there, of its shape, and finite? Exit code 1 if not.

    Of a checkpoint of a training run (`work/checkpoint-…`, `kept/…`): is every file as it was written?
    """
    from gristmill.model.model_folders import verify as work

    try:
        with fetched([folder]) as (here,):
            found = work(here)
    except UsageError:
        raise
    except ValueError as error:
        print(json.dumps({"error": str(error)}) if as_json else error)
        raise typer.Exit(1) from error
    if as_json:
        print(json.dumps(found))
        return
    print(
        f"{folder}: whole; {found['form']}, {found['tensors']:,} tensors, {found['parameters']:,} numbers, "
        f"{size(found['bytes'])}"
    )


@checkpoint_app.command()
def convert(
    source: Folder,
    out: Annotated[str, typer.Argument(help="A folder that is not there yet, or empty.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    fp8: Annotated[bool, typer.Option("--fp8", help="To Hugging Face: E4M3 with a scale a 128 × 128 block.")] = False,
    mtp: Annotated[
        bool, typer.Option("--mtp", help="To Hugging Face: the multi-token-prediction modules too.")
    ] = False,
    shard_megabytes: Annotated[int, typer.Option(min=1, help="Size of a safetensors file.")] = 2000,
) -> None:
    """From Hugging Face's form to ours, or back; a checkpoint's model to Hugging Face's.

    A tensor at a time, so that no model is too large.
    """
    from gristmill.model.model_folders import DTYPES
    from gristmill.model.model_folders import convert as work

    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    to = local_path(out)
    try:
        with fetched([source]) as (here,):
            files = work(
                here,
                to,
                dtype=dtype,
                fp8=fp8,
                mtp=mtp,
                shard_megabytes=shard_megabytes,
                log=lambda name: print(f"wrote {name}"),
            )
    except ValueError as error:
        raise UsageError(str(error)) from error
    print(f"{out}: {files} files")


@checkpoint_app.command()
def diff(one: Folder, other: Folder, as_json: AsJson = False) -> None:
    """Tensor by tensor, what differs; exit code 1 if anything does.

    Of two checkpoints the optimizer's moments and averages of the weights too.
    """
    from gristmill.model.model_folders import differences

    try:
        with fetched([one, other]) as (here, there):
            rows = list(differences(here, there))
    except ValueError as error:
        raise UsageError(str(error)) from error
    if as_json:
        print(json.dumps(rows))
    elif rows:
        shown = [
            [
                row["tensor"],
                row.get("differs") or f"{row['largest']:.3g}",
                f"{row['relative']:.3g}" if "relative" in row else "",
            ]
            for row in rows
        ]
        print_table(
            f"{len(rows)} tensors differ", ["tensor", "largest difference", "relative (root mean square)"], shown
        )
    else:
        print("no tensor differs")
    if rows:
        raise typer.Exit(1)


@checkpoint_app.command()
def average(
    folders: Annotated[
        list[str], typer.Argument(help="The models or checkpoints, two or more, and last the folder to write.")
    ],
    weights: Annotated[str, typer.Option(help="One number for each model, with commas; equal by default.")] = "",
) -> None:
    """Write the mean of models of one shape."""
    from gristmill.model.model_folders import average as work

    try:
        shares = [float(share) for share in weights.split(",")] if weights else None
    except ValueError as error:
        raise UsageError(f"--weights {weights} are not numbers with commas between them") from error
    to = local_path(folders[-1])
    try:
        with fetched(folders[:-1]) as here:
            files = work(here, to, shares)
    except ValueError as error:
        raise UsageError(str(error)) from error
    print(f"{folders[-1]}: {files} files")
