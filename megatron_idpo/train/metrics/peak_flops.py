"""Peak FLOP/s of known GPUs: the denominator of model FLOPs utilization (MFU).

Dense matrix products, without structured sparsity, at the clocks of the vendor's data sheet. For a
device that is not listed no MFU is reported.
"""

import re

import torch

PEAK_TFLOPS: tuple[tuple[str, float, float], ...] = (
    # Each: a pattern of torch.cuda.get_device_name(), bf16 and fp16, fp32 without TF32. Data sheets
    # give bf16 with sparsity from Hopper on; here it is half of that. More specific names first.
    #
    # NVIDIA Blackwell Architecture Datasheet (GB200 NVL72, HGX B200: 5 and 4.5 PFLOPS sparse)
    (r"GB200\b", 2500.0, 80.0),
    (r"B200\b", 2250.0, 75.0),
    # NVIDIA H200 Datasheet (SXM 1,979 sparse, NVL 1,671 sparse)
    (r"H200 NVL\b", 835.5, 60.0),
    (r"H200\b", 989.5, 67.0),
    # NVIDIA GH200 Grace Hopper Superchip Datasheet (1,979 sparse)
    (r"GH200\b", 989.5, 67.0),
    # NVIDIA H100 Datasheet (NVL 1,671, PCIe 1,513, SXM 1,979 sparse)
    (r"H100 NVL\b", 835.5, 60.0),
    (r"H100 PCIe\b", 756.5, 51.0),
    (r"H100\b", 989.5, 67.0),
    # NVIDIA A100 Datasheet; equal for PCIe and SXM
    (r"A100\b", 312.0, 19.5),
    # NVIDIA A40 Datasheet
    (r"A40\b", 149.7, 37.4),
    # NVIDIA L40S and L40 Datasheets
    (r"L40S\b", 362.05, 91.6),
    (r"L40\b", 181.05, 90.5),
    # NVIDIA RTX Blackwell and Ada GPU Architecture white papers, products in fp16 with fp32
    # accumulation
    (r"RTX 5090$", 209.5, 104.8),
    (r"RTX 4090$", 165.2, 82.6),
    # AMD Instinct MI300X and MI325X Data Sheets; matrix fp32
    (r"MI3(00|25)X\b", 1307.4, 163.4),
)


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of matrix products on one device.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.
        dtype: of the products: bfloat16, float16 or float32.

    Returns:
        None for unknown devices, and for float32 where torch may use TF32 instead.
    """
    for pattern, half, single in PEAK_TFLOPS:
        if not re.search(rf"(?:^|[\s-]){pattern}", device_name):
            continue
        if dtype == torch.float32:
            exact = torch.get_float32_matmul_precision() == "highest"
            return single * 1e12 if exact else None
        return half * 1e12
    return None


def current_device_peak(dtype: torch.dtype) -> float | None:
    """`peak_flops` of the current CUDA device; None where there is none."""
    if not torch.cuda.is_available():
        return None
    return peak_flops(torch.cuda.get_device_name(), dtype)
