"""Job and RayJob: valid by Kubernetes' own schemas and Ray's own parser, and what happens at each end of a run.

Schemas know names and types. Rules between fields, and values of which only some are allowed, are asserted here.
"""

from __future__ import annotations

import copy
import shlex
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import pytest
import yaml
from kubernetes_validate import ValidationError, validate
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr as read_by_ray

from launch.environment import RAY_SETTINGS
from launch.kubernetes.manifests import QUEUE_LABEL, as_yaml, manifest, problems
from launch.kubernetes.pods import MOUNT, KubernetesOptions, KubernetesRun
from launch.preflight import MIN_SHM_GB, MIN_SHM_GPU_GB

VERSION = "1.37"  # of Kubernetes' schemas
OLDEST, OLDEST_WITH_SANDBOXES = "1.31", "1.33"  # that docs/kubernetes.md names
COMMAND = ["slime", "train", "recipe=ppo_coding", "model.start=''", "run=a b"]
ONE = KubernetesRun("ppo_coding", COMMAND, "/data/runs/ppo_coding", 1, 0, 4, 8.0, 120.0, True)
FOUR = replace(ONE, num_nodes=4, gpus_per_node=8, cpus_per_node=12, memory_gb=200.0, sandboxed=False)
OPTIONS = KubernetesOptions("registry.example/slime:1", "runs")
ALL = replace(OPTIONS, namespace="team", queue="gpus", priority="high", wandb_secret="wandb")
# Fields of KubeRay's API v1 that are used; its schema comes with no package.
RAY_JOB_FIELDS = {"submissionMode", "entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "rayClusterSpec"}
RAY_CLUSTER_FIELDS = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
GROUP_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}

each_shape = pytest.mark.parametrize("run", [ONE, FOUR], ids=["Job", "RayJob"])


def templates(made: dict[str, Any]) -> list[dict[str, Any]]:
    """Pod templates of a manifest, the head's first."""
    spec = made["spec"]
    if made["kind"] == "Job":
        return [spec["template"]]
    cluster = spec["rayClusterSpec"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def container(made: dict[str, Any]) -> dict[str, Any]:
    (found,) = templates(made)[0]["spec"]["containers"]
    return dict(found)


def as_pod_template(template: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "a"}, "template": template}


def end(job: dict[str, Any], exit_code: int, disrupted: bool = False) -> str:
    """What the Job controller does with a failed pod: the action of the first rule that fits, else it counts."""
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        conditions, codes = rule.get("onPodConditions"), rule.get("onExitCodes")
        assert (conditions is None) != (codes is None)
        if disrupted and conditions == [{"type": "DisruptionTarget", "status": "True"}]:
            return str(rule["action"])
        if codes and exit_code in codes["values"]:
            return str(rule["action"])
    return "Count"


# By schema and parser -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [OPTIONS, ALL])
@pytest.mark.parametrize("run", [ONE, replace(ONE, gpus_per_node=8), replace(ONE, sandboxed=False)])
def test_a_job_fits_the_schema(run: KubernetesRun, options: KubernetesOptions) -> None:
    validate(manifest(run, options), VERSION, strict=True)


@pytest.mark.parametrize("options", [OPTIONS, ALL, replace(OPTIONS, ray_secret="ray")])
@pytest.mark.parametrize("run", [FOUR, replace(FOUR, gpus_per_node=0), replace(FOUR, sandboxed=True)])
def test_the_pods_of_a_ray_job_fit_the_schema(run: KubernetesRun, options: KubernetesOptions) -> None:
    for template in templates(manifest(run, options)):
        validate(as_pod_template(template), VERSION, strict=True)


def test_the_oldest_versions_know_all_fields() -> None:
    validate(manifest(replace(ONE, sandboxed=False), ALL), OLDEST, strict=True)
    validate(manifest(ONE, ALL), OLDEST_WITH_SANDBOXES, strict=True)


def test_the_schema_finds_a_wrong_name_and_a_wrong_type() -> None:
    for path, value in ((("spec", "backofLimit"), 6), (("spec", "backoffLimit"), "6")):
        wrong = copy.deepcopy(manifest(ONE, OPTIONS))
        wrong[path[0]][path[1]] = value
        with pytest.raises(ValidationError):
            validate(wrong, VERSION, strict=True)


@pytest.mark.parametrize("gpus", [0, 8])
def test_ray_reads_its_cluster_out_of_a_ray_job(gpus: int) -> None:
    """By what Ray's autoscaler makes of the same text, though these clusters have a fixed size."""
    made = manifest(replace(FOUR, gpus_per_node=gpus), ALL)
    cluster = {"metadata": made["metadata"], "spec": made["spec"]["rayClusterSpec"]}
    read = read_by_ray(cluster)
    head, workers = read["available_node_types"].values()
    assert (workers["min_workers"], workers["max_workers"], read["max_workers"]) == (3, 3, 3)
    for group in (head, workers):
        assert group["resources"]["CPU"] == 8
        assert group["resources"].get("GPU", 0) == gpus
        assert group["resources"]["memory"] > 200e9


def test_a_ray_job_has_only_fields_that_kuberay_knows() -> None:
    spec = manifest(FOUR, ALL)["spec"]
    cluster = spec["rayClusterSpec"]
    assert set(spec) == RAY_JOB_FIELDS
    assert set(cluster) == RAY_CLUSTER_FIELDS
    assert set(cluster["headGroupSpec"]) == GROUP_FIELDS - {"groupName", "replicas", "minReplicas", "maxReplicas"}
    assert [set(group) for group in cluster["workerGroupSpecs"]] == [GROUP_FIELDS]
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
    assert spec["shutdownAfterJobFinishes"] is True  # Kueue refuses others
    assert cluster["rayVersion"] == version("ray")  # KubeRay refuses a token without it
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert {type(value) for value in group["rayStartParams"].values()} == {str}


@each_shape
def test_yaml_says_the_same(run: KubernetesRun) -> None:
    text = as_yaml(manifest(run, ALL))
    assert yaml.safe_load(text) == manifest(run, ALL)
    assert "&id" not in text  # no anchors: people read and edit it


# Rules between fields -------------------------------------------------------------------------------------------------


def test_each_end_of_a_run_has_its_consequence() -> None:
    job = manifest(ONE, OPTIONS)
    assert end(job, 75) == "Ignore"  # told to end, state saved: again, and not counted
    assert end(job, 2) == "FailJob"  # refused: it would be again
    assert [end(job, code) for code in (1, 137, 139)] == ["Count", "Count", "Count"]
    assert [end(job, code, disrupted=True) for code in (1, 2, 75, 137, 143)] == ["Ignore"] * 5
    assert job["spec"]["backoffLimit"] == 6
    assert manifest(ONE, replace(OPTIONS, retries=0))["spec"]["backoffLimit"] == 0


def test_a_job_keeps_the_rules_of_a_pod_failure_policy() -> None:
    job = manifest(ONE, OPTIONS)
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert job["spec"]["podReplacementPolicy"] == "Failed"  # two drivers of one run never live side by side
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        assert rule["action"] in ("FailJob", "Ignore", "Count")
        if codes := rule.get("onExitCodes"):
            assert codes["operator"] in ("In", "NotIn")
            assert codes["containerName"] in [one["name"] for one in pod["containers"]]
            assert 0 not in codes["values"]


@each_shape
@pytest.mark.parametrize("grace_s", [30.0, 600.5])
def test_a_pod_has_the_time_that_a_run_takes_to_save_its_state(run: KubernetesRun, grace_s: float) -> None:
    made = manifest(replace(run, grace_s=grace_s), OPTIONS)
    for template in templates(made):
        pod_s = template["spec"]["terminationGracePeriodSeconds"]
        assert isinstance(pod_s, int)
        assert pod_s > grace_s + 180  # and to stop its processes
    if made["kind"] == "RayJob":
        for template in templates(made):
            (one,) = template["spec"]["containers"]
            hook = one["lifecycle"]["preStop"]["exec"]["command"]
            assert hook[:3] == ["python", "-m", "launch.kubernetes.stop"]
            assert hook[3] == "/data/runs/ppo_coding"
            assert grace_s + 180 <= float(hook[4]) < template["spec"]["terminationGracePeriodSeconds"]


@each_shape
def test_the_command_is_handed_on_word_by_word(run: KubernetesRun) -> None:
    made = manifest(run, OPTIONS)
    if made["kind"] == "Job":
        assert container(made)["command"] == ["tini", "--", *COMMAND]
    else:
        assert shlex.split(made["spec"]["entrypoint"]) == ["cd", MOUNT, "&&", "exec", *COMMAND]
        assert "command" not in container(made)  # KubeRay's `ray start`


@each_shape
def test_runs_caches_and_models_are_on_the_claim(run: KubernetesRun) -> None:
    for template in templates(manifest(run, OPTIONS)):
        pod = template["spec"]
        (one,) = pod["containers"]
        volumes = {volume.pop("name"): volume for volume in copy.deepcopy(pod["volumes"])}
        mounts = {mount["mountPath"]: mount["name"] for mount in one["volumeMounts"]}
        assert volumes[mounts[MOUNT]] == {"persistentVolumeClaim": {"claimName": "runs"}}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert one["workingDir"] == MOUNT
        assert set(mounts.values()) == set(volumes)


@each_shape
def test_a_node_is_asked_for_what_the_run_needs(run: KubernetesRun) -> None:
    for template in templates(manifest(run, OPTIONS)):
        pod = template["spec"]
        (one,) = pod["containers"]
        requests, limits = one["resources"]["requests"], one["resources"]["limits"]
        shm = next(volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if volume["name"] == "shm")
        least = MIN_SHM_GPU_GB if run.gpus_per_node else MIN_SHM_GB
        assert int(shm.removesuffix("G")) > least
        assert int(limits["memory"].removesuffix("G")) >= run.memory_gb + int(shm.removesuffix("G"))
        assert requests["cpu"] == str(run.cpus_per_node)
        assert "cpu" not in limits
        assert {key: requests[key] for key in limits} == limits  # GPUs: both must be equal
        assert limits.get("nvidia.com/gpu") == (str(run.gpus_per_node) if run.gpus_per_node else None)
        assert bool(pod.get("tolerations")) == (run.gpus_per_node > 0)


def test_the_object_store_fits_into_shared_memory() -> None:
    cluster = manifest(FOUR, OPTIONS)["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert int(group["rayStartParams"]["object-store-memory"]) < FOUR.shm_gb * 1e9


def test_a_ray_job_has_one_pod_for_each_node() -> None:
    (group,) = manifest(FOUR, OPTIONS)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (3, 3, 3)  # and the head


@each_shape
def test_options_reach_their_places_and_are_left_out_otherwise(run: KubernetesRun) -> None:
    made, plain = manifest(run, ALL), manifest(run, OPTIONS)
    assert made["metadata"]["namespace"] == "team"
    assert made["metadata"]["labels"][QUEUE_LABEL] == "gpus"
    assert "namespace" not in plain["metadata"]
    assert QUEUE_LABEL not in plain["metadata"]["labels"]
    for template in templates(made):
        assert template["spec"]["priorityClassName"] == "high"
        assert QUEUE_LABEL not in template["metadata"]["labels"]  # it would queue single pods
        (one,) = template["spec"]["containers"]
        assert one["image"] == "registry.example/slime:1"
    assert all("priorityClassName" not in template["spec"] for template in templates(plain))


def test_secrets_are_named_and_never_held() -> None:
    named = [one for one in container(manifest(ONE, ALL))["env"] if one["name"] == "WANDB_API_KEY"]
    assert named == [
        {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "WANDB_API_KEY"}}}
    ]
    assert "WANDB_API_KEY" not in as_yaml(manifest(ONE, OPTIONS))
    for ray_secret, expected in (("", {"mode": "token"}), ("ray", {"mode": "token", "secretName": "ray"})):
        made = manifest(FOUR, replace(OPTIONS, ray_secret=ray_secret))
        assert made["spec"]["rayClusterSpec"]["authOptions"] == expected
        variables = {one["name"]: one.get("value") for one in container(made)["env"]}
        assert variables.items() >= RAY_SETTINGS.items()
        assert variables["RAY_AUTH_MODE"] == "token"


@each_shape
@pytest.mark.parametrize("sandboxed", [True, False])
def test_a_pod_may_do_what_sandboxes_need_and_nothing_more(run: KubernetesRun, sandboxed: bool) -> None:
    for template in templates(manifest(replace(run, sandboxed=sandboxed), OPTIONS)):
        pod = template["spec"]
        (one,) = pod["containers"]
        security = one["securityContext"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsUser"]
        assert pod["automountServiceAccountToken"] is False
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        # An unmasked /proc is allowed only in a user namespace of the pod's own.
        assert pod.get("hostUsers", True) is not sandboxed
        assert security.get("procMount", "Default") == ("Unmasked" if sandboxed else "Default")
        assert security["seccompProfile"]["type"] == ("Unconfined" if sandboxed else "RuntimeDefault")


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"image": ""}, "--image '': must be the name of an image"),
        ({"image": "a b"}, "--image 'a b'"),
        ({"claim": ""}, "--claim ''"),
        ({"claim": "Runs"}, "--claim 'Runs': a name in Kubernetes has lower-case letters, digits and dashes, or dots"),
        ({"namespace": "a.b"}, "--namespace 'a.b'"),
        ({"wandb_secret": "w_b"}, "--wandb-secret 'w_b'"),
        ({"ray_secret": "ray"}, "--ray-secret ray: a run on one node makes its own token"),
        ({"retries": -1}, "--retries -1: must be at least 0"),
    ],
)
def test_options_that_a_cluster_would_refuse_are_refused_before(changed: dict[str, Any], part: str) -> None:
    assert problems(ONE, ALL) == []
    (found,) = problems(ONE, replace(ALL, **changed))
    assert found.startswith(part)


def test_a_name_becomes_one_that_kubernetes_allows_or_is_refused() -> None:
    assert replace(ONE, name="PPO_coding.v2").object_name == "slime-ppo-coding-v2"
    long = "a" * 50
    assert problems(replace(ONE, name=long), OPTIONS) == []
    (found,) = problems(replace(FOUR, name=long), OPTIONS)
    assert found.endswith("has 56 characters, at most 47 fit")
