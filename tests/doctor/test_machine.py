"""Resources within the limits of a container."""

from megatron_idpo.doctor import machine as doctor_machine
from megatron_idpo.doctor.machine import Machine

GIB = 2**30


def test_limits_of_the_control_group_apply(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("1073741824\n")
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    monkeypatch.setattr(doctor_machine, "CGROUP", tmp_path)
    machine = Machine.here()
    assert machine.memory_bytes == GIB and machine.free_memory_bytes <= GIB
    assert machine.cores == 0.5
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert Machine.here().memory_bytes > GIB and Machine.here().cores >= 1
