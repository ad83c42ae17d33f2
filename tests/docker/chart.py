"""`make chart-check`: the Helm chart, by Helm's own library and Kubernetes' schemas, without a
cluster.

Each set of good values is linted, rendered and valid; each bad one is refused; and what is rendered
is compared with the project: options, routes, metrics, commands, times, keys, the image. That it
would be found is shown by spoiling what was rendered. Pods of it run as plain processes, probed
and stopped as a kubelet would. What a cluster does with it (scheduling, scaling) is not shown.
Ends with status 1 where anything is wrong.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python as helm
import kubernetes_validate
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PrometheusRule, ServiceMonitor

from server import configuration
from server.api_keys import named, read_named_keys
from server.cli.command_line import parse
from server.errors import SettingsError
from server.settings import ENV_PREFIX, EncodeSettings, MachineSettings, Settings
from tests.checkpoints import write_checkpoint
from tests.docker import dashboards, pods
from tests.docker.chart_values import BAD, GOOD, RELEASES, SPOILED

ROOT = Path(__file__).parents[2]
CHART = ROOT / "docker/helm/nv-embed"
KUBERNETES = ("1.35", "1.36", "1.37")
CUSTOM = {"ScaledObject": ScaledObject, "ServiceMonitor": ServiceMonitor}
CUSTOM["PrometheusRule"] = PrometheusRule
Document = dict[str, Any]


def main() -> int:
    wrong = list(_all_problems())
    print("\n".join(wrong) or f"{len(GOOD)} sets of values are right, {len(BAD)} are refused")
    return 1 if wrong else 0


def _all_problems() -> Iterator[str]:
    for name in ("compose.yaml", "compose.two-gpus.yaml"):
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
        command += ["vendor.compose-spec", str(ROOT / "docker" / name)]
        if subprocess.run(command).returncode:
            yield f"{name} is no compose file"
    yield from _problems_of_schema()
    with helm.Chart.load(CHART) as chart, tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "golden")
        metrics = dashboards.exported(checkpoint)
        for title, values in BAD.items():
            try:
                chart.validate_schema(values)
            except helm.HelmValuesError:
                continue
            yield f"{title}: accepted"
        for title, values in GOOD.items():
            report = helm.lint(CHART, values, strict=True)
            serious = [item for item in report["messages"] if item["severity"] > 1]
            for found in [*report["errors"], *serious]:
                yield f"{title}: {found}"
            for release in RELEASES:
                documents = _rendered(chart, values, release)
                checks = Checks(documents, chart.merge_values(values), metrics)
                for problem in checks.problems():
                    yield f"{title}, {release}: {problem}"
        yield from _unnoticed(chart, metrics)
        values = GOOD["the shipped model on a CPU, without a volume"]
        (deployment,) = (
            one for one in _rendered(chart, values, "search") if one["kind"] == "Deployment"
        )
        yield from pods.problems(deployment["spec"]["template"], Path(folder), checkpoint)


def _unnoticed(chart: helm.Chart, metrics: set[str]) -> Iterator[str]:
    """What could be spoiled in what was rendered, and nothing was found."""
    values = GOOD["eight pods, watched and guarded"] | {"autoscaling": {"mode": "keda"}}
    text = yaml.safe_dump_all(_rendered(chart, values, "search"))
    for before, after in SPOILED.items():
        assert before in text, before
        documents = list(yaml.safe_load_all(text.replace(before, after)))
        try:
            found = list(Checks(documents, chart.merge_values(values), metrics).problems())
        except (SettingsError, ValueError) as error:
            found = [f"{error}"]
        if not found:
            yield f"nothing was found wrong with {after!r} for {before!r}"


def _problems_of_schema() -> Iterator[str]:
    """Its options are the server's, but for those that the chart itself sets or leaves out."""
    schema = yaml.safe_load((CHART / "values.schema.json").read_text())
    allowed = set(schema["properties"]["options"]["properties"])
    reserved = {"model", "revision", "offline", "devices", "host", "port", "uds", "runner"}
    reserved |= {"api_key", "api_key_file", "tls_certificate", "tls_key", "tiktoken_ranks"}
    reserved |= {"drain_delay", "drain_timeout", "max_connection_age", "min_ready_workers"}
    reserved |= {"exit_after_failed_starts"}
    if allowed != set(Settings.model_fields) - reserved:
        yield f"values.schema.json: options differ: {allowed ^ set(Settings.model_fields)}"
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    if missing := set(values) ^ (set(schema["properties"]) - {"global"}):
        yield f"values.yaml and its schema differ: {missing}"


def _rendered(chart: helm.Chart, values: Document, release: str) -> list[Document]:
    chart.validate_schema(values)
    files = chart.render(values, name=release, namespace="ml")
    notes = [text for path, text in files.items() if path.endswith(".txt")]
    assert len(notes) == 1, files.keys()
    texts = (text for path, text in files.items() if path.endswith(".yaml"))
    return [one for text in texts for one in yaml.safe_load_all(text) if one]


class Checks:
    """Of what one set of values renders."""

    def __init__(self, documents: list[Document], values: Document, metrics: set[str]) -> None:
        self.documents, self.values, self.metrics = documents, values, metrics

    def of(self, kind: str) -> list[Document]:
        return [one for one in self.documents if one["kind"] == kind]

    def problems(self) -> Iterator[str]:
        for document in self.documents:
            yield from _schema_problems(document)
            if len(document["metadata"]["name"]) > 63:
                yield f"the name of the {document['kind']} is too long"
        if len({(one["kind"], one["metadata"]["name"]) for one in self.documents}) < len(
            self.documents
        ):
            yield "two things have one name"
        for pod in self.pods():
            yield from _pod_problems(pod)
            yield from self._volume_problems(pod)
        yield from self._server_problems()
        yield from self._scaling_problems()
        yield from self._selector_problems()
        yield from self._metric_problems()
        yield from self._what_was_asked()

    def pods(self) -> list[Document]:
        return [one["spec"]["template"] for kind in ("Deployment", "Job") for one in self.of(kind)]

    def _volume_problems(self, pod: Document) -> Iterator[str]:
        spec = pod["spec"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for container in [*spec.get("initContainers", ()), *spec["containers"]]:
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            if mounted - set(volumes):
                yield f"{container['name']} mounts what is not there: {mounted - set(volumes)}"
        ours = {one["metadata"]["name"] for one in self.documents}
        theirs = (
            self.values["persistence"]["existingClaim"],
            self.values["apiKeys"]["existingSecret"],
            self.values["bulk"]["claim"],
        )
        for volume in volumes.values():
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            secret = volume.get("secret", {}).get("secretName")
            if (name := claim or secret) and name not in ours | set(theirs):
                yield f"nothing is named {name}"

    def _server_problems(self) -> Iterator[str]:
        (deployment,) = self.of("Deployment")
        spec = deployment["spec"]["template"]["spec"]
        (server,) = spec["containers"]
        environment = _environment(server)
        settings = configuration.load({}, environment)
        stop = server.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        needed = stop + settings.drain_delay + settings.drain_timeout + 5
        if spec["terminationGracePeriodSeconds"] < needed:
            yield f"the grace period is shorter than {needed} s"
        (port,) = server["ports"]
        if port["containerPort"] != settings.port:
            yield "the container's port is not the server's"
        documented = yaml.safe_load((ROOT / "openapi.yaml").read_text())["paths"]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            http = server[probe]["httpGet"]
            if http["path"] not in documented or http["port"] != port["name"]:
                yield f"{probe} asks {http}"
        start = server["startupProbe"]
        budget = start["failureThreshold"] * start["periodSeconds"]
        if budget < self.values["startupSeconds"]:
            yield "the startup probe gives up too early"
        if deployment["spec"]["progressDeadlineSeconds"] < budget + self.values["loadSeconds"]:
            yield "the rollout gives up before a pod can be ready"
        if deployment["spec"]["strategy"]["rollingUpdate"] != {"maxSurge": 0, "maxUnavailable": 1}:
            yield "a new pod would wait for a GPU that an old one holds"
        gpus = server["resources"]["limits"].get(self.values["gpu"]["resource"], 0)
        if (gpus == 1) != self.values["gpu"]["enabled"]:
            yield f"{gpus} GPUs"
        for secret in self.of("Secret"):
            if not _are_keys(secret["stringData"], self.values["apiKeys"]["keys"]):
                yield "the server reads other keys"
        for name, value in self.values["options"].items():
            if (got := getattr(settings, name)) not in (value, [value]):
                yield f"the option {name} is {got}, not {value}"

    def _scaling_problems(self) -> Iterator[str]:
        (deployment,) = self.of("Deployment")
        scaled = self.of("HorizontalPodAutoscaler") + self.of("ScaledObject")
        if bool(scaled) == ("replicas" in deployment["spec"]):
            yield "who says how many pods there are?"
        for one in scaled:
            if one["spec"]["scaleTargetRef"]["name"] != deployment["metadata"]["name"]:
                yield "another Deployment is scaled"
        least = deployment["spec"].get("replicas", self.values["autoscaling"]["minReplicas"])
        if bool(self.of("PodDisruptionBudget")) != (least > 1):
            yield f"a disruption budget with {least} pods"

    def _selector_problems(self) -> Iterator[str]:
        (deployment,), (service,) = self.of("Deployment"), self.of("Service")
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        selectors = {
            "Deployment": deployment["spec"]["selector"]["matchLabels"],
            "Service": service["spec"]["selector"],
        }
        for budget in self.of("PodDisruptionBudget"):
            selectors["PodDisruptionBudget"] = budget["spec"]["selector"]["matchLabels"]
        for policy in self.of("NetworkPolicy"):
            selectors["NetworkPolicy"] = policy["spec"]["podSelector"]["matchLabels"]
            for rule in policy["spec"]["ingress"]:
                if [port["port"] for port in rule["ports"]] != ["http"]:
                    yield "the network policy opens other ports than the Service's"
        others = [pod["metadata"]["labels"] for pod in self.pods()[1:]]
        for name, selector in selectors.items():
            if not selector.items() <= labels.items():
                yield f"the {name} selects no pod"
            if any(selector.items() <= other.items() for other in others):
                yield f"the {name} selects a Job's pods, too"
        if [port["targetPort"] for port in service["spec"]["ports"]] != ["http"]:
            yield "the Service leads elsewhere"
        for monitor in self.of("ServiceMonitor"):
            chosen = monitor["spec"]["selector"]["matchLabels"]
            if not chosen.items() <= service["metadata"]["labels"].items():
                yield "the ServiceMonitor selects no Service"
            job = service["metadata"]["labels"].get(monitor["spec"].get("jobLabel"))
            if f'job="{job}"' not in (CHART / "files/alerts.yml").read_text():
                yield f"the alerts know no job {job}"

    def _metric_problems(self) -> Iterator[str]:
        for kind in ("HorizontalPodAutoscaler", "ScaledObject", "PrometheusRule"):
            for one in self.of(kind):
                text = re.sub(r'(service|namespace)="[^"]*"', "", str(one["spec"]))
                if unknown := dashboards.metrics_named(text) - self.metrics:
                    yield f"{kind}: no such metrics: {unknown}"
        for rule in self.of("PrometheusRule"):
            written = yaml.safe_load((dashboards.MONITORING / "alerts.yml").read_text())
            if rule["spec"] != written:
                yield "the alerts are others than docker/monitoring's"

    def _what_was_asked(self) -> Iterator[str]:
        asked = self.values
        wanted = {
            "ServiceMonitor": asked["monitoring"]["serviceMonitor"],
            "PrometheusRule": asked["monitoring"]["prometheusRule"],
            "NetworkPolicy": asked["networkPolicy"]["enabled"],
            "ScaledObject": asked["autoscaling"]["mode"] == "keda",
            "HorizontalPodAutoscaler": asked["autoscaling"]["mode"] == "hpa",
            "Secret": bool(asked["apiKeys"]["keys"]),
        }
        for kind, want in wanted.items():
            if len(self.of(kind)) != want:
                yield f"{len(self.of(kind))} of {kind}"


def _are_keys(data: dict[str, str], wanted: list[str]) -> bool:
    """Whether the server reads these keys from the Secret."""
    (text,) = data.values()
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(text)
        file.flush()
        return read_named_keys(Path(file.name), "") == [named(one) for one in wanted]


def _schema_problems(document: Document) -> Iterator[str]:
    """A kind without a schema is an error, too: it would not have been looked at."""
    kind = document["kind"]
    if kind in CUSTOM:
        model = CUSTOM[kind].model_validate(document)  # refuses what is missing or mistyped
        dumped = model.model_dump(by_alias=True, exclude_unset=True, mode="json")
        if lost := list(_differences(document, dumped)):  # and leaves out what it does not know
            yield f"{kind}: unknown fields: {lost}"
        return
    for version in KUBERNETES:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{kind}, Kubernetes {version}: {error}"
        except kubernetes_validate.SchemaNotFoundError:
            yield f"{kind}, Kubernetes {version}: no such kind"


def _differences(ours: Any, theirs: Any, path: str = "") -> Iterator[str]:
    """Fields of the first that the second lacks."""
    if isinstance(ours, dict):
        for name, value in ours.items():
            if not isinstance(theirs, dict) or name not in theirs:
                yield f"{path}.{name}"
            else:
                yield from _differences(value, theirs[name], f"{path}.{name}")
    elif isinstance(ours, list):
        for index, value in enumerate(ours):
            yield from _differences(value, theirs[index], f"{path}[{index}]")


def _environment(container: Document) -> dict[str, str]:
    """What has its value here, and is the server's."""
    given = container.get("env", ())
    return {one["name"]: one["value"] for one in given if one["name"].startswith(ENV_PREFIX)}


def _pod_problems(pod: Document) -> Iterator[str]:
    spec = pod["spec"]
    if spec["enableServiceLinks"] or spec["automountServiceAccountToken"]:
        yield "the pod gets what it has no use for"
    (user,) = re.findall(r"^USER (\d+):\d+$", (ROOT / "Dockerfile").read_text(), re.M)
    security = spec["securityContext"]
    if security["runAsUser"] != int(user) or not security["runAsNonRoot"]:
        yield "the pod runs as another user than the image"
    if security["seccompProfile"] != {"type": "RuntimeDefault"}:
        yield "no seccomp profile"
    for container in [*spec.get("initContainers", ()), *spec["containers"]]:
        name, limits = container["name"], container["resources"]["limits"]
        if container["securityContext"] != {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }:
            yield f"{name} is not restricted"
        if limits["memory"] != container["resources"]["requests"]["memory"]:
            yield f"{name} may be killed for memory that it was not promised"
        command = container["args"]
        # Raises SettingsError.
        parse([word.replace("$(JOB_COMPLETION_INDEX)", "0") for word in command])
        kind: type[MachineSettings] = {"serve": Settings, "encode": EncodeSettings}.get(
            command[0], MachineSettings
        )
        configuration.load_as(kind, {}, _environment(container))  # likewise


if __name__ == "__main__":
    sys.exit(main())
