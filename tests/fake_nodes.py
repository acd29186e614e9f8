"""The nodes of Ray's own fake cluster, for its real autoscaler: processes on this machine. They join the cluster whose monitor
starts them, and may be announced with memory."""

from __future__ import annotations

import sys
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class Provider(FakeMultiNodeProvider):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        (self._gcs_address,) = [word.partition("=")[2] for word in sys.argv if word.startswith("--gcs-address=")]

    def create_node_with_resources_and_labels(self, config: Any, tags: Any, count: int, resources: Any, labels: Any) -> None:
        others = {name: amount for name, amount in resources.items() if name != "memory"}
        super().create_node_with_resources_and_labels(config, tags, count, others, labels)
