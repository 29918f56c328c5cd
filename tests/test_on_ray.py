"""Extraction by the actors of a Ray cluster: two nodes on this machine, of which one is lost and comes back."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from extraction_cases import files_of, tiny_config
from s3_server import BUCKET, s3_server

from saffe_cache.core.features import CacheError
from saffe_cache.extraction.config import ExtractConfig
from saffe_cache.extraction.extract import extract
from saffe_cache.extraction.on_ray import _places
from saffe_cache.store.claims import Claims
from saffe_cache.store.storage import Storage


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of two nodes with one core each, whose workers know an S3 server on this machine."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    pytest.importorskip("obstore")
    pytest.importorskip("moto")
    on_sigterm = signal.getsignal(signal.SIGTERM)  # each node sets one, which would end pytest
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))  # this very code on the nodes
        cluster = cluster_utils.Cluster(initialize_head=False)
        cluster.add_node(num_cpus=1, include_dashboard=False, object_store_memory=100 * 2**20)
        cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        yield cluster
        cluster.shutdown()
    signal.signal(signal.SIGTERM, on_sigterm)


def on(cluster: Any, config: ExtractConfig, **options: Any) -> ExtractConfig:
    return replace(config, workers_on="ray", ray_address=cluster.address, **options)


@pytest.mark.slow
def test_actors_store_what_one_process_stores(
    cluster: Any, tmp_path: Path, tiny_model: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Also where a later command finds nothing to do."""
    config = replace(tiny_config(tmp_path, tiny_model, train=200), shard_mb=0)
    whole = extract(replace(config, cache=config.cache + ".whole"))
    caplog.set_level("INFO")
    for _ in range(2):
        found = extract(on(cluster, config))
        assert files_of(found) == files_of(whole)
        assert not (Path(found) / "work").exists()
    assert len(re.findall("Ray worker .* per second", caplog.text)) in (1, 2)  # the second one may come too late


@pytest.mark.slow
def test_actors_store_the_same_behind_a_url(cluster: Any, tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    config = replace(tiny_config(tmp_path, tiny_model, train=200), shard_mb=0)
    whole = files_of(extract(config))
    storage = Storage(extract(on(cluster, config, cache=f"s3://{BUCKET}/cache.zarr")))
    assert {name: storage.read(name) for name in whole} == whole
    assert not storage.list("work")


@pytest.mark.slow
def test_node_lost_in_the_middle_of_a_shard(
    cluster: Any, tmp_path: Path, tiny_model: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """And another one joins."""
    config = replace(tiny_config(tmp_path, tiny_model, train=1200), shard_mb=0, batch_size=1)
    whole = extract(replace(config, cache=config.cache + ".whole"))

    with ThreadPoolExecutor(1) as pool:  # a cluster begins nodes in the main thread alone
        extracting = pool.submit(extract, on(cluster, config))
        node = cluster.list_all_nodes()[1]  # the driver is connected to the first one
        wait_for_claim(Path(config.cache), parent=node.all_processes["raylet"][0].process.pid)
        cluster.remove_node(node)
        cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        found = extracting.result()
    assert "is gone, and another worker takes its range" in caplog.text
    assert files_of(found) == files_of(whole)


def wait_for_claim(cache: Path, parent: int) -> None:
    """Until a child of a process has a range."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        for claim in cache.glob("work/*/claims/*"):
            with contextlib.suppress(ValueError, OSError):  # being written, or already done
                process = json.loads(claim.read_text())["pid"]
                if int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1]) == parent:
                    return
        time.sleep(0.01)
    raise AssertionError("no worker of the node got a range")


@pytest.mark.slow
def test_what_is_wrong_with_the_data_ends_the_driver(
    cluster: Any, tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    config = tiny_config(tmp_path, tiny_model)
    photo = Path(config.data) / "train" / "003.png"
    photo.write_bytes(photo.read_bytes()[:200])
    with pytest.raises(CacheError, match=r"more than --max-invalid 0.01 allows.*003\.png"):
        extract(on(cluster, config))


def test_place_without_a_cluster(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    """Ray itself would try for minutes."""
    pytest.importorskip("ray")
    config = replace(tiny_config(tmp_path, tiny_model), workers_on="ray", ray_address="127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"--ray-address 127.0.0.1:9: found no Ray cluster there \("):
        extract(config)


def test_without_ray_the_extra_is_named(
    tmp_path: Path, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"needs the package ray: pip install 'saffe-cache\[ray\]'"):
        extract(replace(tiny_config(tmp_path, tiny_model), workers_on="ray"))


def test_workers_by_gpus_and_by_cores() -> None:
    def node(name: str, is_alive: bool = True, **resources: float) -> dict[str, Any]:
        return {"NodeID": name, "Alive": is_alive, "Resources": resources}

    nodes = [node("a", CPU=32, GPU=4), node("b", CPU=9), node("c", CPU=8, GPU=1), node("d", False, GPU=8)]

    def found(gpus: float) -> list[tuple[str, float, int]]:
        return [(place.node, place.num_gpus, place.num_cpus) for place in _places(nodes, gpus)]

    assert found(1) == [("a", 1, 8)] * 4 + [("c", 1, 8)]
    assert found(2) == [("a", 2, 16)] * 2
    assert found(0.5) == [("a", 0.5, 4)] * 8 + [("c", 0.5, 4)] * 2
    assert found(0) == [("a", 0, 4)] * 8 + [("b", 0, 4)] * 2 + [("c", 0, 4)] * 2
    del nodes[2], nodes[0]
    assert found(1) == [("b", 0, 4)] * 2


def test_crew_takes_its_members_ranges_over_at_once(tmp_path: Path) -> None:
    """Its driver says which of them works on what; others wait until a claim is found dead."""
    storage = Storage(tmp_path)
    first = Claims(storage, "claims", "one", crew="a").take("7")
    assert first is not None
    assert Claims(storage, "claims", "stranger").take("7") is None
    assert Claims(storage, "claims", "of another crew", crew="b").take("7") is None
    second = Claims(storage, "claims", "two", crew="a").take("7")
    assert second is not None
    assert second.name == "claims/7.1"
    for claim in (first, second):
        claim.release()
