"""A process with Ray's own test cluster: three nodes of one core each on this machine.

It prints the address. Then `kill` on its standard input ends a node as a power cut does, and `add` starts one.
"""

from __future__ import annotations

import os
import sys

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from ray.cluster_utils import Cluster

MEMORY = 100 << 20


def main() -> None:
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": MEMORY, "include_dashboard": False}
    )
    others = [cluster.add_node(num_cpus=1, object_store_memory=MEMORY) for _ in range(2)]
    print(cluster.address, flush=True)
    for line in sys.stdin:
        if line.strip() == "kill":
            cluster.remove_node(others.pop(), allow_graceful=False)
        elif line.strip() == "add":
            others.append(cluster.add_node(num_cpus=1, object_store_memory=MEMORY))
        print("done", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
