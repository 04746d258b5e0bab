"""`slime submit slurm`: a run as a batch job, which is started again until the run has finished."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slime.cli.common import JOB_FOLDER, Refused, say
from slime.cli.training import Arguments, Recipes, compose

if TYPE_CHECKING:
    from launch.slurm.script import BatchJob
    from slime.schema import Config

MAX_STARTS = 3
ADDRESS = "cluster.ray_address"

Time = Annotated[str | None, typer.Option("--time", metavar="TIME", help="Time limit of one start, as of sbatch.")]
Partition = Annotated[str | None, typer.Option("--partition", metavar="NAME", help="Partition of the cluster.")]
Account = Annotated[str | None, typer.Option("--account", metavar="NAME", help="Account that is charged.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--sbatch", metavar="NAME=VALUE", help="Any other long option of sbatch; may be repeated."),
]
Setup = Annotated[
    list[str] | None,
    typer.Option("--setup", metavar="LINE", help="Shell line before the run, e.g. a module; may be repeated."),
]
MaxStarts = Annotated[
    int,
    typer.Option("--max-starts", metavar="N", min=1, help="Starts without a new checkpoint, after which the job ends."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the batch script, submit nothing.")]


def slurm(
    arguments: Arguments = None,
    recipes: Recipes = None,
    time: Time = None,
    partition: Partition = None,
    account: Account = None,
    sbatch: Options = None,
    setup: Setup = None,
    max_starts: MaxStarts = MAX_STARTS,
    dry_run: DryRun = False,
) -> int:
    """Run in Slurm as a batch job.

    It ends itself before its time limit, saves, and is started again until it has finished.
    """
    given = arguments or []
    if any(argument.startswith(f"{ADDRESS}=") for argument in given):
        raise Refused(f"submit slurm: {ADDRESS} is the job's own, which starts Ray on its nodes: leave it out")
    config = compose([*given, f"{ADDRESS}=auto"], recipes)

    from launch.slurm.script import BatchJob, problems, render

    options = _options(sbatch or [])
    named = {"partition": partition, "account": account}
    options |= {name: value for name, value in named.items() if value}
    folder = _folder_of(config)
    command = [sys.executable, "-m", "slime.cli.job", f"--folder={folder}"]
    command += [f"--gpus-per-node={config.cluster.gpus_per_node}", f"--max-starts={max_starts}", "--", *given]
    command += ["--recipes", recipes] if recipes else []
    job = BatchJob(
        config.run,
        folder,
        Path.cwd(),
        command,
        config.cluster.num_nodes,
        config.cluster.gpus_per_node,
        config.checkpoint.grace_s,
        time or "",
        options,
        [*_python_path(), *(setup or [])],
    )
    if found := problems(job):
        raise Refused("; ".join(found))
    if dry_run:
        say(render(job).rstrip())
        return 0
    return _submit(job, render(job))


def _folder_of(config: Config) -> Path:
    from slime.schema import folder_of

    return folder_of(config).resolve() / JOB_FOLDER


def _options(given: list[str]) -> dict[str, str]:
    """Return the options of NAME=VALUE arguments; NAME alone is an option without a value."""
    return {name.removeprefix("--"): value for name, _, value in (one.partition("=") for one in given)}


def _python_path() -> list[str]:
    """Return the shell lines with which the job finds the same modules, whatever its start-up files set."""
    from shlex import quote

    path = os.environ.get("PYTHONPATH")
    return [f"export PYTHONPATH={quote(path)}"] if path else []


def _submit(job: BatchJob, text: str) -> int:
    from launch.slurm.client import SlurmError, describe, known_job, lives, remember, state_of
    from launch.slurm.client import submit as sbatch

    run_dir, script = job.folder.parent, job.folder / "job.sh"
    try:
        earlier = known_job(job.folder)
        if earlier and lives(known := describe(earlier)):
            raise Refused(
                f"{run_dir} has job {earlier}, which is {state_of(known)}: end it with slime cancel {job.name}, or "
                "choose another run= name"
            )
        job.folder.mkdir(parents=True, exist_ok=True)
        script.write_text(text)
        job_id = sbatch(script)
        remember(job.folder, job_id)
    except (SlurmError, OSError) as error:
        if not known_job(job.folder):  # what is refused leaves nothing
            script.unlink(missing_ok=True)
            for made in (job.folder, run_dir, run_dir.parent):
                with suppress(OSError):  # it holds something else
                    made.rmdir()
        raise Refused(f"submit slurm: {error}") from error
    say(f"job {job_id}: {job.folder}/job_{job_id}.log; slime status {job.name}, slime logs {job.name}")
    return 0
