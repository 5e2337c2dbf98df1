"""Peak FLOP/s by torch's device names; unknown devices have none."""

import pytest
import torch

from megatron_idpo.train.metrics.peak_flops import current_device_peak, peak_flops

HALF = torch.bfloat16


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L40", 181.05),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_known_devices(name, tera):
    assert peak_flops(name, HALF) == tera * 1e12
    assert peak_flops(name, torch.float16) == tera * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10",
        "NVIDIA A10G",
        "NVIDIA L4",
        "Tesla V100-SXM2-32GB",
        "NVIDIA A1000",
        "NVIDIA H1000",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H20",
        "AMD Instinct MI300A",
        "Some CPU",
        "",
    ],
)
def test_unknown_and_similarly_named_devices_have_none(name):
    assert peak_flops(name, HALF) is None


def test_float32_peak_requires_highest_matmul_precision():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert peak_flops("NVIDIA A100-SXM4-40GB", torch.float32) == 19.5e12
        torch.set_float32_matmul_precision("high")
        assert peak_flops("NVIDIA A100-SXM4-40GB", torch.float32) is None
    finally:
        torch.set_float32_matmul_precision(before)


def test_cpu_has_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert current_device_peak(HALF) is None


def test_current_device_is_looked_up_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert current_device_peak(HALF) == 989.5e12
