"""Where a process stands, by what each launcher leaves in its environment."""

import pytest

from lmtrain.hosts import place
from lmtrain.types import LmtrainError

NOWHERE = lambda key: None  # noqa: E731

SLURM = {"SLURM_JOB_ID": "70", "SLURM_STEP_NODELIST": "n[007-010,12],m", "SLURM_STEP_NUM_TASKS": "5",
         "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x5)"}  # fmt: skip
XPK = {"JOBSET_NAME": "a", "REPLICATED_JOB_NAME": "slice-job", "NNODES": "4", "NODE_RANK": "2"}
GKE = {"TPU_WORKER_HOSTNAMES": "t-0.s,t-1.s", "TPU_WORKER_ID": "1"}


@pytest.mark.parametrize(
    "environment, kind, coordinator, processes, process",
    [
        ({}, "alone", "", 1, 0),
        ({"SLURM_JOB_ID": "70", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "alone", "", 1, 0),  # a batch script
        (SLURM, "slurm", "n007:20140", 5, 3),
        (XPK, "jobset", "a-slice-job-0-0.a:8476", 4, 2),
        ({"JOBSET_NAME": "a", "NNODES": "2", "JOB_COMPLETION_INDEX": "1"}, "jobset", "a-workers-0-0.a:8476", 2, 1),
        (GKE, "tpu", "t-0.s:8476", 2, 1),
        (GKE | XPK, "tpu", "t-0.s:8476", 2, 1),
        (
            GKE
            | {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2", "MEGASCALE_COORDINATOR_ADDRESS": "c:9000"},
            "tpu", "c:8476", 6, 5,
        ),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, "tpu", "", 1, 0),
        (
            SLURM | {"LMTRAIN_COORDINATOR": "h:9", "LMTRAIN_PROCESSES": "2", "LMTRAIN_PROCESS": "1"},
            "coordinator", "h:9", 2, 1,
        ),
    ],
)  # fmt: skip
def test_each_launcher_is_known_by_its_environment(environment, kind, coordinator, processes, process):
    found = place.find(environment, NOWHERE)
    assert (found.kind, found.coordinator, found.processes, found.process) == (kind, coordinator, processes, process)
    assert str(processes) in found.says or "one process" in found.says


@pytest.mark.parametrize("workers", ["10.0.0.1,10.0.0.2", "w:1:10.0.0.1,w:2:10.0.0.2"])
def test_a_tpu_vm_asks_its_metadata_server(workers):
    found = {"worker-network-endpoints": workers, "agent-worker-number": "1", "tpu-env": "ZONE: 'z'\nX: '1'"}
    assert place.find({}, found.get) == place.Place("tpu", "10.0.0.1:8476", 2, 1)
    slices = found | {"tpu-env": "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'"}
    assert place.find({}, slices.get).process == 3
    assert place.find({"TPU_SKIP_MDS_QUERY": "1"}, found.get).kind == "alone"


@pytest.mark.parametrize(
    "nodes, first", [("a", "a"), ("a,b", "a"), ("n[3-5]", "n3"), ("n[003,7]-ib,m", "n003-ib"), ("a,n[1-2]", "a")]
)
def test_the_first_of_slurms_nodes(nodes, first):
    assert place.first_host(nodes) == first


def test_tasks_that_share_a_nodes_gpus_take_one_each():
    shared = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    assert place.find(shared, NOWHERE).devices == (1,)
    assert place.find(shared | {"CUDA_VISIBLE_DEVICES": "2"}, NOWHERE).devices is None  # bound by Slurm already
    assert place.find(SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, NOWHERE).devices is None  # one process a node


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"LMTRAIN_COORDINATOR": "h:9"}, "LMTRAIN_PROCESSES and LMTRAIN_PROCESS not set"),
        ({"LMTRAIN_COORDINATOR": "h", "LMTRAIN_PROCESSES": "2", "LMTRAIN_PROCESS": "1"}, "'h', but takes HOST:PORT"),
        ({"LMTRAIN_COORDINATOR": "h:9", "LMTRAIN_PROCESSES": "2", "LMTRAIN_PROCESS": "2"}, "process 2 of 2"),
        ({"LMTRAIN_COORDINATOR": "h:9", "LMTRAIN_PROCESSES": "two", "LMTRAIN_PROCESS": "1"}, "'two', but takes a num"),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(environment, message):
    with pytest.raises(LmtrainError, match=message):
        place.find(environment, NOWHERE)
