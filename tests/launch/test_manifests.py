"""Kubernetes manifests and Dockerfiles: fields, names that must agree, sources that must exist."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
GKE = ROOT / "launch" / "gke"
KINDS = ("gpu", "tpu")


def built(kind):
    """The documents of a kustomization, its images set: what `kubectl kustomize` prints, for what is used here."""
    documents = []

    def add(folder):
        made = yaml.safe_load((folder / "kustomization.yaml").read_text())
        assert made["kind"] == "Kustomization" and set(made) <= {"apiVersion", "kind", "resources", "images"}
        for item in made["resources"]:
            path = folder / item
            if path.is_dir():
                add(path)
            else:
                documents.extend(yaml.safe_load_all(path.read_text()))
        for image in made.get("images", []):
            for container in containers(documents):
                if container["image"] == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"

    add(GKE / kind)
    return documents


def jobset(documents):
    return next(d for d in documents if d["kind"] == "JobSet")


def containers(documents):
    return [c for d in documents if d["kind"] == "JobSet" for j in d["spec"]["replicatedJobs"]
            for c in j["template"]["spec"]["template"]["spec"]["containers"]]


@pytest.mark.parametrize("kind", KINDS)
def test_schema(kind):
    """What is in a JobSet's template is a Job, and checked as one; the JobSet's own fields by hand."""
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for d in built(kind):
        if d["kind"] != "JobSet":
            validate.validate(d, validate.latest_version(), strict=True)
            continue
        assert d["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
        assert set(d["spec"]) <= {"network", "failurePolicy", "replicatedJobs", "successPolicy", "startupPolicy"}
        for job in d["spec"]["replicatedJobs"]:
            assert set(job) == {"name", "replicas", "template"}
            as_job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"},
                      "spec": job["template"]["spec"]}
            validate.validate(as_job, validate.latest_version(), strict=True)
            as_job["spec"]["parallelisms"] = 1
            with pytest.raises(Exception, match="parallelisms"):
                validate.validate(as_job, validate.latest_version(), strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_names_agree(kind):
    documents = built(kind)
    made, config = jobset(documents), next(d for d in documents if d["kind"] == "ConfigMap")
    [job] = made["spec"]["replicatedJobs"]
    spec, [container] = job["template"]["spec"], containers(documents)
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"]
    assert container["image"].endswith(f"/distill-jax:{kind if kind == 'tpu' else 'cuda'}")
    assert container["envFrom"] == [{"configMapRef": {"name": config["metadata"]["name"]}}]
    used = set(re.findall(r"\$([A-Z_]+)", container["args"][0]))
    assert used == {"RECIPE", "ARGUMENTS"} <= set(config["data"])
    assert (ROOT / config["data"]["RECIPE"]).is_file()
    env = {e["name"]: e for e in container["env"]}
    if kind == "gpu":
        name = made["metadata"]["name"]
        assert env["DISTILL_JAX_COORDINATOR"]["value"] == f"{name}-{job['name']}-0-0.{name}:8476"
        assert env["DISTILL_JAX_PROCESSES"]["value"] == str(spec["completions"])
        path = env["DISTILL_JAX_PROCESS"]["valueFrom"]["fieldRef"]["fieldPath"]
        assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    else:
        assert env["DISTILL_JAX_DISTRIBUTED"]["value"] == "auto"
        chips = 1
        for n in spec["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
            chips *= int(n)
        assert chips == spec["completions"] * container["resources"]["limits"]["google.com/tpu"]


@pytest.mark.parametrize("name", ["cuda", "tpu"])
def test_dockerfiles_copy_what_is_there(name):
    text = (ROOT / "launch" / "docker" / f"{name}.Dockerfile").read_text()
    ignored = set((ROOT / ".dockerignore").read_text().split())
    copied = [source for line in re.findall(r"^COPY (.+)$", text, flags=re.M) for source in line.split()[:-1]]
    assert copied and all((ROOT / c).exists() and c not in ignored for c in copied), copied
    extras = re.search(r"-e '\.\[([\w,]+)\]'", text)
    declared = (ROOT / "pyproject.toml").read_text()
    assert extras and all(re.search(rf"^{e} = \[", declared, flags=re.M) for e in extras[1].split(","))
    assert "-c constraints-py312.txt" in text and re.search(r"^USER user$", text, flags=re.M)
