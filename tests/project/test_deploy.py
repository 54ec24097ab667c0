"""The files in ``deploy/``: linters read them all, and what the CPU image installs is run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from core_rerank_integrations import __version__
from core_rerank_integrations.serving.limits import Limits

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
TOOLS = ROOT / ".venv-tools" / "bin"
DOCKERFILES = sorted(path for path in DEPLOY.glob("Dockerfile*"))


def run(*command: str | Path, **options: Any) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_nothing_is_left_out() -> None:
    assert [path.name for path in DOCKERFILES] == [
        "Dockerfile", "Dockerfile.chat", "Dockerfile.ray", "Dockerfile.vllm",
    ]  # fmt: skip
    assert {path.name for path in DEPLOY.iterdir()} - {path.name for path in DOCKERFILES} == {
        "chart", "compose.yaml", "rayservice.yaml",
    }  # fmt: skip


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles(path: Path) -> None:
    run(TOOLS / "hadolint", path)
    steps = instructions(path)
    assert [argument for name, argument in steps if name == "USER"][-1].startswith("1000")
    bases = [argument for name, argument in steps if name == "FROM"]
    assert all(re.match(r"\S+:\S*\d", base) for base in bases), "versions are named"


def test_compose() -> None:
    path = DEPLOY / "compose.yaml"
    run(TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", path)
    services = yaml.safe_load(path.read_text(encoding="utf-8"))["services"]
    for service in services.values():
        assert service["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        if build := service.get("build"):
            assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
    grace = services["reranker"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) > Limits().shutdown_seconds


RENDER = """
import json, sys
import helm_python as helm

folder, values = sys.argv[1], json.loads(sys.argv[2])
findings = helm.lint(folder, values, strict=True)
with helm.Chart.load(folder) as chart:
    chart.validate_schema(values)
    print(json.dumps([findings, chart.render(values, name="name", namespace="space")]))
"""


def rendered(**values: Any) -> list[dict[str, Any]]:
    """Lint the chart by Helm, and return its manifests."""
    command = [TOOLS / "python", "-c", RENDER, DEPLOY / "chart", json.dumps(values)]
    findings, files = json.loads(run(*command).splitlines()[-1])
    assert findings["errors"] == []
    assert [found["error"] for found in findings["messages"]] == ["icon is recommended"]
    return [yaml.safe_load(text) for name, text in files.items() if name.endswith(".yaml")]


def validated(manifests: list[dict[str, Any]], folder: Path) -> None:
    for number, manifest in enumerate(manifests):
        path = folder / f"{number}.yaml"
        path.write_text(yaml.safe_dump(manifest), encoding="utf-8")
        run(TOOLS / "kubernetes-validate", "--strict", path)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {
            "replicas": 3,
            "options": ["--max-documents", "100"],
            "podAnnotations": {"prometheus.io/scrape": "true"},
            "nodeSelector": {"kubernetes.io/arch": "arm64"},
            "tolerations": [{"key": "a", "operator": "Exists"}],
            "affinity": {"nodeAffinity": {}},
            "documents": {"storageClass": "fast"},
            "image": {"tag": "mine"},
        },
    ],
    ids=["defaults", "all values"],
)
def test_chart(values: dict[str, Any], tmp_path: Path) -> None:
    manifests = {manifest["kind"]: manifest for manifest in rendered(**values)}
    assert set(manifests) == {"Service", "StatefulSet"}
    validated(list(manifests.values()), tmp_path)
    spec = manifests["StatefulSet"]["spec"]
    (server,) = spec["template"]["spec"]["containers"]
    assert spec["template"]["spec"]["securityContext"]["runAsUser"] == 1000
    assert server["securityContext"]["readOnlyRootFilesystem"] is True
    assert server["args" if values else "image"]
    assert server["image"] == f"core-rerank:{'mine' if values else __version__}"
    (mount,) = server["volumeMounts"]
    assert (
        mount["mountPath"] == f"{environment(DEPLOY / 'Dockerfile')['CORE_RERANK_CACHE']}/documents"
    )


def test_the_page_pushes_the_image_that_the_chart_pulls() -> None:
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    assert f"docker push registry.example.com/core-rerank:{__version__}\n" in page


def test_the_chart_refuses_what_it_does_not_know() -> None:
    with pytest.raises(AssertionError, match="replica"):
        rendered(replica=2)


def test_rayservice(tmp_path: Path) -> None:
    service = yaml.safe_load((DEPLOY / "rayservice.yaml").read_text(encoding="utf-8"))
    cluster = service["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}} | g["template"]
        for g in groups
    ]
    validated(pods, tmp_path)
    containers = [group["template"]["spec"]["containers"][0] for group in groups]
    # Kubernetes always pulls `:latest`, also where the nodes have it.
    assert {container["imagePullPolicy"] for container in containers} == {"IfNotPresent"}
    (image,) = [
        argument for name, argument in instructions(DEPLOY / "Dockerfile.ray") if name == "FROM"
    ]
    assert image.startswith(f"rayproject/ray:{cluster['rayVersion']}-")
    schema = pytest.importorskip("ray.serve.schema")
    config = schema.ServeDeploySchema.model_validate(
        yaml.safe_load(service["spec"]["serveConfigV2"])
    )
    (application,) = config.applications
    from importlib import import_module

    module, name = application.import_path.split(":")
    assert getattr(import_module(module), name)(application.args)
    assert application.args["disk_bytes"] <= 2 << 30, "documents are in the container's own layer"
    cpus = application.args["num_cpus"]
    assert {container["resources"]["limits"]["cpu"] for container in containers[1:]} == {str(cpus)}


def instructions(path: Path) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile with their arguments."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [
        (name, argument) for name, _, argument in (line.partition(" ") for line in lines) if name
    ]


def environment(path: Path) -> dict[str, str]:
    """Return the variables of the last stage of a Dockerfile."""
    variables: dict[str, str] = {}
    for name, argument in instructions(path):
        if name == "FROM":
            variables = {}
        elif name == "ENV":
            variables |= dict(item.split("=", 1) for item in shlex.split(argument))
    return variables


@dataclass(frozen=True)
class Image:
    """What the CPU image holds, in a folder.

    Attributes:
        root: The folder; it stands for the root of the image.
    """

    root: Path

    def inside(self, text: str) -> str:
        """Return a text whose paths are in the folder."""
        for path in ("/opt/core-rerank", "/var/cache/core-rerank"):
            text = re.sub(rf"(?<![\w./]){path}", f"{self.root}{path}", text)
        return text

    @property
    def variables(self) -> dict[str, str]:
        found = environment(DEPLOY / "Dockerfile")
        return {
            name: self.inside(value.replace("$PATH", "/usr/bin:/bin"))
            for name, value in found.items()
        }

    def command(self, instruction: str) -> list[str]:
        """Return the command of ENTRYPOINT or HEALTHCHECK."""
        (argument,) = [
            argument
            for name, argument in instructions(DEPLOY / "Dockerfile")
            if name == instruction
        ]
        command: list[str] = json.loads(argument[argument.index("[") :])
        return command


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    """Copy and run what the first stage of the Dockerfile copies and runs.

    Yields:
        What the image would hold.
    """
    # Another user can run the system's Python, where one of a version manager is in somebody's
    # home. It may lack pip, which installs from outside.
    system = Path(f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}")
    with tempfile.TemporaryDirectory() as name:
        image = Image(Path(name))
        image.root.chmod(0o755)
        source, tools = image.root / "source", image.root / "tools"
        for folder in (image.root / "opt", image.root / "var" / "cache", source, tools):
            folder.mkdir(parents=True)
        python = tools / "python"
        interpreter = system if system.exists() else sys.executable
        python.write_text(
            f'#!/bin/sh\ncase "$2" in\nvenv) exec {interpreter} "$@" ;;\n'
            f'*) exec {sys.executable} "$@" ;;\nesac\n'
        )
        python.chmod(0o755)
        variables = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
        stages = 0
        for instruction, argument in instructions(DEPLOY / "Dockerfile"):
            stages += instruction == "FROM"
            if stages > 1:
                break
            if instruction == "COPY":
                copy_context(source)
            elif instruction in ("ENV", "ARG"):
                given = (item.split("=", 1) for item in shlex.split(argument))
                variables |= {key: image.inside(value) for key, value in given}
            elif instruction == "RUN":
                run("sh", "-c", image.inside(argument), cwd=source, env=variables)
        shutil.rmtree(source)
        yield image


def copy_context(target: Path) -> None:
    """Copy what ``.dockerignore`` lets into an image."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in lines
    for line in lines:
        if line.startswith("!"):
            path = ROOT / line[1:]
            if path.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(path, target / path.name, ignore=ignored)
            else:
                shutil.copy(path, target)


def confined(image: Image) -> list[str]:
    """Return what starts a command as user 1000 on a read-only root with one writable folder.

    Where this is not allowed, the test is skipped.
    """
    documents = f"{image.variables['CORE_RERANK_CACHE']}/documents"
    script = (
        f"mount -t tmpfs -o mode=0755,uid=1000,gid=1000 tmpfs {documents} && "
        'mount -o remount,bind,ro / && exec "$@"'
    )
    command = [
        *([] if os.geteuid() == 0 else ["sudo", "-n"]),
        *("unshare", "--mount", "sh", "-c", script),
        *("sh", "setpriv", "--reuid=1000", "--regid=1000", "--clear-groups"),
    ]
    python = f"{image.root}/opt/core-rerank/bin/python"
    allowed = subprocess.run([*command, python, "-c", ""]).returncode == 0
    if not allowed:
        pytest.skip("a process may not be confined here")
    return command


def test_the_image_has_neither_pytorch_nor_pip(image: Image) -> None:
    code = "from importlib.util import find_spec\nprint(find_spec('torch'), find_spec('pip'))"
    assert run(image.root / "opt/core-rerank/bin/python", "-c", code) == "None None\n"


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_image_can_be_built_for(machine: str, image: Image, tmp_path: Path) -> None:
    """The index has a wheel of every package, for the Python and the system of the image."""
    base = next(rest for name, rest in instructions(DEPLOY / "Dockerfile") if name == "FROM")
    (python,) = re.findall(r"^python:(\d\.\d+)-slim-trixie", base)
    pip = [sys.executable, "-m", "pip"]
    freeze = run(*pip, "--python", image.root / "opt/core-rerank/bin/python", "freeze")
    packages = [line for line in freeze.splitlines() if re.fullmatch(r"[\w.-]+==[\w.+]+", line)]
    assert len(packages) > 30
    systems = [f"manylinux_2_{minor}_{machine}" for minor in range(5, 42)]
    run(
        *pip,
        *("install", "--dry-run", "--no-deps", "--ignore-installed", "--only-binary=:all:"),
        *("--python-version", python, "--target", tmp_path),
        *(f"--platform={system}" for system in [*systems, f"manylinux2014_{machine}"]),
        *packages,
    )


def test_the_image_asks_for_a_key(image: Image) -> None:
    program, *arguments = image.command("ENTRYPOINT")
    program = shutil.which(program, path=image.variables["PATH"])
    done = subprocess.run(
        [program, *arguments], env=image.variables, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "CORE_RERANK_API_KEY must hold the key" in done.stderr


@pytest.mark.parametrize("is_confined", [False, True], ids=["plain", "confined"])
def test_the_image_answers(is_confined: bool, image: Image) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = image.variables | {"CORE_RERANK_API_KEY": "s3cret"}
    set_variables = ["env", "-i", *(f"{name}={value}" for name, value in variables.items())]
    entry = [*image.command("ENTRYPOINT"), "--host", "127.0.0.1", "--port", port]
    health = [part.replace(":8080", f":{port}") for part in image.command("HEALTHCHECK")]
    start = confined(image) if is_confined else []
    with subprocess.Popen(
        [*start, *set_variables, *entry], stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            end = time.monotonic() + 120
            while subprocess.run([*set_variables, *health], stderr=subprocess.DEVNULL).returncode:
                assert server.poll() is None, server.communicate()[1]
                assert time.monotonic() < end
                time.sleep(0.5)
            headers = {"Authorization": "Bearer s3cret"}
            url = f"http://127.0.0.1:{port}"
            body = {
                "query": "Who patented the telephone?",
                "documents": ["Bread is made of flour.", "Bell patented the telephone."],
            }
            with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
                stored = client.post("/v1/documents", json={"documents": body["documents"]})
                assert stored.json()["bytes_written"] > 0, stored.text
                reply = client.post("/v2/rerank", json=body).json()
            assert [row["index"] for row in reply["results"]] == [1, 0]
            assert httpx.post(f"{url}/v2/rerank", json=body).status_code == 401
            server.send_signal(signal.SIGTERM)
            _, errors = server.communicate(timeout=60)
        finally:
            server.kill()
    assert server.returncode == -signal.SIGTERM, errors
    assert "Traceback" not in errors
