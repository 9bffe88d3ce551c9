"""What `mmdit bench` measures on a GPU that is not the first one; the GPU is a fake."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from mmdit_lib.reports import bench

SECOND = torch.device("cuda:1")


class Gpus:
    """Two fake GPUs, of which the first is current; records each call and the GPU that was current."""

    def __init__(self):
        self.current, self.asked = 0, []

    @contextmanager
    def device(self, device):
        before, self.current = self.current, device.index
        yield
        self.current = before

    def note(self, what: str):
        return lambda *_: self.asked.append((what, self.current)) or 0

    def event(self, **_):
        return SimpleNamespace(record=self.note("record"), synchronize=lambda: None, elapsed_time=lambda end: 2.0)


@pytest.fixture
def gpus(monkeypatch):
    found = Gpus()
    monkeypatch.setattr(torch.cuda, "device", found.device)
    monkeypatch.setattr(torch.cuda, "Event", found.event)
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, found.note(name))
    return found


def test_events_are_recorded_on_the_gpu_of_the_step(gpus):
    assert bench.step_times(lambda: None, SECOND, repeats=2) == [2.0, 2.0]
    assert gpus.asked == [("record", 1)] * 4 and gpus.current == 0


def test_memory_is_that_of_the_gpu_of_the_step(gpus):
    assert bench.peak_bytes(lambda: None, SECOND) == 0
    assert len(gpus.asked) == 4 and {device for _, device in gpus.asked} == {1}


def test_wall_times_on_a_cpu():
    calls = []
    times = bench.step_times(lambda: calls.append(1), torch.device("cpu"), repeats=2, warm_up=1)
    assert len(times) == 2 and len(calls) == 3


def test_conditions_are_those_of_this_gpu(monkeypatch):
    """torch counts only the GPUs in CUDA_VISIBLE_DEVICES, nvidia-smi all."""
    properties = {1: SimpleNamespace(uuid="0a1b2c3d-0000-1111-2222-333344445555")}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties[device.index])
    commands = []

    def run(command, **_):
        commands.append(command)
        return SimpleNamespace(stdout="NVIDIA H100, 580.1, 1980 MHz, 1980 MHz, 300 W\n")

    monkeypatch.setattr(bench.subprocess, "run", run)
    assert "NVIDIA H100, 580.1" in bench.conditions(SECOND)
    assert "--id=GPU-0a1b2c3d-0000-1111-2222-333344445555" in commands[0]
