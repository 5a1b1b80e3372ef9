"""The examples, each checked as far as that can be done without the program that it is for."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.commands import blocks, check_arguments, check_command
from tests.conftest import REPOSITORY, clean_environment, skip

EXAMPLES = REPOSITORY / "examples"
DOCKERFILE = (EXAMPLES / "Dockerfile").read_text()
APPTAINER = (EXAMPLES / "apptainer.def").read_text()
PLACE = "/opt/mnist_dist"


def run_checker(program: str, *arguments: str) -> None:
    """Run a checker of the dev extra, which lies beside this Python."""
    path = shutil.which(program, path=str(Path(sys.executable).parent))
    if not path:
        skip("checkers", f"{program} is not installed (pip install .[dev])")
    result = subprocess.run([path, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def copied_files() -> list[str]:
    """What the Dockerfile copies into the image, in its order."""
    return [name for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()]


def test_the_page_names_every_example_and_its_commands_exist() -> None:
    page = EXAMPLES / "README.md"
    for path in EXAMPLES.iterdir():
        assert f"`{path.name}`" in page.read_text() or path == page
    for line in blocks(page.read_text()):
        check_command(line)
        image, _, arguments = line.partition(" mnist-dist ") if "docker run" in line else line.partition(".sif ")
        if ("docker run" in line or "apptainer run" in line) and image:
            check_arguments(arguments.split(), f"launch/local.sh {arguments}")


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    run_checker("hadolint", str(EXAMPLES / "Dockerfile"))


def test_what_the_dockerfile_copies_is_enough_to_answer_its_command(tmp_path: Path) -> None:
    image, work = tmp_path / "image", tmp_path / "work"
    work.mkdir()
    for name in copied_files():
        source, target = REPOSITORY / name, image / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    entrypoint = re.findall(rf'^ENTRYPOINT \["{PLACE}/(.*)"\]$', DOCKERFILE, re.MULTILINE)[0]
    command = re.findall(r'^CMD \["(.*)"\]$', DOCKERFILE, re.MULTILINE)[0]
    environment = clean_environment(PYTHON=sys.executable, PYTHONPATH="", PYTHONSAFEPATH="")
    result = subprocess.run(
        [image / entrypoint, command, "--dry-run"], cwd=work, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "dataset: synthetic" in result.stdout
    project = (REPOSITORY / "pyproject.toml").read_text()
    needed = re.findall(r'^(?:readme = |license-files = \[)"([^"]+)"', project, re.MULTILINE)
    assert set(needed) <= set(copied_files())


def test_the_apptainer_recipe_installs_what_the_dockerfile_installs() -> None:
    parts = re.split(r"^%(\w+)\n", APPTAINER, flags=re.MULTILINE)
    header, sections = parts[0], dict(zip(parts[1::2], parts[2::2], strict=True))
    assert dict(line.split(": ") for line in header.split("\n") if line)["Bootstrap"] == "docker"
    assert re.findall(r"^FROM (.*)$", DOCKERFILE, re.MULTILINE) == re.findall(r"^From: (.*)$", header, re.MULTILINE)
    assert set(sections) == {"help", "files", "post", "runscript", "test"}
    files = [line.split() for line in sections["files"].splitlines() if line.strip()]
    assert [source for source, _ in files] == copied_files()
    assert all(target == f"{PLACE}/{source}" and (REPOSITORY / source).exists() for source, target in files)
    install = "pip install --no-cache-dir -c constraints.txt ."
    assert install in sections["post"]
    assert install in DOCKERFILE
    check_command(sections["test"].strip().replace(" --version", " schema"))
    for name in ("post", "runscript", "test"):
        assert subprocess.run(["sh", "-n"], input=sections[name], text=True).returncode == 0


def test_the_trainjob_has_what_the_schema_requires_and_fits_its_runtime() -> None:
    """The fields are those of trainer.kubeflow.org/v1alpha1 (kubeflow/trainer, pkg/apis/trainer/v1alpha1)."""
    runtime, job = yaml.safe_load_all((EXAMPLES / "trainjob.yaml").read_text())
    for document, kind in ((runtime, "TrainingRuntime"), (job, "TrainJob")):
        assert (document["apiVersion"], document["kind"]) == ("trainer.kubeflow.org/v1alpha1", kind)
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", document["metadata"]["name"])
    assert set(runtime["spec"]) == {"mlPolicy", "template"}
    assert set(job["spec"]) == {"runtimeRef", "trainer"}
    reference: dict[str, Any] = job["spec"]["runtimeRef"]
    assert reference["kind"] == runtime["kind"]
    assert reference["name"] == runtime["metadata"]["name"]
    assert reference["apiGroup"] == runtime["apiVersion"].partition("/")[0]
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    pod = replicated["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert replicated["name"] == container["name"] == "node"  # the names that the trainer's fields apply to
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}

    trainer: dict[str, Any] = job["spec"]["trainer"]
    allowed = {"image", "command", "args", "env", "numNodes", "resourcesPerNode", "numProcPerNode"}
    assert set(trainer) <= allowed
    assert trainer["image"] == container["image"]
    program, script, *arguments = trainer["command"]
    assert program == "torchrun"
    assert script == f"{PLACE}/train.py"
    assert "train.py" in copied_files()
    check_arguments(arguments, "train.py")
    folders = [word.partition("=")[2] for word in arguments if word.startswith(("data_dir=", "run_dir="))]
    assert len(folders) == 2
    assert all(folder.startswith(f"{mounts['shared']}/") for folder in folders), "both must be on the shared volume"


def test_the_workflow_is_one_and_its_commands_exist() -> None:
    path = EXAMPLES / "github-actions.yml"
    workflow = yaml.safe_load(path.read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    for step in steps:
        assert ("uses" in step) != ("run" in step)
        if "run" in step:
            check_command(step["run"].removeprefix(".venv/bin/"))
    assert ".ci/run" in [step.get("run") for step in steps]
    run_checker("check-jsonschema", "--builtin-schema", "vendor.github-workflows", str(path))
