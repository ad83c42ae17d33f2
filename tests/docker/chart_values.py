"""Values of the chart: those that people have, and those that must be refused."""

from __future__ import annotations

from typing import Any

GOOD: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "the shipped model on a CPU, without a volume": {
        "model": {"id": ""},
        "gpu": {"enabled": False},
        "resources": {"cpu": "2", "memory": "1Gi"},
        "persistence": {"enabled": False},
    },
    "each pod downloads": {"persistence": {"enabled": False}, "download": {"enabled": False}},
    "eight pods, watched and guarded": {
        "replicas": 8,
        "apiKeys": {"keys": ["search:a-key-of-search", "bulk:a-key-of-bulk", "a-key-of-nobody"]},
        "options": {"max_key_share": 0.5, "metrics_need_key": False},
        "networkPolicy": {"enabled": True, "namespaces": ["search", "ingest"]},
        "monitoring": {
            "serviceMonitor": True,
            "prometheusRule": True,
            "labels": {"release": "prometheus"},
        },
        "traces": {"endpoint": "http://collector.monitoring:4318", "sample": 0.05},
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": {"app.kubernetes.io/name": "nv-embed"}},
            }
        ],
    },
    "hpa": {"autoscaling": {"mode": "hpa", "minReplicas": 2, "queuedTokensPerPod": 2_000_000}},
    "keda": {
        "autoscaling": {"mode": "keda", "maxReplicas": 32},
        "monitoring": {"serviceMonitor": True},
    },
    "secrets and volumes that exist, a private registry": {
        "apiKeys": {"existingSecret": "keys-of-search", "key": "api-keys"},
        "hfToken": {"existingSecret": "hf", "key": "token"},
        "persistence": {"existingClaim": "weights"},
        "image": {
            "repository": "registry.example.org:5000/ml/nv-embed-server",
            "tag": "1.2.3",
            "pullPolicy": "Always",
            "pullSecrets": [{"name": "registry"}],
        },
    },
    "a MIG slice, in its place, at another pace": {
        "gpu": {"resource": "nvidia.com/mig-3g.40gb"},
        "model": {"id": "intfloat/e5-mistral-7b-instruct", "revision": "main"},
        "options": {
            "max_batch_tokens": 16384,
            "max_queued_tokens": 30_000_000,
            "truncate": "end",
            "cuda_graphs": True,
            "cors_origin": "https://example.org",
            "log_format": "text",
        },
        "stopping": {"preStopSeconds": 0, "drainDelaySeconds": 10, "drainTimeoutSeconds": 120},
        "maxConnectionAgeSeconds": 0,
        "exitAfterFailedStarts": 0,
        "startupSeconds": 7200,
        "nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "priorityClassName": "online",
        "runtimeClassName": "nvidia",
        "podLabels": {"team": "search"},
        "podAnnotations": {"example.org/note": "1"},
        "service": {"type": "LoadBalancer", "port": 80, "annotations": {"a": "b"}},
    },
    "a guarded server that downloads by itself": {
        "download": {"enabled": False},
        "hfToken": {"existingSecret": "hf"},
        "networkPolicy": {"enabled": True},
        "traces": {"endpoint": "https://traces.example.org/otlp", "sample": 1},
    },
    "bulk beside it": {
        "bulk": {"enabled": True, "claim": "texts", "completions": 100, "parallelism": 8},
        "options": {"max_batch_tokens": 16384},
    },
}
BAD: dict[str, dict[str, Any]] = {
    "replica": {"replica": 2},
    "'0' replicas": {"replicas": 0},
    "replicas as a text": {"replicas": "2"},
    "an unknown option": {"options": {"max_batch_tokns": 1}},
    "an option that the chart sets": {"options": {"port": 9000}},
    "a list as an option": {"options": {"cors_origin": ["https://a", "https://b"]}},
    "more than one GPU": {"gpu": {"count": 8}},
    "a model that is no hub id": {"model": {"id": "NV-Embed-v2"}},
    "a key with a space": {"apiKeys": {"keys": ["a key"]}},
    "a key of three letters": {"apiKeys": {"keys": ["abc"]}},
    "a name without a key": {"apiKeys": {"keys": ["search:"]}},
    "an unknown autoscaler": {"autoscaling": {"mode": "vpa"}},
    "no pods": {"autoscaling": {"mode": "keda", "minReplicas": 0}},
    "memory as a number": {"resources": {"memory": 24}},
    "a misspelt limit": {"resources": {"memmory": "24Gi"}},
    "a negative delay": {"stopping": {"drainDelaySeconds": -1}},
    "bulk without a volume": {"bulk": {"enabled": True}},
    "a tag within the repository": {"image": {"repository": "nv-embed-server:latest"}},
    "an access mode that nobody can write to": {"persistence": {"accessMode": "ReadOnlyMany"}},
    "a collector without a scheme": {"traces": {"endpoint": "collector:4318"}},
    "a share in per cent": {"traces": {"sample": 5}},
    "a namespace that is a label": {"networkPolicy": {"namespaces": ["team=search"]}},
}
RELEASES = ("nv-embed", "search", "a-release-whose-name-is-as-long-as-helm-allows-names-2")
SPOILED = {  # text of what is rendered -> what would not work
    "maxUnavailable: 1": "maxUnavailble: 1",
    "path: /readyz": "path: /ready",
    "name: NV_EMBED_DRAIN_DELAY": "name: NV_EMBED_DRAIN_DELY",
    "name: NV_EMBED_TRACE_SAMPLE": "name: NV_EMBED_TRACES_SAMPLE",
    "value: http://collector.monitoring:4318": "value: http://collector.monitoring:4317",
    "port: 4318": "port: 4317",
    "terminationGracePeriodSeconds: 48": "terminationGracePeriodSeconds: 42",
    "containerPort: 8000": "containerPort: 8001",
    "readOnlyRootFilesystem: true": "readOnlyRootFilesystem: false",
    "query: sum(nv_embed_queued_tokens": "query: sum(nv_embed_queued_token",
    "jobLabel: app.kubernetes.io/name": "jobLabel: app.kubernetes.io/instance",
    "- download\n": "- downlod\n",
    "progressDeadlineSeconds: 2460": "progressDeadlineSeconds: 600",
    "maxSurge: 0": "maxSurge: 1",
    "claimName: search-nv-embed-weights": "claimName: search-nv-embed-weight",
    "search:a-key-of-search": "search;a-key-of-search",
    "jobLabel:": "jobLable:",
    "minReplicaCount:": "minReplicasCount:",
    "kind: PrometheusRule": "kind: PrometheusRules",
}
