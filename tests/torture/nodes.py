"""Two nodes of a Ray cluster, held by a process of their own: each line that it reads loses one and adds another."""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

MEMORY = 100 * 2**20
"""Bytes of a node's object store."""


def main() -> None:
    cluster = Cluster(initialize_head=False)
    cluster.add_node(num_cpus=1, include_dashboard=False, object_store_memory=MEMORY)
    cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
    print(cluster.address, flush=True)
    for _ in sys.stdin:
        cluster.remove_node(cluster.list_all_nodes()[1])
        cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
    cluster.shutdown()


if __name__ == "__main__":
    main()
