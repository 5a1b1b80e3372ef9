"""The cluster of these tests stops without leftovers."""

from pathlib import Path

from tests.slurm.cluster import HEAD, NODES, Cluster


def namespaces() -> dict[str, set[str]]:
    """The processes of this machine by their network."""
    found: dict[str, set[str]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            found.setdefault(str((entry / "ns" / "net").readlink()), set()).add((entry / "comm").read_text())
        except OSError:
            continue
    return found


def test_nothing_is_left_of_a_cluster() -> None:
    before = set(namespaces())
    links = sorted(path.name for path in Path("/sys/class/net").iterdir())
    with Cluster() as cluster:
        assert sorted(cluster.client("srun", "--nodes=2", "hostname").split()) == list(NODES)
        job = cluster.client(
            "sbatch", "--parsable", "--nodes=2", "--output=/dev/null", "--wrap=srun sleep 1000"
        ).strip()
        assert job
        assert len(set(namespaces()) - before) == len((HEAD, *NODES))
    assert not set(namespaces()) - before
    assert sorted(path.name for path in Path("/sys/class/net").iterdir()) == links
    assert not cluster.folder.exists()
