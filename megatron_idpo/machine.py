"""What identifies this machine."""

from pathlib import Path


def boot_id() -> str:
    """Differs between machines, and between two boots of one; empty where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
