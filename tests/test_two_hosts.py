"""Two hosts with a rank each: network namespaces of this machine, gloo and MPI over their addresses."""

import re
import sys

import pytest
from helpers import mpirun
from hosts import Hosts, why_not

from mmdit_lib.checkpoint import convert
from mmdit_lib.engine.build import build
from mmdit_lib.parallel.heartbeat import HEARTBEAT_SECONDS
from mmdit_lib.tiny import model_path

pytest.importorskip("mpi4py")
if sys.platform != "linux":
    pytest.skip("network namespaces are a feature of Linux", allow_module_level=True)
if reason := why_not():
    pytest.skip(reason, allow_module_level=True)
from fault_table import run_hosts

pytestmark = pytest.mark.slow
SECONDS = 3
MMDIT = ["-m", "mmdit_lib.cli"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    root = tmp_path_factory.mktemp("engines")
    checkpoint = convert(str(model_path()), str(root / "checkpoint"), dtype="float32", progress=False)
    options = dict(plan=False, progress=False, max_resolution="128x128", opt_resolution="128x128")
    build(str(checkpoint), str(root / "other"), cp_size=2, cp_method="ulysses", **options)
    return build(str(checkpoint), str(root / "engine"), cp_size=2, **options)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with Hosts(["hosta", "hostb"], tmp_path_factory.mktemp("h")) as found:
        yield found


def generate(engine, picture) -> list:
    options = ["--num_inference_steps", 2, "--backend", "pytorch", "--device", "cpu"]
    return [*MMDIT, "generate", "a red circle", "--engine_dir", engine, "--output", picture, *options]


def test_parity(engine, hosts):
    process = hosts.mpirun(["hosta", "hostb"], [*MMDIT, "parity", "--model_path", "tiny", "--engine_dir", engine])
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0 and "agree" in out, out[-2000:] + err[-2000:]


def test_generate_equals_one_host_in_any_order_of_hosts(engine, hosts, tmp_path):
    """Rank 0 is on the host that did not start mpirun. Same ranks, same arithmetic: the same bytes."""
    process = hosts.mpirun(["hostb", "hosta"], generate(engine, tmp_path / "two.png"), at="hosta")
    assert process.communicate(timeout=200) and process.returncode == 0
    assert mpirun(2, *generate(engine, tmp_path / "one.png"), timeout=200).returncode == 0
    assert (tmp_path / "two.png").read_bytes() == (tmp_path / "one.png").read_bytes()


def test_another_engine_folder_on_one_host_is_refused(engine, hosts, tmp_path):
    hosts.bind("hostb", engine.with_name("other"), engine)
    process = hosts.mpirun(["hosta", "hostb"], generate(engine, tmp_path / "picture.png"))
    _, err = process.communicate(timeout=200)
    hosts.bind("hostb", None, engine)
    ours = [line for line in err.splitlines() if line.startswith("rank ")]
    assert process.returncode != 0 and len(ours) == 1, err
    assert ours[0].startswith("rank 0: mmdit: rank 1's engine folder") and "they differ in" in ours[0]


@pytest.mark.parametrize("cause", ["cut", "vanish"])
def test_a_host_out_of_reach_is_named(cause, engine, tmp_path):
    found = run_hosts(cause, engine, tmp_path, SECONDS)
    named = rf"rank 1 on hostb is unreachable: nothing heard from it for {SECONDS} s; last activity: (step|loading)"
    assert re.search(named, found.text)  # that it had begun a step may not have arrived in time
    assert found.code != 0 and found.left == 0
    assert found.seconds < 30 - HEARTBEAT_SECONDS + SECONDS
