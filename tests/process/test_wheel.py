"""The wheel, installed elsewhere, works from an empty folder; a checkout works without being installed."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

from mnist_dist.versions import VERSION
from tests.conftest import REPOSITORY, clean_environment


def test_a_wheel_trains_a_recipe_by_name(tmp_path: Path, data_dir: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = tmp_path / "source"  # setuptools builds in the folder of the source
    subprocess.run(["git", "clone", "--quiet", "--local", str(REPOSITORY), str(source)], check=True)
    for name in ("mnist_dist", "configs", "pyproject.toml"):  # as they are now, committed or not
        subprocess.run(["cp", "-r", "--no-target-directory", str(REPOSITORY / name), str(source / name)], check=True)
    site = tmp_path / "site"
    install = ["install", "--no-deps", "--no-build-isolation", "--target", str(site), str(source)]
    subprocess.run([*pip, *install], check=True, capture_output=True, cwd=tmp_path)
    for kind in ("*.py", "*.html"):
        files = {path.relative_to(REPOSITORY) for path in (REPOSITORY / "mnist_dist").rglob(kind)}
        assert files == {path.relative_to(site) for path in (site / "mnist_dist").rglob(kind)}
    assert (site / "mnist_dist/configs/schema.json").is_file()

    folder = tmp_path / "empty"
    folder.mkdir()
    command = [sys.executable, "-m", "mnist_dist", "train", "mlp", "dataset=synthetic", f"data_dir={data_dir}"]
    environment = clean_environment(PYTHONPATH=str(site))
    result = subprocess.run([*command, "max_steps=3"], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "mlp (535,818 parameters)" in result.stdout
    assert (folder / "runs/latest").readlink().name.startswith("mlp-")
    assert (folder / "runs/latest/report.html").is_file()
    where = [sys.executable, "-c", "import mnist_dist; print(mnist_dist.__file__)"]
    imported = subprocess.run(where, cwd=folder, env=environment, capture_output=True, text=True).stdout
    assert imported.startswith(str(site))


def test_a_checkout_that_is_not_installed_trains(tmp_path: Path, data_dir: Path) -> None:
    site = tmp_path / "site"  # all that is installed, but this package
    site.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "mnist_dist" not in path.name:
            (site / path.name).symlink_to(path)
    arguments = ["train", "mlp", "dataset=synthetic", f"data_dir={data_dir}", "max_steps=3", f"run_dir={tmp_path}/run"]
    for words, said in ((["--version"], f"mnist-dist {VERSION}"), (arguments, "mlp (535,818 parameters)")):
        command = [
            sys.executable,
            "-S",
            "-m",
            "mnist_dist",
            *words,
        ]  # -S: without the site that this package is installed in
        environment = clean_environment(PYTHONPATH=str(site))
        result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert said in result.stdout
    assert json.loads((tmp_path / "run/versions.json").read_text())["mnist-dist"] == VERSION
