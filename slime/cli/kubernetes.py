"""`slime submit k8s`: a run as a Job or a RayJob of Kubernetes.

What the cluster is told (image, queue, secrets) are options, not keys of the configuration: the same run, with the
same configuration, goes on wherever it is started next.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated

import typer

from slime.cli.common import Refused, say
from slime.cli.training import Arguments, Recipes, checked

if TYPE_CHECKING:
    from launch.kubernetes.pods import KubernetesRun
    from slime.schema import Config


def _option(name: str, metavar: str, help: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(f"--{name}", metavar=metavar, help=help)
    return option


def k8s(
    arguments: Arguments = None,
    recipes: Recipes = None,
    image: Annotated[str, _option("image", "IMAGE", "Image of slime (Dockerfile). Required.")] = "",
    claim: Annotated[str, _option("claim", "NAME", "Volume claim for runs, caches, models. Required.")] = "",
    namespace: Annotated[str, _option("namespace", "NAME", "Namespace; without it, kubectl's.")] = "",
    queue: Annotated[str, _option("queue", "NAME", "Kueue's queue: all pods start together.")] = "",
    priority: Annotated[str, _option("priority", "NAME", "Priority class of the pods.")] = "",
    wandb_secret: Annotated[str, _option("wandb-secret", "NAME", "Secret with WANDB_API_KEY.")] = "",
    ray_secret: Annotated[str, _option("ray-secret", "NAME", "Secret with auth_token, for several nodes.")] = "",
    retries: Annotated[str, _option("retries", "N", "Failures after which it is given up.")] = "6",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the manifest, which is the default.")] = False,
    apply: Annotated[bool, typer.Option("--apply", help="Hand the manifest to kubectl apply.")] = False,
) -> int:
    """Run on Kubernetes: a Job for one node, a RayJob for several.

    Prints the manifest; docs/kubernetes.md explains it. A run that has checkpoints goes on from the newest.
    """
    from launch.kubernetes.kubectl import KubectlError
    from launch.kubernetes.kubectl import apply as hand_over
    from launch.kubernetes.manifests import as_yaml, manifest, problems
    from launch.kubernetes.pods import KubernetesOptions

    if apply and dry_run:
        raise Refused("--apply and --dry-run: choose one")
    if not retries.isdigit():
        raise Refused(f"--retries {retries}: must be a number of at least 0")
    options = KubernetesOptions(image, claim, namespace, queue, priority, wandb_secret, ray_secret, int(retries))
    given = arguments or []
    config = checked(given, recipes)[0].config  # a missing file may be on the claim
    command = ["slime", "train", *given, *(["--recipes", recipes] if recipes else [])]
    run = _kubernetes_run(config, command)
    if found := [*problems(run, options), *_not_for_pods(config)]:
        raise Refused("; ".join(found))
    text = as_yaml(manifest(run, options))
    try:
        say(hand_over(text) if apply else text.rstrip())
    except KubectlError as error:
        raise Refused(str(error)) from error
    return 0


def _kubernetes_run(config: Config, command: list[str]) -> KubernetesRun:
    from launch.kubernetes.pods import MOUNT, KubernetesRun
    from slime.schema import folder_of

    cluster = config.cluster
    return KubernetesRun(
        name=config.run,
        command=command,
        run_dir=str(PurePosixPath(MOUNT, folder_of(config))),
        num_nodes=cluster.num_nodes,
        gpus_per_node=cluster.gpus_per_node,
        cpus_per_node=-(-_cpus(config) // cluster.num_nodes),
        memory_gb=cluster.min_memory_gb,
        grace_s=config.checkpoint.grace_s,
        sandboxed=not config.rollout.sandbox.allow_unsafe,
    )


def _cpus(config: Config) -> int:
    """Return the number of CPUs that the processes of a run keep busy: engines, ranks and rollout workers."""
    from slime.config.nodes import has_engines, has_reference, trained_roles

    ranks = sum(one.layout.num_processes for _, one in trained_roles(config))
    ranks += config.policy.layout.num_processes if has_reference(config) else 0
    engines = config.rollout.engine.num_engines if has_engines(config) else 0
    return (ranks + engines) * config.cluster.threads_per_process + config.rollout.num_workers


def _not_for_pods(config: Config) -> list[str]:
    """Return why a configuration does not fit the pods that would run it, one line each with the cure."""
    from launch.kubernetes.pods import MOUNT

    found = []
    cluster = config.cluster
    if cluster.num_nodes > 1 and cluster.ray_address != "auto":
        found.append(f"cluster.ray_address={cluster.ray_address}: the run joins the Ray of its own RayJob; use auto")
    if cluster.num_nodes == 1 and cluster.ray_address:
        found.append(f"cluster.ray_address={cluster.ray_address}: a run on one node starts its own Ray; use ''")
    for key, value in (("runs_dir", config.runs_dir), ("cache_dir", config.cache_dir)):
        path = PurePosixPath(MOUNT, value)
        if ".." in path.parts or not path.is_relative_to(MOUNT):
            found.append(f"{key}={value} is not on the claim, which is mounted at {MOUNT}: use a folder below {MOUNT}")
    return found
