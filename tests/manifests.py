"""Validates deploy/kubernetes/ and deploy/systemd/ without a cluster and without the network. `make lint` runs it."""

import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import kubernetes_validate
import yaml

KUBERNETES = pathlib.Path("deploy/kubernetes")
# The oldest and the newest version that docs/deploying.md names.
VERSIONS = ["1.29", "1.37"]
# The package has the schemas of Kubernetes. This one comes with the Prometheus operator.
WITHOUT_SCHEMA = "ServiceMonitor"
UNIT = pathlib.Path("deploy/systemd/listing-api.service")
SETTINGS = re.findall(r"^\| `([A-Z_]+)` \|", pathlib.Path("docs/configuration.md").read_text(), re.MULTILINE)


def require(fact, message):
    if not fact:
        sys.exit(f"manifests: {message}")


def validate(document):
    name = f"{document['kind']} {document['metadata']['name']}"
    if document["kind"] == WITHOUT_SCHEMA:
        print(f"manifests: {name} has no schema here: only its selector and its port are verified")
        return
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            path = ".".join(map(str, error.path))
            sys.exit(f"manifests: {name} is not valid for Kubernetes {version}: {path}: {error.message}")


def selects(selector, labels):
    return selector.items() <= labels.items()


def verify_references(documents):
    """Every selector finds its labels, every port its name, and every variable is a setting of the service."""
    of = lambda kind: [document for document in documents if document["kind"] == kind]
    [deployment], [monitor], [budget], [job] = map(of, ["Deployment", "ServiceMonitor", "PodDisruptionBudget", "Job"])
    pod = deployment["spec"]["template"]
    labels, migration = pod["metadata"]["labels"], job["spec"]["template"]["metadata"]["labels"]
    [container] = pod["spec"]["containers"]
    ports = [port["name"] for port in container["ports"]]
    spread = [constraint["labelSelector"] for constraint in pod["spec"]["topologySpreadConstraints"]]
    for selector in [deployment["spec"]["selector"], budget["spec"]["selector"], *spread]:
        require(selects(selector["matchLabels"], labels), f"{selector} does not select the pods")
    for service in of("Service"):
        require(selects(service["spec"]["selector"], labels), f"{service} does not select the pods")
        require(not selects(service["spec"]["selector"], migration), f"{service} selects the migration")
        for port in service["spec"]["ports"]:
            require(port["targetPort"] in ports, f"{port} is no port of the container")
    watched = [
        port["name"]
        for service in of("Service")
        if selects(monitor["spec"]["selector"]["matchLabels"], service["metadata"]["labels"])
        for port in service["spec"]["ports"]
    ]
    require(watched == [endpoint["port"] for endpoint in monitor["spec"]["endpoints"]], f"the ServiceMonitor finds {watched}")
    for probe in ["startupProbe", "readinessProbe", "livenessProbe"]:
        require(container[probe]["httpGet"]["port"] == "admin", f"the {probe} does not ask the admin port")
    variables = {variable["name"]: variable.get("value") for variable in container["env"]}
    unknown = variables.keys() - set(SETTINGS)
    require(not unknown, f"no settings of the service: {unknown}")
    stop_ms = int(variables["SHUTDOWN_DELAY_MS"]) + int(variables["SHUTDOWN_TIMEOUT_MS"])
    require(pod["spec"]["terminationGracePeriodSeconds"] * 1000 > stop_ms, f"Kubernetes kills before {stop_ms} ms")


def verify_overlay(documents):
    """The kustomization of docs/deploying.md builds, with the images that it names."""
    if not shutil.which("kubectl"):
        print("manifests: the kustomization is not built, because kubectl is not installed")
        return
    page = pathlib.Path("docs/deploying.md").read_text()
    overlay = page.split("```yaml\n")[1].split("```")[0]
    with tempfile.TemporaryDirectory(dir="deploy") as folder:
        (pathlib.Path(folder) / "kustomization.yaml").write_text(overlay)
        built = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True)
    require(built.returncode == 0, built.stderr)
    built = list(yaml.safe_load_all(built.stdout))
    for document in built:
        validate(document)
    unused = {document["kind"] for document in documents} - {document["kind"] for document in built}
    require(unused <= {WITHOUT_SCHEMA}, f"the kustomization has no {unused}")


def verify_unit():
    text = UNIT.read_text()
    variables = re.findall(r"([A-Z_]+)=", " ".join(re.findall(r"^Environment=(.*)", text, re.MULTILINE)))
    unknown = set(variables) - set(SETTINGS)
    require(variables and not unknown, f"no settings of the service in {UNIT}: {unknown}")
    if not shutil.which("systemd-analyze"):
        print(f"manifests: {UNIT} is not verified, because systemd-analyze is not installed")
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / UNIT.name
        # The program need not be installed here.
        copy.write_text(text.replace("/usr/local/bin/listing-api", sys.executable))
        run = lambda *command: subprocess.run(["systemd-analyze", *command, copy], capture_output=True, text=True)
        verified = run("verify", "--man=no")
        # It prints unknown keys, but fails only on some problems.
        require(verified.returncode == 0 and not verified.stderr, verified.stderr)
        security = run("security", "--offline=true", "--threshold=25", "--no-pager")
        require(security.returncode == 0, security.stdout + security.stderr)


documents = [
    document
    for path in sorted(KUBERNETES.glob("*.yaml"))
    if path.name != "kustomization.yaml"
    for document in yaml.safe_load_all(path.read_text())
]
for document in documents:
    validate(document)
verify_references(documents)
verify_overlay(documents)
verify_unit()
